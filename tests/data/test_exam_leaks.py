"""Exam questions in training rows are found however they are asked; other questions under the same stem stay."""

import random

import pytest
from data_rows import turns, write_lines
from exam_items import make_items, ways_to_ask


@pytest.mark.slow
def test_six_ways_to_ask_are_found_and_innocent_rows_stay(tmp_path, convert):
    chance, items = random.Random(1), make_items(seed=1)
    exam, others = items[:200], items[200:400]
    known = {(item["question"], item["options"][item["answer"]]) for item in exam}
    others = [item for item in others if (item["question"], item["options"][item["answer"]]) not in known]
    guilty = [row for item in exam for row in ways_to_ask(item, chance).values()]
    innocent = [row for item in others for row in ways_to_ask(item, chance).values()]
    files = [
        write_lines(tmp_path / "exam.jsonl", *exam),
        write_lines(tmp_path / "guilty.jsonl", *({**row, "split": "train"} for row in guilty)),
        write_lines(tmp_path / "innocent.jsonl", *({**row, "split": "train"} for row in innocent)),
    ]
    found = convert(*files)
    trained = [row["source"].split(":")[0] for row in found["sft_train"]]
    assert trained.count("guilty.jsonl") <= 0.01 * len(guilty)
    leaks = [row for row in found["set_aside"] if row["reason"] == "exam leak"]
    of_the_exam = [row for row in leaks if row["detail"].startswith("of exam.jsonl")]
    assert sum(row["file"] == "innocent.jsonl" for row in of_the_exam) <= 0.001 * len(innocent)


ITEM = {
    "question": "下列药物中，善治太阳头痛的是（　）",
    "options": dict(zip("ABCD", ["羌活", "白芷", "柴胡", "细辛"])),
    "answer": "A",
}


@pytest.mark.parametrize(
    "row, leaks",
    [
        (
            {"query": "善治太阳头痛的药物有哪些？", "response": "羌活、川芎。"},
            False,
        ),  # the subject, in other words
        ({"query": "下列药物中，善治太阳头痛的是哪一味？", "response": "羌活。"}, True),
        ({"query": "下列药物中，善治太阳头痛的是：藁本、防风、苍耳子、辛夷", "response": "藁本。"}, False),
        ({"query": "下列药物中，善治太阳头痛的是\nA. 藁本\nB. 防风\nC. 辛夷", "response": "A"}, False),
        ({"prompt": "下列药物中，善治太阳头痛的是？", "chosen": "羌活", "rejected": "白芷"}, True),
        ({"messages": turns("下列药物中，善治阳明头痛的是？", "白芷")}, False),
    ],
)
def test_what_counts_as_asking_the_item(tmp_path, convert, row, leaks):
    exam = write_lines(tmp_path / "exam.jsonl", ITEM)
    found = convert(exam, write_lines(tmp_path / "a.jsonl", row | {"split": "train"}))
    assert [aside["reason"] for aside in found["set_aside"]] == ["exam leak"] * leaks
    if leaks:
        assert found["set_aside"][0]["detail"] == "of exam.jsonl:1"


def test_items_that_share_a_stem_need_their_options_listed(tmp_path, convert):
    other = {**ITEM, "options": dict(zip("ABCD", ["藁本", "葛根", "吴茱萸", "石膏"]))}
    exam = write_lines(tmp_path / "exam.jsonl", ITEM, other)
    rows = write_lines(
        tmp_path / "a.jsonl",
        {"query": "下列药物中，善治太阳头痛的是哪一味，请说明理由？", "response": "独活。", "split": "train"},
        {
            "query": "善治太阳头痛的是？\nA 细辛 B 羌活 C 白芷 D 柴胡，下列药物中，善治太阳头痛的是",
            "response": "羌活",
            "split": "train",
        },
    )
    assert [(row["line"], row["detail"]) for row in convert(exam, rows)["set_aside"]] == [
        (2, "of exam.jsonl:1")
    ]
