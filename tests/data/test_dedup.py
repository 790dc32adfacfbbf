"""Duplicates go, leaks are found, and a question goes to one split whole."""

import random

import pytest
from data_rows import CASE, turns, write_lines

from utils.data.dedup import candidate_pairs, overlap, signatures
from utils.data.schemas import OUTPUTS


def sample_like():
    herbs = [
        "麻黄",
        "桂枝",
        "生姜",
        "地黄",
        "生地黄",
        "熟地黄",
        "白芍",
        "赤芍",
        "当归",
        "川芎",
        "人参",
        "党参",
        "丹参",
        "玄参",
    ]
    templates = (
        "{}的性味是什么？",
        "{}归哪些经？",
        "请问{}有哪些功效？",
        "在中药学里，{}这味药属于哪一类，请用一句话回答，并说明它主要用于哪些证候？",
        "请以一名经验丰富的中医师的身份，详细而有条理地说明中药{}的性味、归经、功效、主治、用法用量以及使用注意，不要遗漏任何一项内容。",
    )
    return [
        {
            "instruction": template.format(herb),
            "input": "",
            "output": f"{herb}：{template[-5:]}答案。",
            "split": "eval" if herb in ("桂枝", "丹参") else "train",
            "entity": herb,
            "kind": "herb",
        }
        for herb in herbs
        for template in templates
    ]


def test_template_questions_all_survive_and_own_splits_are_honoured(tmp_path, convert):
    rows = sample_like()
    found = convert(write_lines(tmp_path / "s.jsonl", *rows))
    assert not found["set_aside"]
    assert len(found["sft_eval"]) == sum(row["split"] == "eval" for row in rows)
    # A short answer that two herbs share makes no duplicate of their questions.
    same = [dict(row, output="温") for row in rows]
    assert not convert(write_lines(tmp_path / "t.jsonl", *same))["set_aside"]


def test_same_question_stays_on_one_side_and_duplicates_go(tmp_path, convert):
    rows = [{"query": f"问题{number}怎么办？", "response": f"回答{number}"} for number in range(60)]
    rows += [
        {"query": "问题7怎么办", "response": "另一个回答"},
        {"query": "ＴＣＭ是什么？", "response": "中医"},
        {"query": "请问 tcm 是什么呢", "response": "中医。"},
        {"query": "问题9怎么办？", "response": "回答9"},
    ]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.3)
    assert [(row["line"], row["reason"], row["detail"]) for row in found["set_aside"]] == [
        (62, "near-duplicate", "of a.jsonl:63"),
        (64, "exact duplicate", "of a.jsonl:10"),
    ]
    splits = [{row["source"] for row in found[name]} for name in ("sft_train", "sft_eval")]
    assert any({"a.jsonl:8", "a.jsonl:61"} <= split for split in splits)
    assert len(found["sft_eval"]) == pytest.approx(0.3 * 62, abs=2)


@pytest.mark.slow
def test_long_near_identical_questions(tmp_path, convert):
    rows = [
        {"query": CASE, "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减。"},
        {
            "query": "医生，" + CASE + "，怎么办？急！",
            "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减",
        },
        {
            "query": CASE.replace("畏寒", "怕寒"),
            "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减！",
        },
        {"query": CASE.replace("浮紧", "沉细"), "response": "阳虚头痛。"},
    ]
    rows += [{"query": f"第{number}个问题", "response": f"答{number}"} for number in range(20)]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    for seed in range(8):  # the two that differ in a swapped word and in the answer stay, on one side
        found = convert(path, eval_share=0.5, seed=seed)
        assert sorted(row["reason"] for row in found["set_aside"]) == ["near-duplicate", "near-duplicate"]
        questions = [
            [row["messages"][0]["content"] for row in found[name]] for name in ("sft_train", "sft_eval")
        ]
        splits = [sum(CASE[:20] in question for question in split) for split in questions]
        assert sorted(splits) == [0, 2]
    assert convert(path, near_duplicate=1)["report"]["rows_set_aside"] == 0


def test_leaks_set_the_training_row_aside(tmp_path, convert):
    told = write_lines(
        tmp_path / "told.jsonl",
        {"query": "麻黄有哪些功效？", "response": "发汗", "split": "test"},
        {"query": "请问麻黄有哪些功效", "response": "发汗解表平喘", "split": "train"},
        {"query": CASE, "response": "答", "split": "validation"},
        {"query": "您好，" + CASE + "，为什么？", "response": "别的答", "split": "train"},
        {"query": "桂枝有哪些功效？", "response": "解肌", "split": "train"},
        {"messages": turns("先说说别的", "好的", "哪一味药善于发汗解表宣肺平喘？", "麻黄")},
        {"prompt": "麻黄有哪些功效?", "chosen": "好", "rejected": "坏", "split": "train"},
    )
    exam = write_lines(
        tmp_path / "exam.json",
        {
            "question": "哪一味药善于发汗解表、宣肺平喘？",
            "answer": "A",
            "options": {"A": "麻黄", "B": "石膏"},
        },
    )
    found = convert(told, exam, eval_share=0)
    assert [(row["line"], row["reason"], row["detail"]) for row in found["set_aside"]] == [
        (2, "evaluation leak", "of told.jsonl:1"),
        (4, "evaluation leak", "of told.jsonl:3"),
        (6, "exam leak", "of exam.json:1"),
        (7, "evaluation leak", "of told.jsonl:1"),
    ]
    assert [row["messages"][0]["content"] for row in found["sft_train"]] == ["桂枝有哪些功效？"]
    assert len(found["sft_eval"]) == 2


@pytest.mark.slow
def test_order_of_the_rows_changes_nothing(tmp_path, convert):
    rows = [
        {"query": f"{CASE[: number % 7 + 30]}第{number}问", "response": f"答{number % 50}"}
        for number in range(150)
    ]
    rows += [{"query": row["query"] + "呢？", "response": row["response"]} for row in rows[:30]]
    rows += [dict(zip(("prompt", "chosen", "rejected"), (row["query"], "好", "坏"))) for row in rows[:40]]
    splits = []
    for seed in (1, 2):
        random.Random(seed).shuffle(rows)
        found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.2)
        splits.append({name: {row["id"] for row in found[name]} for name in OUTPUTS})
    assert splits[0] == splits[1] and splits[0]["sft_eval"] and splits[0]["dpo_eval"]
    other = convert(tmp_path / "a.jsonl", eval_share=0.2, seed=5)
    assert {row["id"] for row in other["sft_eval"]} != splits[0]["sft_eval"]
    held_out = {row["messages"][0]["content"] for row in other["sft_eval"]}
    assert not held_out & {row["prompt"][0]["content"] for row in other["dpo_train"]}


@pytest.mark.slow
def test_signatures_find_what_overlaps():
    chance = random.Random(0)
    texts = [
        "".join(chance.choices("甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥", k=60)) for _ in range(300)
    ]
    texts += [text[:57] + "金木水" for text in texts[:100]]
    close = {
        (one, other)
        for one in range(400)
        for other in range(one + 1, 400)
        if overlap(texts[one], texts[other]) >= 0.85
    }
    marks = signatures(texts)
    assert (marks == signatures(texts[:7] + texts[7:])).all()
    found = set(zip(*candidate_pairs(marks, 0.85)))
    assert len(close) == 100 and len(close & found) >= 98 and len(found) < 200
