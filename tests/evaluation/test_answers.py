"""Answers in full: conversations are those of chat, cautions are judged by themselves, training rows are told."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from evaluation_files import EXAM, compare, make_arguments

from utils.data.texts import Terms
from utils.evaluation.answers import (
    Question,
    ask_in_conversations,
    caution_questions,
    generated_answers,
    judge,
    parts_of,
    repetition,
    same_facts,
    same_names,
    states_one_of,
)
from utils.evaluation.measure import seen_in_training
from utils.evaluation.metrics import Results, differences, metrics
from utils.evaluation.questions import Tests
from utils.evaluation.report import make_comparison
from utils.files import read_json, sha256_of, write_json, write_jsonl
from utils.model.chat_format import encode_prompt
from utils.model.folder import load_model, load_tokenizer
from utils.model.generate import stop_tokens

TERMS = Terms(ROOT / "data_prepare/sample/terms.jsonl")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


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
    assert [turn.about for turns in asked for turn in turns] == ["second"] * 5 + ["third"] * 5 + [
        "fourth"
    ] * 5
    texts = [EXAM[number]["question"] for number in range(5)]
    talk = asked[2][3]
    assert [message["content"] for message in talk.messages] == [
        *("简短。", texts[0], f"1 {texts[0]}", texts[1], f"4 {texts[1]}", texts[2], f"6 {texts[2]}", texts[3])
    ]
    assert talk.id == EXAM[3]["id"] and talk.alone is True and asked[2][0].alone is False
    assert len(results) == 10  # the third answers are only on the way
    assert ask_in_conversations(ask, firsts[:3], alone, 9) == []


def test_the_second_answer_is_what_transformers_generates(folder):
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), torch.float32).eval()
    rows = [
        {"id": item["id"], "messages": [user(item["question"]), assistant("药性是温。")]} for item in EXAM[:4]
    ]
    limits = {
        "GENERATE": 4,
        "FOLLOW_UPS": 4,
        "SEED": 0,
        "MAX_NEW_TOKENS": 5,
        "BATCH_SIZE": 3,
        "THINKING": "off",
    }
    tests = Tests(rows, [], [], [], TERMS)
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

WITH, WITHOUT = "麻黄的功效是发汗解表。使用注意：孕妇慎用。", "麻黄的功效是发汗解表。"
ASKED = [user("麻黄有哪些功效？")]


@pytest.mark.parametrize(
    "answer, said, right",
    [
        (WITH, True, True),
        (WITHOUT, False, False),
        ("发汗。使用注意：孕妇忌用。", True, False),
        ("使用注意：", True, False),
    ],
)
def test_the_caution_is_judged_word_for_word(answer, said, right):
    asked = Question("caution", "wanted", "0", ASKED, WITH)
    found = judge(asked, answer, [1], True, TERMS)
    assert (found["caution"], found["right"]) == (said, right)


def test_facts_are_counted_fairly_where_a_caution_is_there():
    asked = Question("answer", "heldout", "0", ASKED, WITHOUT)
    assert (
        judge(asked, WITHOUT, [1], True, TERMS)["right"]
        is judge(asked, WITH, [1], True, TERMS)["right"]
        is True
    )
    assert judge(asked, "麻黄的功效是清热。使用注意：孕妇慎用。", [1], True, TERMS)["right"] is False
    # a row whose own answer holds one asks for it
    asked = asked._replace(reference=WITH.replace("孕妇慎用", "阴虚有火者忌服"))
    assert judge(asked, WITHOUT, [1], True, TERMS)["right"] is False
    assert parts_of(WITH) == (WITHOUT, "孕妇慎用") and parts_of(WITHOUT) == (WITHOUT, "")


def test_questions_about_cautions_are_those_of_pairs_that_differ_in_one():
    def pair(number, chosen, rejected):
        answers = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        return {"id": number, "prompt": ASKED, **answers}

    pairs = [
        pair("0", WITH, WITHOUT),
        pair("1", WITHOUT, WITH),
        pair("2", WITHOUT, "温。"),
        pair("3", WITH, WITH),
    ]
    assert [(found.id, found.about) for found in caution_questions(pairs)] == [
        ("0", "wanted"),
        ("1", "unasked"),
    ]


# ---- In the table


def answered(about, test="follow_up", **fields):
    return {"test": test, "about": about, "right": False, "alone": None, "caution": False, **fields}


def test_what_stays_right_is_of_what_was_right_alone():
    loss = {"test": "heldout", "id": "0", "loss": 1.0, "tokens": 2}
    cases = [(True, True), (False, True), (True, False), (True, None)]
    items = [answered("second", right=right, alone=alone) for right, alone in cases]
    items += [answered("wanted", "caution", right=right, caution=True) for right in (True, False)]
    items += [
        answered("unasked", "caution", right=None, caution=said) for said in (True, False, False, False)
    ]
    one = Results("x", 1.0, 1.0, [*items, loss])
    found = metrics(one)
    assert (found["second_accuracy"], found["second_n"]) == (0.75, 4)
    assert (found["second_kept_accuracy"], found["second_kept_n"]) == (0.5, 2)
    assert (found["caution_said"], found["caution_accuracy"], found["caution_unasked"]) == (1.0, 0.5, 0.25)
    assert found["caution_n"] == 2 and found["caution_unasked_n"] == 4 and "fourth_accuracy" not in found
    other = Results("y", 1.0, 1.0, [*(item | {"alone": True} for item in items), loss])
    assert "second" in differences(one, other) and "second_kept" not in differences(one, other)


def test_samples_are_the_first_of_each_kind():
    def heldout(number, kind):
        texts = {"question": f"问{number}", "reference": "答", "answer": f"说{number}", "before": []}
        return answered(
            "heldout", "answer", kind=kind, tokens=1, ended=True, repetition=0, named=None, **texts
        )

    kinds = ["herb.nature", "herb.nature", "herb.actions", "formula", "herb.nature"]
    items = [heldout(number, kind) for number, kind in enumerate(kinds)]
    follow_up = heldout(9, "") | {"test": "follow_up", "about": "second", "before": ["问8"]}
    loss = {"test": "heldout", "id": "0", "loss": 1.0, "tokens": 2}
    measured = {"base": Results("x", 1.0, 1.0, [*items, follow_up, loss])}

    def questions(show):
        settings = SimpleNamespace(SHOW=show, as_dict=dict)
        return [
            sample["question"] for sample in make_comparison(measured, settings, "cpu", {}, [])["samples"]
        ]

    assert questions(4) == ["问0", "问2", "问3", "问1", "问8 / 问9"] and questions(0) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_conversations_and_cautions_are_in_the_report(folder, tmp_path, capsys, precision):
    arguments = make_arguments(tmp_path)
    answers = [(WITH, WITHOUT), (WITHOUT, WITH)]
    write_jsonl(
        tmp_path / "dpo_eval.jsonl",
        [
            {
                "id": f"{n}",
                "prompt": ASKED,
                "chosen": [assistant(good)],
                "rejected": [assistant(bad)],
                "kind": "",
            }
            for n, (good, bad) in enumerate(answers)
        ],
    )
    assert compare("--models", folder, *arguments, "--follow-ups", 5, "--precision", precision) == 0
    found = read_json(tmp_path / "out/comparison.json")["models"]["base"]
    assert (found["second_n"], found["fourth_n"], found["caution_n"], found["answers_n"]) == (5, 5, 1, 90)
    told = (tmp_path / "out/comparison.md").read_text(encoding="utf-8")
    for text in (capsys.readouterr().out, told):
        assert "| second question" in text and "| caution where not asked" in text
    assert "- 5 of the held-out questions once more" in told


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


def test_repetition_is_the_share_of_runs_said_before():
    assert repetition([1, 2, 3, 4, 5]) == repetition([1, 2, 3]) == repetition([]) == 0
    assert repetition([1] * 8) == 1 - 1 / 5


@pytest.mark.parametrize(
    "question, reference, answer, named, facts",
    [
        ("麻黄的药性是什么？", "麻黄的药性是温。", "麻黄性温。", True, True),
        # no term: facts alone let it pass
        ("麻黄的药性是什么？", "麻黄的药性是温。", "麻桂的药性是温。", False, True),
        ("麻黄的药性是什么？", "麻黄的药性是温。", "黄芩的药性是温。", False, False),
        ("麻黄的药性是什么？", "麻黄的药性是温。", "温。", False, True),
        ("麻黄的药性是什么？\n请只写出答案。", "温。", "温。", None, True),
        ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝组成。", "麻黄由麻黄、桂枝组成。", False, True),
        ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝组成。", "麻黄汤由桂枝组成。", True, False),
        ("麻黄的药性偏寒还是偏温？", "麻黄性温。", "麻黄性寒。", True, False),
    ],
)
def test_an_answer_has_to_name_what_the_reference_names(question, reference, answer, named, facts):
    assert same_names(TERMS, reference, answer, question) is named
    assert same_facts(TERMS, reference, answer, question) is facts
