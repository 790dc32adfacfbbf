"""Answers that a data set marks as bad are never learnt: they become rejected answers, or are set aside."""

import pytest
from data_rows import turns, write_lines

GOOD, BAD = "麻黄发汗解表，宣肺平喘。", "麻黄清热解毒，凉血止血。"
ALONE = "marked as a bad answer, no good one"
WEIGHED = [*turns("问"), {"role": "assistant", "content": BAD, "weight": 0}]
MARKED = [  # a good and a bad answer to one question, in the forms in which they are published
    ({"prompt": "问", "completion": GOOD, "label": True}, {"prompt": "问", "completion": BAD, "label": False}),
    ({"prompt": turns("问"), "completion": turns("", GOOD)[1:], "label": True},
     {"prompt": turns("问"), "completion": turns("", BAD)[1:], "label": False}),
    ({"messages": turns("问", GOOD), "kto_tag": True}, {"messages": turns("问", BAD), "kto_tag": False}),
    ({"instruction": "问", "output": GOOD}, {"instruction": "问", "output": BAD, "kto_tag": "false"}),
    ({"messages": turns("问", GOOD)}, {"messages": WEIGHED}),
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
    asides = [(aside["line"], aside["reason"], aside["row"]) for aside in found["set_aside"]]
    assert asides == [(2, ALONE, bad)] and not found["dpo_train"] + found["dpo_eval"]


def test_a_pair_is_in_the_split_of_its_good_answer(tmp_path, convert):
    rows = [{"prompt": f"问题{n}", "completion": f"好{n}"} for n in range(40)]
    rows += [{"prompt": f"问题{n}", "completion": f"坏{n}", "label": False} for n in range(40)]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.3)
    for split in ("train", "eval"):
        asked = {row["messages"][0]["content"] for row in found[f"sft_{split}"]}
        assert asked and asked == {pair["prompt"][0]["content"] for pair in found[f"dpo_{split}"]}


LEAKED = {"prompt": "请问哪一味药善于发汗解表？", "completion": "麻黄", "split": "train"}
ASIDE = [  # rows, and why some of them are set aside
    ([{"prompt": "问", "completion": GOOD, "label": label} for label in (True, False)], ["marked as a bad answer, and as a good one"]),
    ([{"messages": [*WEIGHED, *turns("再问", GOOD)]}, {"query": "问", "response": "答"}], ["marked as not to be learnt"]),
    ([{"query": "哪一味药善于发汗解表？", "response": "麻黄", "split": "test"}, LEAKED,
      {"prompt": LEAKED["prompt"], "completion": "石膏", "label": False}], ["evaluation leak", ALONE]),
]  # fmt: skip


@pytest.mark.parametrize("rows, reasons", ASIDE)
def test_bad_answers_that_make_no_pair(tmp_path, convert, rows, reasons):
    found = convert(write_lines(tmp_path / "a.jsonl", *rows))
    assert [row["reason"] for row in found["set_aside"]] == reasons
