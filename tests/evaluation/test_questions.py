"""Answers in full: conversations are those of chat, cautions are judged by themselves, training rows are told."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from evaluation_files import ASKED, EXAM, WITH, WITHOUT, assistant, user

from utils.data.pairs import Terms
from utils.evaluation import questions
from utils.evaluation.measure import generated_answers, seen_in_training
from utils.evaluation.metrics import Results, differences, metrics
from utils.evaluation.report import make_comparison
from utils.files import read_jsonl, sha256_of, write_json, write_jsonl
from utils.model.chat_format import encode_prompt
from utils.model.folder import load_model, load_tokenizer
from utils.model.generate import stop_tokens

TERMS = Terms(ROOT / "data_prepare/sample/terms.jsonl")


def question(number, *before):
    item = EXAM[number]
    return questions.Question("heldout", item["id"], [*before, user(item["question"])], "药性是温。")


# ---- Second and fourth questions


def test_conversations_hold_the_answers_that_the_model_gave_in_them():
    asked = []

    def ask(turns, label):
        asked.append(turns)
        return [{"answer": f"{len(turn.messages)} {turn.messages[-1]['content']}"} for turn in turns]

    firsts = [question(number, {"role": "system", "content": "简短。"}) for number in range(5)]
    later = question(5, user("甘草？"), assistant("平。"))  # it came with a conversation of its own
    texts = [EXAM[number]["question"] for number in range(5)]
    alone = [{"answer": f"1 {text}", "right": n == 3} for n, text in enumerate(texts)]
    results = questions.ask_in_conversations(ask, [*firsts, later], [*alone, {}], 9)
    places = [turn.about for turns in asked for turn in turns]
    assert places == ["second"] * 5 + ["third"] * 5 + ["fourth"] * 5
    talk, answers = asked[2][3], (f"1 {texts[0]}", f"4 {texts[1]}", f"6 {texts[2]}")
    said = ["简短。", *(text for pair in zip(texts, answers) for text in pair), texts[3]]
    assert [message["content"] for message in talk.messages] == said
    assert talk.id == EXAM[3]["id"] and talk.alone is True and asked[2][0].alone is False
    assert len(results) == 10  # the third answers are only on the way
    assert questions.ask_in_conversations(ask, firsts[:3], alone, 9) == []


def test_the_second_answer_is_what_transformers_generates(folder):
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), torch.float32).eval()
    rows = [
        {"id": item["id"], "messages": [user(item["question"]), assistant("药性是温。")]} for item in EXAM[:4]
    ]
    limits = dict(GENERATE=4, FOLLOW_UPS=4, SEED=0, MAX_NEW_TOKENS=5, BATCH_SIZE=3, THINKING="off")
    tests = questions.Tests(rows, [], [], [], TERMS)
    results = generated_answers(model, tokenizer, tests, SimpleNamespace(**limits))
    said = {item["question"]: item["answer"] for item in results if item["about"] == "heldout"}
    second = [item for item in results if item["about"] == "second"]
    assert len(said) == len(second) == 4
    for item in second:
        [before] = item["before"]
        ids = encode_prompt(tokenizer, [user(before), assistant(said[before]), user(item["question"])], False)
        stop = sorted(stop_tokens(model, tokenizer))
        limits = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": stop}
        answer = model.generate(torch.tensor([ids]), **limits)[0, len(ids) :]
        whole = tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd")
        assert item["answer"] == whole.lstrip("\n")


# ---- Cautions


@pytest.mark.parametrize(
    "about, reference, answer, right",
    [
        ("wanted", WITH, WITH, True),
        ("wanted", WITH, WITHOUT, False),
        ("wanted", WITH, "发汗。使用注意：孕妇忌用。", False),
        ("wanted", WITH, "使用注意：", False),
        ("unasked", WITHOUT, WITH, None),
        # facts are counted fairly where a caution is there
        ("heldout", WITHOUT, WITHOUT, True),
        ("heldout", WITHOUT, WITH, True),
        ("heldout", WITHOUT, "麻黄的功效是清热。使用注意：孕妇慎用。", False),
        (
            "heldout",
            WITH.replace("孕妇慎用", "阴虚有火者忌服"),
            WITHOUT,
            False,
        ),  # its own caution is asked for
    ],
)
def test_a_caution_is_judged_by_itself(about, reference, answer, right):
    found = questions.judge(questions.Question(about, "0", ASKED, reference), answer, [1], True, TERMS)
    assert (found["caution"], found["right"]) == ("使用注意" in answer, right)
    assert questions.parts_of(WITH) == (WITHOUT, "孕妇慎用") and questions.parts_of(WITHOUT) == (WITHOUT, "")


def test_questions_about_cautions_are_those_of_pairs_that_differ_in_one():
    pairs = []
    for chosen, rejected in ((WITH, WITHOUT), (WITHOUT, WITH), (WITHOUT, "温。"), (WITH, WITH)):
        answers = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        pairs.append({"id": str(len(pairs)), "prompt": ASKED, **answers})
    found = [(one.id, one.about) for one in questions.caution_questions(pairs)]
    assert found == [("0", "wanted"), ("1", "unasked")]


# ---- In the table


def answered(about, **fields):
    numbers = {"tokens": 1, "ended": True, "repetition": 0, "alone": None, "caution": False}
    return {"test": "answer", "about": about, "kind": "", **numbers, "right": False, **fields}


LOSS = {"test": "heldout", "id": "0", "loss": 1.0, "tokens": 2}


def test_what_stays_right_is_of_what_was_right_alone():
    cases = [(True, True), (False, True), (True, False), (True, None)]
    items = [answered("second", right=right, alone=alone) for right, alone in cases]
    items += [answered("wanted", right=right, caution=True) for right in (True, False)]
    items += [answered("unasked", right=None, caution=said) for said in (True, False, False, False)]
    found = metrics(Results("x", items))
    assert (found["second_accuracy"], found["second_n"]) == (0.75, 4)
    assert (found["second_kept_accuracy"], found["second_kept_n"]) == (0.5, 2)
    assert (found["caution_said"], found["caution_accuracy"], found["caution_unasked"]) == (1.0, 0.5, 0.25)
    assert found["caution_n"] == 2 and found["caution_unasked_n"] == 4 and "fourth_accuracy" not in found
    other = Results("y", [item | {"alone": True} for item in items])
    found = differences(Results("x", items), other)
    assert "second" in found and "second_kept" not in found


def test_samples_are_the_first_of_each_kind_with_the_count_of_right_ones():
    def asked(number, about="heldout", **fields):
        texts = {"question": f"问{number}", "reference": "答", "answer": f"说{number}", "before": ["问8"]}
        return answered(about, **texts, **fields)

    kinds = ["herb.nature", "herb.nature", "herb.actions", "formula", "herb.nature"]
    items = [asked(number, kind=kind, right=number > 0) for number, kind in enumerate(kinds)]
    items += [asked(9, "second"), asked(10, "unasked", right=None)]
    measured = {"base": Results("x", [*items, LOSS])}
    measured["sft"] = Results("y", [*(item | {"right": True, "answer": "新"} for item in items), LOSS])
    notes = ["0 (right of 3 of its kind: base 2, sft 3)", "2 (right of 1 of its kind: base 1, sft 1)"]
    notes += ["3 (right of 1 of its kind: base 1, sft 1)", "1 (right of 3 of its kind: base 2, sft 3)"]
    others = ["9 (second question, after 问8; right of 1 of its kind: base 0, sft 1)", "10"]
    for show, expected in ((4, [*notes, *others]), (2, [*notes[:2], *others]), (0, [])):
        settings = SimpleNamespace(SHOW=show, as_dict=dict)
        samples = make_comparison(measured, settings, "cpu", {}, [])["samples"]
        assert len(samples) == len(expected)
        for sample, note in zip(samples, expected):
            assert sample["question"].startswith(f"问{note}")
            number = note.partition(" ")[0]
            assert sample["answers"] == {"reference": "答", "base": f"说{number}", "sft": "新"}


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
        assert questions.states_one_of(answer, accept)
    for answer, accept in (("1024", ["2"]), ("十二个", ["2", "二"]), ("", ["2"])):
        assert not questions.states_one_of(answer, accept)


def test_general_questions_are_not_about_chinese_medicine_and_do_not_give_the_answer_away():
    terms = [term for term in TERMS.kinds if len(term) > 1]
    path = ROOT / "data_prepare/sample/general_questions.jsonl"
    rows = list(read_jsonl(path, ["id", "question", "answer", "accept"]))
    assert len(rows) >= 60
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert questions.states_one_of(row["answer"], row["accept"]), row
        assert not questions.states_one_of(row["question"], row["accept"]), row
        assert not [term for term in terms if term in row["question"] + row["answer"]], row


def test_repetition_is_the_share_of_runs_said_before():
    assert (
        questions.repetition([1, 2, 3, 4, 5])
        == questions.repetition([1, 2, 3])
        == questions.repetition([])
        == 0
    )
    assert questions.repetition([1] * 8) == 1 - 1 / 5


@pytest.mark.parametrize(
    "question, reference, answer, right",
    [
        ("麻黄的药性是什么？", "麻黄的药性是温。", "麻黄性温。", True),
        ("麻黄的药性是什么？", "麻黄的药性是温。", "麻桂的药性是温。", False),  # 麻桂 is no term
        ("麻黄的药性是什么？", "麻黄的药性是温。", "黄芩的药性是温。", False),
        ("麻黄的药性是什么？", "麻黄的药性是温。", "温。", False),
        ("麻黄的药性是什么？\n请只写出答案。", "温。", "温。", True),
        ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝组成。", "麻黄由麻黄、桂枝组成。", False),
        ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝组成。", "麻黄汤由桂枝组成。", False),
        ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝组成。", "麻黄汤由麻黄、桂枝组成。", True),
        ("麻黄的药性偏寒还是偏温？", "麻黄性温。", "麻黄性寒。", False),
        ("麻黄好吗？", "好。", "好。", None),
    ],
)
def test_an_answer_states_the_facts_and_names_of_the_reference(question, reference, answer, right):
    assert questions.states_facts(TERMS, reference, answer, question) == right
