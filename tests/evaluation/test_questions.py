"""Answers in full: conversations are those of chat, cautions are judged by themselves, training rows are told."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from evaluation_files import ASKED, EXAM, WITH, WITHOUT, assistant, user

from utils.data.pairs import Terms
from utils.evaluation.measure import generated_answers, seen_in_training
from utils.evaluation.metrics import Results, differences, metrics
from utils.evaluation.questions import (
    Question,
    ask_in_conversations,
    caution_questions,
    judge,
    parts_of,
    repetition,
    states_facts,
    states_one_of,
)
from utils.evaluation.questions import Tests as AllTests
from utils.evaluation.report import make_comparison
from utils.files import read_jsonl, sha256_of, write_json, write_jsonl
from utils.model.chat_format import encode_prompt
from utils.model.folder import load_model, load_tokenizer
from utils.model.generate import stop_tokens

TERMS = Terms(ROOT / "data_prepare/sample/terms.jsonl")


def question(number, *before):
    item = EXAM[number]
    return Question("answer", "heldout", item["id"], [*before, user(item["question"])], "药性是温。")


# ---- Second and fourth questions


def test_conversations_hold_the_answers_that_the_model_gave_in_them():
    asked = []

    def ask(questions, label):
        asked.append(questions)
        return [{"answer": f"{len(turn.messages)} {turn.messages[-1]['content']}"} for turn in questions]

    firsts = [question(number, {"role": "system", "content": "简短。"}) for number in range(5)]
    later = question(5, user("甘草？"), assistant("平。"))  # it came with a conversation of its own
    alone = [
        {"answer": f"1 {first.messages[-1]['content']}", "right": n == 3} for n, first in enumerate(firsts)
    ]
    results = ask_in_conversations(ask, [*firsts, later], [*alone, {}], 9)
    places = [turn.about for turns in asked for turn in turns]
    assert places == ["second"] * 5 + ["third"] * 5 + ["fourth"] * 5
    texts, talk = [EXAM[number]["question"] for number in range(5)], asked[2][3]
    said = [
        "简短。",
        texts[0],
        f"1 {texts[0]}",
        texts[1],
        f"4 {texts[1]}",
        texts[2],
        f"6 {texts[2]}",
        texts[3],
    ]
    assert [message["content"] for message in talk.messages] == said
    assert talk.id == EXAM[3]["id"] and talk.alone is True and asked[2][0].alone is False
    assert len(results) == 10  # the third answers are only on the way
    assert ask_in_conversations(ask, firsts[:3], alone, 9) == []


def test_the_second_answer_is_what_transformers_generates(folder):
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), torch.float32).eval()
    rows = [
        {"id": item["id"], "messages": [user(item["question"]), assistant("药性是温。")]} for item in EXAM[:4]
    ]
    limits = dict(GENERATE=4, FOLLOW_UPS=4, SEED=0, MAX_NEW_TOKENS=5, BATCH_SIZE=3, THINKING="off")
    tests = AllTests(rows, [], [], [], TERMS)
    _, results = generated_answers(model, tokenizer, tests, SimpleNamespace(**limits))
    said = {item["question"]: item["answer"] for item in results if item["about"] == "heldout"}
    second = [item for item in results if item["about"] == "second"]
    assert len(said) == len(second) == 4
    for item in second:
        [before] = item["before"]
        ids = encode_prompt(tokenizer, [user(before), assistant(said[before]), user(item["question"])], False)
        stop = sorted(stop_tokens(model, tokenizer))
        limits = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": stop}
        answer = model.generate(torch.tensor([ids]), **limits)[0, len(ids) :]
        assert item["answer"] == tokenizer.decode(answer, skip_special_tokens=True).lstrip("\n")


# ---- Cautions


def test_the_caution_is_judged_word_for_word():
    asked = Question("caution", "wanted", "0", ASKED, WITH)
    for answer, said, right in (
        (WITH, True, True),
        (WITHOUT, False, False),
        ("发汗。使用注意：孕妇忌用。", True, False),
        ("使用注意：", True, False),
    ):
        found = judge(asked, answer, [1], True, TERMS)
        assert (found["caution"], found["right"]) == (said, right)


def test_facts_are_counted_fairly_where_a_caution_is_there():
    asked = Question("answer", "heldout", "0", ASKED, WITHOUT)
    # a row whose own answer holds a caution asks for it
    own = asked._replace(reference=WITH.replace("孕妇慎用", "阴虚有火者忌服"))
    for one, answer, right in (
        (asked, WITHOUT, True),
        (asked, WITH, True),
        (asked, "麻黄的功效是清热。使用注意：孕妇慎用。", False),
        (own, WITHOUT, False),
    ):
        assert judge(one, answer, [1], True, TERMS)["right"] is right
    assert parts_of(WITH) == (WITHOUT, "孕妇慎用") and parts_of(WITHOUT) == (WITHOUT, "")


def test_questions_about_cautions_are_those_of_pairs_that_differ_in_one():
    pairs = []
    for chosen, rejected in ((WITH, WITHOUT), (WITHOUT, WITH), (WITHOUT, "温。"), (WITH, WITH)):
        answers = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        pairs.append({"id": str(len(pairs)), "prompt": ASKED, **answers})
    found = [(one.id, one.about) for one in caution_questions(pairs)]
    assert found == [("0", "wanted"), ("1", "unasked")]


# ---- In the table


def answered(about, test="follow_up", **fields):
    return {"test": test, "about": about, "right": False, "alone": None, "caution": False, **fields}


LOSS = {"test": "heldout", "id": "0", "loss": 1.0, "tokens": 2}


def test_what_stays_right_is_of_what_was_right_alone():
    cases = [(True, True), (False, True), (True, False), (True, None)]
    items = [answered("second", right=right, alone=alone) for right, alone in cases]
    items += [answered("wanted", "caution", right=right, caution=True) for right in (True, False)]
    items += [
        answered("unasked", "caution", right=None, caution=said) for said in (True, False, False, False)
    ]
    one = Results("x", 1.0, 1.0, [*items, LOSS])
    found = metrics(one)
    assert (found["second_accuracy"], found["second_n"]) == (0.75, 4)
    assert (found["second_kept_accuracy"], found["second_kept_n"]) == (0.5, 2)
    assert (found["caution_said"], found["caution_accuracy"], found["caution_unasked"]) == (1.0, 0.5, 0.25)
    assert found["caution_n"] == 2 and found["caution_unasked_n"] == 4 and "fourth_accuracy" not in found
    other = Results("y", 1.0, 1.0, [*(item | {"alone": True} for item in items), LOSS])
    assert "second" in differences(one, other) and "second_kept" not in differences(one, other)


def test_samples_come_out_as_most_of_their_kind_do():
    def heldout(number, kind, right=True):
        texts = {"question": f"问{number}", "reference": "答", "answer": f"说{number}", "before": []}
        return answered(
            "heldout",
            "answer",
            right=right,
            kind=kind,
            tokens=1,
            ended=True,
            repetition=0,
            named=None,
            **texts,
        )

    kinds = ["herb.nature", "herb.nature", "herb.actions", "formula", "herb.nature"]
    items = [heldout(number, kind, right=number > 0) for number, kind in enumerate(kinds)]
    follow_up = heldout(9, "") | {"test": "follow_up", "about": "second", "before": ["问8"]}
    measured = {"base": Results("x", 1.0, 1.0, [*items, follow_up, LOSS])}
    wanted = ["问1 (as 2 of 3 of its kind)", "问2 (as 1 of 1 of its kind)", "问3 (as 1 of 1 of its kind)"]
    wanted += ["问4 (as 2 of 3 of its kind)", "问9 (second question, after 问8; as 1 of 1 of its kind)"]
    for show, expected in ((4, wanted), (0, [])):
        settings = SimpleNamespace(SHOW=show, as_dict=dict)
        samples = make_comparison(measured, settings, "cpu", {}, [])["samples"]
        assert [sample["question"] for sample in samples] == expected


# ---- Rows that a model has seen


def test_held_out_questions_that_are_training_rows_are_told(tmp_path):
    rows = [{"id": f"{n}", "messages": [user(f"问{n}"), assistant("答")]} for n in range(6)]
    pairs = [{"id": "p", "prompt": [user("问p")], "chosen": [assistant("答")], "rejected": [assistant("否")]}]

    def run_of(name, trained, base="nowhere", damaged=False):
        path, folder = tmp_path / f"{name}.jsonl", tmp_path / name
        write_jsonl(path, trained)
        digest = "another" if damaged else sha256_of(path)
        settings = {"MODEL": str(base), "TRAIN_FILE": str(path)}
        record = {"status": "finished", "settings": settings, "identity": {"TRAIN_FILE": f"sha256 {digest}"}}
        write_json(folder / "run.json", record | {"results": {}})
        return str(folder)

    sft = run_of("sft", rows[:3])
    folders = {"base": str(tmp_path), "sft": sft, "dpo": run_of("dpo", pairs, sft)}
    folders |= {"other": run_of("other", rows[4:]), "changed": run_of("changed", rows, damaged=True)}
    warnings = seen_in_training(folders, SimpleNamespace(heldout=rows[1:4], pairs=pairs))
    assert [warning.split(" held-out")[0] for warning in warnings] == ["2 of 4", "3 of 4"]
    assert "training rows of sft" in warnings[0] and "training rows of dpo" in warnings[1]


# ---- What is right


def test_a_number_in_an_answer_stands_by_itself():
    for answer, accept in (("最小的质数是2。", ["2"]), ("是二", ["2", "二"]), ("THANK you!", ["Thank you"])):
        assert states_one_of(answer, accept)
    for answer, accept in (("1024", ["2"]), ("十二个", ["2", "二"]), ("", ["2"])):
        assert not states_one_of(answer, accept)


def test_general_questions_are_not_about_chinese_medicine_and_do_not_give_the_answer_away():
    terms = [term for term in TERMS.kinds if len(term) > 1]
    path = ROOT / "data_prepare/sample/general_questions.jsonl"
    rows = list(read_jsonl(path, ["id", "question", "answer", "accept"]))
    assert len(rows) >= 60
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert states_one_of(row["answer"], row["accept"]), row
        assert not states_one_of(row["question"], row["accept"]), row
        assert not [term for term in terms if term in row["question"] + row["answer"]], row


def test_repetition_is_the_share_of_runs_said_before():
    assert repetition([1, 2, 3, 4, 5]) == repetition([1, 2, 3]) == repetition([]) == 0
    assert repetition([1] * 8) == 1 - 1 / 5


@pytest.mark.parametrize(
    "question, reference, answer, named, right",
    [
        ("麻黄的药性是什么？", "麻黄的药性是温。", "麻黄性温。", True, True),
        ("麻黄的药性是什么？", "麻黄的药性是温。", "麻桂的药性是温。", False, False),  # 麻桂 is no term
        ("麻黄的药性是什么？", "麻黄的药性是温。", "黄芩的药性是温。", False, False),
        ("麻黄的药性是什么？", "麻黄的药性是温。", "温。", False, False),
        ("麻黄的药性是什么？\n请只写出答案。", "温。", "温。", None, True),
        ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝组成。", "麻黄由麻黄、桂枝组成。", False, False),
        ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝组成。", "麻黄汤由桂枝组成。", True, False),
        ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝组成。", "麻黄汤由麻黄、桂枝组成。", True, True),
        ("麻黄的药性偏寒还是偏温？", "麻黄性温。", "麻黄性寒。", True, False),
        ("麻黄好吗？", "好。", "好。", None, None),
    ],
)
def test_an_answer_states_the_facts_and_names_of_the_reference(question, reference, answer, named, right):
    assert states_facts(TERMS, reference, answer, question) == (named, right)
