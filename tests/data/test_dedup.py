"""Duplicates go, leaks are found, a question goes to one split whole, and a share of any set is held out."""

import random

import pytest
from data_rows import CASE, turns, write_lines

from utils.data.convert import EVAL, EXAM, TRAIN, Row, is_courtesy, normalize
from utils.data.dedup import (
    assign_splits,
    candidate_pairs,
    differ_in_fact,
    overlap,
    shingles,
    signatures,
)  # fmt: skip
from utils.data.schemas import OUTPUTS

WORDS = (
    "麻黄桂枝芍药甘草生姜大枣石膏知母粳米人参半夏黄芩柴胡厚朴枳实大黄芒硝茯苓白术泽泻猪苓附子干姜细辛五味子"
)
INSTRUCTION = "请你以一名有三十年临床经验的中医主任医师的身份，根据下面的病情，先辨证，再立法，最后给出方药，并说明煎服方法："


def words(number, length):
    chance = random.Random(number)
    return "".join(chance.choice(WORDS) + ("，" if chance.random() < 0.1 else "") for _ in range(length))


def questions_of(rows):
    return [row["messages"][0]["content"] for row in rows]


# ---- Texts as they are compared


@pytest.mark.parametrize(
    "one, other, equal",
    [
        ("麻黄，1.5克？", "麻黄15克", False), ("麻黄 １５ 克", "麻黄15克", True), ("10㎎", "10mg", True),
        ("ＡＢＣ、甲", "abc甲", True), ("血糖>7", "血糖<7", False), ("①…，①", "11", True), ("3-5天", "35天", False),
        ("10％", "10%", True),
    ],
)  # fmt: skip
def test_normalise(one, other, equal):
    assert (normalize(one) == normalize(other)) == equal


@pytest.mark.parametrize(
    "courtesy, texts",
    [
        (True, ["医生你好", "在吗？", "你好医生，我想咨询一下", "谢谢医生的解答！", "我会注意的，感谢。", "Hello!", "辛苦了，医生"]),
        (True, ["不客气，祝您早日康复，如有需要随时咨询我。", "好的，我知道了，谢谢您的耐心解答。", "不用谢，这是我应该做的。"]),
        (False, ["谢谢，那需要注意什么？", "您好，请问哪里不舒服？", "你好，麻黄汤治什么病", "在吗，我头痛三天了", "辛、苦。", "是"]),
        (False, ["好的，建议检查肝功能，注意休息。", "谢谢，这个病会传染吗", "健康人的脉象", "请继续", "我想问一下感冒"]),
    ],
)  # fmt: skip
def test_courtesies(courtesy, texts):
    assert [text for text in texts if is_courtesy(text) != courtesy] == []


@pytest.mark.parametrize(
    "one, other, differ",
    [
        ("便血无，腹痛3天", "便血伴，腹痛3天", True), ("体温37.5度", "体温38.5度", True), ("头痛三年", "头痛两年", True),
        ("左膝疼痛", "右膝疼痛", True), ("舌淡，脉沉", "舌淡，脉浮", True), ("恶风畏寒", "恶风怕寒", False),
        ("有发热，有汗", "有汗，有发热", False),
    ],
)  # fmt: skip
def test_numbers_and_negations_make_another_question(one, other, differ):
    assert differ_in_fact(one, other) == differ


@pytest.mark.slow
def test_signatures_find_what_overlaps():
    chance = random.Random(0)
    texts = ["".join(chance.choices(WORDS, k=60)) for _ in range(300)]
    texts += [text[:57] + "金木水" for text in texts[:100]]
    pairs = [(one, other) for one in range(400) for other in range(one + 1, 400)]
    close = {pair for pair in pairs if overlap(*(shingles(texts[number]) for number in pair)) >= 0.85}
    marks = signatures(texts)
    assert (marks == signatures(texts[:7] + texts[7:])).all()
    found = {divmod(pair, 400) for pair in candidate_pairs(marks, 0.85).tolist()}
    assert len(close) == 100 and len(close & found) >= 98 and len(found) < 200


# ---- Duplicates and leaks


def rows_of(*told):
    """Rows of (question, answer) or (question, answer, split)."""
    return [dict(zip(("query", "response", "split"), row)) for row in told]


def test_template_questions_all_survive_and_own_splits_are_honoured(tmp_path, convert):
    herbs = "麻黄 桂枝 生姜 地黄 生地黄 熟地黄 白芍 赤芍 当归 川芎 人参 党参 丹参 玄参".split()
    templates = (
        "{}的性味是什么？", "{}归哪些经？", "请问{}有哪些功效？",
        "在中药学里，{}这味药属于哪一类，请用一句话回答，并说明它主要用于哪些证候？",
        "请以一名经验丰富的中医师的身份，详细而有条理地说明中药{}的性味、归经、功效、主治、用法用量以及使用注意，不要遗漏任何一项内容。",
    )  # fmt: skip
    asked = [(form, herb, "eval" if herb in herbs[1:3] else "train") for herb in herbs for form in templates]
    # A short answer that two herbs share makes no duplicate of their questions.
    for answer in ("{}：答案。", "温"):
        rows = rows_of(
            *((form.format(herb), answer.format(herb + form[-5:]), split) for form, herb, split in asked)
        )
        found = convert(write_lines(tmp_path / "s.jsonl", *rows))
        assert not found["set_aside"] and len(found["sft_eval"]) == 2 * len(templates)


ANSWER = "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减。"
RECORD = f"{CASE}，便血无，体温36.8度，脉搏每分钟72次"
OTHERS = RECORD.replace("便血无", "便血伴"), RECORD.replace("36.8", "38.6")
REPEATED = [  # rows, and (line, reason, line of the other) of those that are set aside
    (rows_of(("甲？", "一"), ("甲", "二"), ("ＴＣＭ是什么？", "中医"), ("请问 tcm 是什么呢", "中医。"), ("甲？", "一")),
     [(3, "near-duplicate", 4), (5, "exact duplicate", 1)]),
    # other patients are no duplicates, whatever their answers
    (rows_of(*((asked, ANSWER) for asked in (RECORD, *OTHERS)), (f"医生，{RECORD}。", ANSWER[:-1])), [(1, "near-duplicate", 4)]),
    # traditional twins are the same question
    (rows_of(("麻黄湯的組成和功效是什麼？", "由麻黃、桂枝等組成。", "test"), ("麻黄汤的组成和功效是什么？", "由麻黄、桂枝等组成。", "train"),
             ("當歸補血湯治療什麼證候？", "血虛發熱證。", "train"), ("当归补血汤治疗什么证候？", "血虚发热证。", "train")),
     [(2, "evaluation leak", 1), (4, "near-duplicate", 3)]),
]  # fmt: skip


@pytest.mark.parametrize("rows, aside", REPEATED)
def test_repeated_rows_are_set_aside(tmp_path, convert, rows, aside):
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0)
    told = [(row["line"], row["reason"], row["detail"]) for row in found["set_aside"]]
    assert sorted(told) == [(line, reason, f"of a.jsonl:{other}") for line, reason, other in aside]


@pytest.mark.slow
def test_one_question_is_on_one_side(tmp_path, convert):
    rows = rows_of(
        (CASE, ANSWER), (f"医生，{CASE}，怎么办？急！", ANSWER[:-1]), (CASE.replace("畏寒", "怕寒"), ANSWER[:-1] + "！"),
        (CASE.replace("浮紧", "沉细"), "阳虚头痛。"), ("问题7怎么办？", "一个回答"), ("问题7怎么办", "另一个回答"),
        *((f"第{number}个问题", f"答{number}") for number in range(20)),
    )  # fmt: skip
    path = write_lines(tmp_path / "a.jsonl", *rows)
    for seed in range(8):  # the two that differ in a swapped word and in the answer stay, on one side
        found = convert(path, eval_share=0.5, seed=seed)
        assert sorted(row["reason"] for row in found["set_aside"]) == ["near-duplicate", "near-duplicate"]
        sides = [questions_of(found[name]) for name in ("sft_train", "sft_eval")]
        for words in (CASE[:20], "问题7"):
            assert sorted(sum(words in question for question in side) for side in sides) == [0, 2]
        assert 10 <= len(sides[1]) <= 14
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
        {"messages": turns("医生您好", "请说。", "桂枝和麻黄有什么不同？", "解肌。"), "split": "test"},
        {"messages": turns("医生您好", "请说。", "石膏有哪些功效？", "清热。"), "split": "train"},
    )
    options = {"A": "麻黄", "B": "石膏"}
    item = {"question": "哪一味药善于发汗解表、宣肺平喘？", "answer": "A", "options": options}
    found = convert(told, write_lines(tmp_path / "exam.json", item), eval_share=0)
    asides = [(row["line"], row["reason"], row["detail"]) for row in found["set_aside"]]
    assert asides == [
        (2, "evaluation leak", "of told.jsonl:1"), (4, "evaluation leak", "of told.jsonl:3"),
        (6, "exam leak", "of exam.json:1"), (7, "evaluation leak", "of told.jsonl:1"),
    ]  # fmt: skip
    assert questions_of(found["sft_train"]) == ["桂枝有哪些功效？", "医生您好"]
    assert len(found["sft_eval"]) == 3


def test_answers_of_held_out_rows_that_are_in_training_are_counted(tmp_path, convert, capsys):
    answer = "中医诊断：胃脘痛，肝胃不和证；治法：疏肝和胃，理气止痛；方药：柴胡疏肝散加减。"
    splits = ["test"] * 3 + ["train"] * 6
    rows = [{"query": words(n, 50), "response": answer, "split": split} for n, split in enumerate(splits)]
    rows += [{"query": "何为四诊？", "response": "望闻问切。", "split": split} for split in ("test", "train")]
    assert convert(write_lines(tmp_path / "a.jsonl", *rows))["report"]["eval_answers_in_training"] == 3
    assert "3  held-out answers stand word for word in training" in capsys.readouterr().out


@pytest.mark.slow
def test_order_of_the_rows_changes_nothing(tmp_path, convert):
    rows = [{"query": f"{CASE[: n % 7 + 30]}第{n}问", "response": f"答{n % 50}"} for n in range(150)]
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
    asked = {row["prompt"][0]["content"] for row in other["dpo_train"]}
    assert not asked & set(questions_of(other["sft_eval"]))


# ---- What is held out


@pytest.mark.parametrize("questions", [3, 12, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["input first", "question first"])
def test_questions_about_one_passage_stay_together(tmp_path, convert, questions, form):
    pairs = [(n, WORDS[n % 40], WORDS[(n * 7) % 40]) for n in range(questions)]
    asked = [f"第{n}问：文中所述{one}与{other}的关系如何，应怎样理解？" for n, one, other in pairs]
    rows = []
    for number in range(20):
        for n, question in enumerate(asked):
            parts = [words(number, 260), question][:: 1 if form == "input first" else -1]
            rows.append({"instruction": parts[0], "input": parts[1], "output": f"答{number}-{n}。"})
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.25)
    sides = ["".join(questions_of(found[name])) for name in ("sft_train", "sft_eval")]
    assert sides[1]
    assert not [n for n in range(20) if all(words(n, 260) in side for side in sides)]


def opened(greeting):
    return lambda n: {"messages": turns(greeting, "您好，请说。", f"{words(n, 12)}怎么治？", words(-n, 20))}


def instructed(*instructions, length=8):
    return lambda n: {
        "instruction": instructions[n % len(instructions)], "input": words(n, length), "output": f"{n}克。"
    }  # fmt: skip


# Rows by their number, how many there are, and how many of them are held out.
SETS = [
    (lambda n: {"query": f"{words(n, 6)}的功效？", "response": f"{n}"}, 30, 6),
    (lambda n: {"query": f"{words(n, 6)}的功效？", "response": f"{n}"}, 3, 1),
    (lambda n: {"query": f"{words(n, 6)}的功效？", "response": f"{n}"}, 200, 20),
    (lambda n: {"query": "今日养生小贴士", "response": words(n, 30)}, 40, 0),
    (instructed(INSTRUCTION), 90, 18),
    (instructed(INSTRUCTION, INSTRUCTION[::-1]), 90, 18),
    (instructed(INSTRUCTION, length=100), 60, 12),
    (lambda n: {"query": words(n, 12) + INSTRUCTION, "response": f"{n}"}, 60, 12),
    (lambda n: {"query": INSTRUCTION + words(n, 60), "response": f"{n}"}, 400, 20),
    (opened("医生你好"), 40, 8),
    (opened("有一件身体上的事想请您看看"), 40, 8),
    (opened(INSTRUCTION), 40, 8),
]


@pytest.mark.parametrize("row, count, held_out", SETS)
def test_a_share_of_any_set_is_held_out(tmp_path, convert, capsys, row, count, held_out):
    found = convert(write_lines(tmp_path / "a.jsonl", *map(row, range(count))))
    said = capsys.readouterr().out
    assert len(found["sft_eval"]) == held_out and len(found["sft_train"]) == count - held_out
    assert ("no row is held out" in said) == ("--eval-file ''" in said) == (held_out == 0)
    assert (f"few rows are held out ({held_out}): figures on them mean little" in said) == (held_out > 0)


def splits(kinds, groups, shares, told=()):
    """The splits dealt to rows of these kinds, of which each asks the question of its group."""
    rows = [
        Row(0, n, 0, 0, kind=kind, content=n, questions=(group,))
        for n, (kind, group) in enumerate(zip(kinds, groups))
    ]
    for row, split in zip(rows, told):
        row.told = split
    assign_splits(rows, {}, *shares)
    return [row.split for row in rows]


def test_what_rows_say_of_their_split_holds_for_their_group():
    told = (TRAIN, "", EVAL, "", TRAIN, TRAIN, TRAIN)
    kinds = ("sft", "sft", "sft", "dpo", "exam", "", "sft")
    found = splits(kinds, [0, 0, 1, 1, 1, 0, 1], (0.0, 10, 0), told)
    assert found == [TRAIN, TRAIN, EVAL, EVAL, EXAM, "", TRAIN]


def test_groups_are_held_out_whole_up_to_the_share():
    def dealt(*shares, size=2, told=()):
        return splits(["sft"] * 100, [n // size for n in range(100)], shares, told)

    split = dealt(0.2, 1000, 0)
    assert split.count(EVAL) == 20 and split[::2] == split[1::2] and set(split) == {TRAIN, EVAL}
    assert dealt(0.2, 6, 0).count(EVAL) == 6
    assert dealt(0.2, 1000, 1) != split
    assert set(dealt(0.2, 1000, 0, size=100)) == {TRAIN}  # one group is too large to be held out
    assert dealt(0.05, 1000, 0, size=25).count(EVAL) == 25  # the smallest, if all are too large
    assert dealt(0.05, 1000, 0, size=1, told=[EVAL] * 6).count(EVAL) == 6  # no more than the set names itself
    # Pairs follow the conversations of their group.
    split = splits(["sft"] * 50 + ["dpo"] * 50, [*range(50)] * 2, (0.3, 1000, 0))
    assert split[:50] == split[50:] and EVAL in split
