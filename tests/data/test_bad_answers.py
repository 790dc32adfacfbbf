"""Answers that a data set marks as bad are never learnt: they become rejected answers, or are set aside."""

import pytest
from data_rows import turns, write_lines

GOOD, BAD = "麻黄发汗解表，宣肺平喘。", "麻黄清热解毒，凉血止血。"
MARKED = [  # a good and a bad answer to one question, in the forms in which they are published
    ({"prompt": "问", "completion": GOOD, "label": True}, {"prompt": "问", "completion": BAD, "label": False}),
    (
        {"prompt": turns("问"), "completion": turns("", GOOD)[1:], "label": True},
        {"prompt": turns("问"), "completion": turns("", BAD)[1:], "label": False},
    ),
    ({"messages": turns("问", GOOD), "kto_tag": True}, {"messages": turns("问", BAD), "kto_tag": False}),
    (
        {"instruction": "问", "input": "", "output": GOOD},
        {"instruction": "问", "input": "", "output": BAD, "kto_tag": "false"},
    ),
    (
        {"messages": turns("问", GOOD)},
        {"messages": [*turns("问"), {"role": "assistant", "content": BAD, "weight": 0}]},
    ),
]  # fmt: skip


@pytest.mark.parametrize("good, bad", MARKED)
def test_a_bad_answer_becomes_the_rejected_one(tmp_path, convert, good, bad):
    found = convert(write_lines(tmp_path / "a.jsonl", bad, good))
    [row], [pair] = found["sft_train"] + found["sft_eval"], found["dpo_train"] + found["dpo_eval"]
    assert row["messages"] == turns("问", GOOD) and "weight" not in str(row)
    assert pair["prompt"] == turns("问") and pair["chosen"][0]["content"] == GOOD
    assert pair["rejected"][0]["content"] == BAD and pair["source"] == "a.jsonl:1"


@pytest.mark.parametrize("good, bad", MARKED)
def test_a_bad_answer_alone_is_set_aside(tmp_path, convert, good, bad):
    other = {"query": "别的问题？", "response": "别的回答。"}
    found = convert(write_lines(tmp_path / "a.jsonl", other, bad))
    [aside] = found["set_aside"]
    assert (aside["line"], aside["reason"]) == (2, "marked as a bad answer, no good one") and aside[
        "row"
    ] == bad
    assert not found["dpo_train"] + found["dpo_eval"]


def test_a_pair_is_in_the_split_of_its_good_answer(tmp_path, convert):
    rows = [{"prompt": f"问题{n}", "completion": f"好{n}"} for n in range(40)]
    rows += [{"prompt": f"问题{n}", "completion": f"坏{n}", "label": False} for n in range(40)]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.3)
    for split in ("train", "eval"):
        asked = {row["messages"][0]["content"] for row in found[f"sft_{split}"]}
        assert asked and asked == {pair["prompt"][0]["content"] for pair in found[f"dpo_{split}"]}


def test_the_same_answer_marked_as_both_is_no_pair(tmp_path, convert):
    rows = [{"prompt": "问", "completion": GOOD, "label": label} for label in (True, False)]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows))
    assert [row["reason"] for row in found["set_aside"]] == ["marked as a bad answer, and as a good one"]


def test_a_bad_answer_before_the_end_is_set_aside(tmp_path, convert):
    messages = turns("问", BAD, "再问", GOOD)
    messages[1]["weight"] = 0
    found = convert(
        write_lines(tmp_path / "a.jsonl", {"messages": messages}, {"query": "问", "response": "答"})
    )
    assert [row["reason"] for row in found["set_aside"]] == ["marked as not to be learnt"]


def test_a_good_answer_that_leaks_takes_the_bad_one_with_it(tmp_path, convert):
    rows = [
        {"query": "哪一味药善于发汗解表？", "response": "麻黄", "split": "test"},
        {"prompt": "请问哪一味药善于发汗解表？", "completion": "麻黄", "split": "train"},
        {"prompt": "请问哪一味药善于发汗解表？", "completion": "石膏", "label": False},
    ]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows))
    assert [row["reason"] for row in found["set_aside"]] == [
        "evaluation leak",
        "marked as a bad answer, no good one",
    ]
