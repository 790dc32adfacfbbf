"""Questions about one text go to one split; case records of other patients are no duplicates; twins in both scripts are one."""

import random

import pytest
from data_rows import CASE, write_lines

from utils.data.dedup import differ_in_fact
from utils.data.normalize import traditional_known

WORDS = (
    "麻黄桂枝芍药甘草生姜大枣石膏知母粳米人参半夏黄芩柴胡厚朴枳实大黄芒硝茯苓白术泽泻猪苓附子干姜细辛五味子"
)


def passage(number, length=260):
    chance = random.Random(number)
    return (
        "".join(chance.choice(WORDS) + ("，" if chance.random() < 0.1 else "") for _ in range(length)) + "。"
    )


@pytest.mark.parametrize("questions", [3, 12, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["input first", "question first"])
def test_questions_about_one_passage_stay_together(tmp_path, convert, questions, form):
    asked = [
        f"第{n}问：文中所述{WORDS[n % 40]}与{WORDS[(n * 7) % 40]}的关系如何，应怎样理解？"
        for n in range(questions)
    ]
    rows = []
    for number in range(20):
        for n, question in enumerate(asked):
            parts = [passage(number), question] if form == "input first" else [question, passage(number)]
            rows.append({"instruction": parts[0], "input": parts[1], "output": f"答{number}-{n}。"})
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.25)
    held_out = [row["messages"][0]["content"] for row in found["sft_eval"]]
    trained = "".join(row["messages"][0]["content"] for row in found["sft_train"])
    assert held_out and not [
        text for number in range(20) if (text := passage(number)) in trained and text in "".join(held_out)
    ]


def test_a_long_instruction_is_no_passage(tmp_path, convert):
    instruction = "请你以一名有三十年临床经验的中医主任医师的身份，根据下面的病情，先辨证，再立法，最后给出方药，并说明煎服方法："
    rows = [{"query": instruction + passage(n, 60), "response": f"答{n}"} for n in range(400)]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.1)
    assert len(found["sft_eval"]) == pytest.approx(40, abs=4)


@pytest.mark.parametrize(
    "one, other, differ",
    [
        ("便血无，腹痛3天", "便血伴，腹痛3天", True),
        ("体温37.5度", "体温38.5度", True),
        ("头痛三年", "头痛两年", True),
        ("左膝疼痛", "右膝疼痛", True),
        ("舌淡，脉沉", "舌淡，脉浮", True),
        ("恶风畏寒", "恶风怕寒", False),
        ("有发热，有汗", "有汗，有发热", False),
    ],
)
def test_numbers_and_negations_make_another_question(one, other, differ):
    assert differ_in_fact(one, other) == differ


def test_other_patients_are_no_duplicates(tmp_path, convert):
    record = f"{CASE}，便血无，体温36.8度，脉搏每分钟72次"
    rows = [
        {"query": record, "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减。"},
        {
            "query": record.replace("便血无", "便血伴"),
            "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减。",
        },
        {
            "query": record.replace("36.8", "38.6"),
            "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减。",
        },
        {"query": "医生，" + record + "。", "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减！"},
    ]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0)
    assert [row["reason"] for row in found["set_aside"]] == ["near-duplicate"] and len(
        found["sft_train"]
    ) == 3


@pytest.mark.skipif(not traditional_known(), reason="opencc-python-reimplemented is not installed")
def test_traditional_twins_are_the_same_question(tmp_path, convert):
    rows = [
        {"query": "麻黄湯的組成和功效是什麼？", "response": "由麻黃、桂枝等組成。", "split": "test"},
        {"query": "麻黄汤的组成和功效是什么？", "response": "由麻黄、桂枝等组成。", "split": "train"},
        {"query": "當歸補血湯治療什麼證候？", "response": "血虛發熱證。", "split": "train"},
        {"query": "当归补血汤治疗什么证候？", "response": "血虚发热证。", "split": "train"},
    ]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows))
    assert [row["reason"] for row in found["set_aside"]] == ["evaluation leak", "near-duplicate"]


def test_answers_of_held_out_rows_that_are_in_training_are_counted(tmp_path, convert, capsys):
    answer = "中医诊断：胃脘痛，肝胃不和证；治法：疏肝和胃，理气止痛；方药：柴胡疏肝散加减。"
    rows = [
        {"query": f"{passage(n, 50)}", "response": answer, "split": "test" if n < 3 else "train"}
        for n in range(9)
    ]
    rows += [
        {"query": "何为四诊？", "response": "望闻问切。", "split": "test"},
        {"query": "四诊？", "response": "望闻问切。", "split": "train"},
    ]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows))
    assert found["report"]["eval_answers_in_training"] == 3
    assert "3  held-out answers stand word for word in training" in capsys.readouterr().out
