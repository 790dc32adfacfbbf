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
    guilty = [row for item in exam for row in ways_to_ask(item, chance)]
    innocent = [row for item in others for row in ways_to_ask(item, chance)]
    files = [write_lines(tmp_path / "exam.jsonl", *exam)]
    for name, rows in (("guilty", guilty), ("innocent", innocent)):
        files.append(write_lines(tmp_path / f"{name}.jsonl", *({**row, "split": "train"} for row in rows)))
    found = convert(*files)
    trained = [row["source"].split(":")[0] for row in found["sft_train"]]
    assert trained.count("guilty.jsonl") <= 0.01 * len(guilty)
    leaks = [row for row in found["set_aside"] if row["reason"] == "exam leak"]
    of_the_exam = [row for row in leaks if row["detail"].startswith("of exam.jsonl")]
    assert sum(row["file"] == "innocent.jsonl" for row in of_the_exam) <= 0.001 * len(innocent)


def item(question, *options, answer="A"):
    return {"question": question, "options": list(options), "answer": answer}


HEAD = item("下列药物中，善治太阳头痛的是（　）", "羌活", "白芷", "柴胡", "细辛")
PULSE = item("虚证脉象最主要的特点是", "按之无力", "往来流利", "如按琴弦", "三五不调")
ROUTE = item("传播途径是指", "病原体在外界经历的路", "病原体换宿主", "病原体排出", "病原体侵入")
THIRST = item("干渴少饮，津液胶粘难化，多因感受哪种病气", "甲气", "乙气", "丙气", "丁气", answer="B")


def listed(asked, stem, change=0, letters="ABCDE"):
    options = [*asked["options"][: 4 - change], *["均不是"] * change]
    return stem + "\n" + "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options))


PULSES = PULSE["question"]
FORMS = [  # question, answer, whether it asks an item of the exam
    ("善治太阳头痛的药物有哪些？", "羌活、川芎。", False),  # the subject, in other words
    ("下列药物中，善治太阳头痛的是哪一味？", "羌活。", True),
    ("下列药物中，善治太阳头痛的是：藁本、防风、苍耳子、辛夷", "藁本。", False),
    ("下列药物中，善治太阳头痛的是\nA. 藁本\nB. 防风\nC. 辛夷", "藁本是对的。", False),
    ("下列药物中，善治阳明头痛的是？", "白芷", False),
    # the stem: a character changed, cut, with tags, in another spacing
    (listed(THIRST, THIRST["question"].replace("粘", "黏")), "应是乙气。", True),
    (listed(THIRST, THIRST["question"].replace("病气", "邪气")), "应是乙气。", True),
    (listed(THIRST, THIRST["question"].replace("少饮", "多饮")), "应是丁气。", False),
    (listed(PULSE, "虚证脉象最主要的特"), "按之无力，余者不是。", True),
    (listed(PULSE, "虚证脉象最主"), "按之无力，余者不是。", True),
    (listed(PULSE, "虚证脉象"), "按之无力，余者不是。", False),
    (listed(PULSE, "<p>虚证脉象<b>最主要</b>的&nbsp;特点是</p>"), "按之无力，余者不是。", True),
    (listed(PULSE, " ".join(PULSES)), "按之无力，余者不是。", True),
    (listed(PULSE, PULSES, change=1), "按之无力，余者不是。", True),
    (listed(PULSE, PULSES, change=2), "按之无力，余者不是。", False),
    ("请出一道单选题，附答案。", listed(PULSE, PULSES) + "\n答案：A", True),
    ("请出一道单选题，附答案。", listed(PULSE, PULSES.replace("特点", "特征")) + "\n答案：A", True),
    # other questions: an opposite, a negation, a number
    (listed(PULSE, PULSES.replace("虚", "实")), "按之无力，余者不是。", False),
    (listed(PULSE, PULSES.replace("特点是", "特点不是")), "往来流利，余者皆是。", False),
    # a short stem alone, and inside another question
    ("传播途径是指什么？", "病原体的去路。", True),
    ("流脑的传播途径是？", "经呼吸道飞沫。", False),
    ("何谓传播途径，请说明？", "病原体在外界经历的路。", True),
]  # fmt: skip


@pytest.mark.parametrize("asked, answered, leaks", FORMS)
def test_what_counts_as_asking_an_item(tmp_path, convert, asked, answered, leaks):
    exam = write_lines(tmp_path / "exam.jsonl", HEAD, PULSE, ROUTE, THIRST)
    rows = [
        {"query": asked, "response": answered, "split": "train"},
        {"prompt": asked, "chosen": answered, "rejected": "不知道。", "split": "train"},
        {"messages": turns("请问一件事", "请说。", asked, answered), "split": "train"},
    ]
    found = convert(exam, write_lines(tmp_path / "a.jsonl", *rows))
    assert [aside["reason"] for aside in found["set_aside"]] == ["exam leak"] * leaks * 3
    assert len(found["exam"]) == 4


def test_items_that_share_a_stem_need_their_options_listed(tmp_path, convert):
    other = {**HEAD, "options": dict(zip("ABCD", ["藁本", "葛根", "吴茱萸", "石膏"]))}
    rows = [
        {"query": "下列药物中，善治太阳头痛的是哪一味，请说明理由？", "response": "独活。"},
        {"query": "善治太阳头痛的是？\nA 细辛 B 羌活 C 白芷 D 柴胡，下列药物中，善治太阳头痛的是", "response": "羌活善治。"},
    ]  # fmt: skip
    rows = write_lines(tmp_path / "a.jsonl", *(row | {"split": "train"} for row in rows))
    found = convert(write_lines(tmp_path / "exam.jsonl", HEAD, other), rows)
    assert [(row["line"], row["detail"]) for row in found["set_aside"]] == [(2, "of exam.jsonl:1")]


def test_a_leak_is_set_aside_whichever_split_it_was_dealt_to(tmp_path, convert):
    exam = write_lines(tmp_path / "exam.jsonl", item("善治太阳头痛的药是", "羌活", "白芷", "柴胡"))
    rows = [{"query": f"第{n}味药的药性？", "response": "温。"} for n in range(9)]
    asks = {"query": "善治太阳头痛的药是", "response": "羌活"}
    files = exam, write_lines(tmp_path / "a.jsonl", asks, *rows)
    for share in (0.1, 0.9):
        assert [row["reason"] for row in convert(*files, eval_share=share)["set_aside"]] == ["exam leak"]
    told = convert(exam, write_lines(tmp_path / "a.jsonl", {**asks, "split": "test"}, *rows))
    assert not told["set_aside"]
