"""Preference pairs: never the same answer twice, lengths alike, every row accounted for, the split kept."""

import random

import pytest
from conftest import ROOT
from tiny_model import make_tiny_model

from data_prepare import build_preference_pairs
from utils.data.pairs import agreement
from utils.data.terms import Terms
from utils.errors import run
from utils.files import read_jsonl, write_jsonl

ROWS = [
    ("麻黄的药性是什么？", "温。"),
    ("麻黄归哪些经？", "肺、膀胱经。"),
    ("麻黄汤由哪些药组成？", "麻黄汤由麻黄、桂枝、苦杏仁、甘草组成。"),
    ("合谷穴属于哪条经脉？", "手阳明大肠经。"),
    ("今天天气如何？", "今天天气很好。"),
    ("桂枝有哪些功效？", "桂枝能发汗解肌、温通经脉。"),
]


@pytest.fixture
def data(tmp_path):
    for split in ("train", "eval"):
        write_jsonl(
            tmp_path / f"sft_{split}.jsonl",
            [
                {
                    "id": f"{split}-{number}",
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ],
                }
                for number, (question, answer) in enumerate(ROWS)
            ],
        )
    return tmp_path


def build(data, *arguments):
    return run(
        lambda: build_preference_pairs.main(
            ["--input-dir", str(data), "--output-dir", str(data), *map(str, arguments)]
        )
    )


@pytest.mark.parametrize("kind", ["facts", "mismatch"])
def test_pairs_differ_are_alike_in_length_and_keep_the_split(data, capsys, kind):
    assert build(data, "--kind", kind) == 0
    said = capsys.readouterr().out
    for split in ("train", "eval"):
        pairs = list(read_jsonl(data / f"dpo_{split}.jsonl"))
        assert f"{split}: {len(ROWS)} rows = {len(pairs)} pairs + {len(ROWS) - len(pairs)} not paired" in said
        assert {pair["id"].split("-")[0] for pair in pairs} == {split}
        for pair in pairs:
            good, bad = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
            assert good != bad and bad and abs(len(good) - len(bad)) <= max(1, 0.2 * len(good))
            assert (pair["prompt"][-1]["content"], good) in ROWS and pair["kind"] == kind
    if kind == "facts":
        assert "no known term in the answer" in said  # the weather is not medicine


def test_the_same_command_makes_the_same_pairs(data, capsys):
    assert build(data) == 0
    before = (data / "dpo_train.jsonl").read_bytes()
    assert build(data) == 0
    assert (data / "dpo_train.jsonl").read_bytes() == before
    assert build(data, "--seed", 1) == 0
    assert (data / "dpo_train.jsonl").read_bytes() != before


@pytest.mark.slow
def test_answers_of_a_model_that_knows_nothing_are_worse(data, tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "model")
    assert build(data, "--kind", "model", "--model", folder, "--max-new-tokens", 8, "--samples", 2) == 0
    for pair in read_jsonl(data / "dpo_train.jsonl"):
        good, bad = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert agreement(good, bad) < 0.8


def test_swaps_are_wrong_answers_of_the_same_kind():
    terms = Terms(ROOT / "data_prepare/sample/terms.jsonl")
    named = {
        terms.swap("血海穴属于足太阴脾经。", "血海穴属于哪条经脉？", random.Random(seed))
        for seed in range(30)
    }
    assert all(
        wrong.endswith("穴属于足太阴脾经。") and len(set("血海") & set(wrong)) == 1 for wrong, _ in named
    )  # such as 照海
    bare = {terms.swap("足太阴脾经。", "血海穴属于哪条经脉？", random.Random(seed)) for seed in range(30)}
    assert all(
        wrong != "足太阴脾经。" and wrong in {f"{term}。" for term in terms.by_kind["acupoint.meridian"]}
        for wrong, _ in bare
    )
    assert len(named) > 1 and len(bare) > 1


def test_agreement():
    assert agreement("清热解毒", "清热解毒") == 1
    assert agreement("清热解毒", "补气养血") == 0
    assert 0 < agreement("清热解毒", "清热凉血") < 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kind", "opinion"], "--kind: wanted one of facts, mismatch, model, got 'opinion'"),
        (["--input-dir", "nowhere"], "make it with: python data_prepare/convert_to_qwen3_format.py"),
        (["--terms-file", "nowhere"], "make it with: python data_prepare/sample/make_sample.py"),
    ],
)
def test_wrong_input_is_one_line(data, capsys, arguments, message):
    assert build(data, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1


def test_no_pair_at_all_is_said(data, capsys):
    write_jsonl(
        data / "sft_train.jsonl",
        [
            {
                "id": "1",
                "messages": [
                    {"role": "user", "content": "天气？"},
                    {"role": "assistant", "content": "很好。"},
                ],
            }
        ],
    )
    assert build(data) == 2
    assert "no pair could be made" in capsys.readouterr().err and not (data / "dpo_train.jsonl").exists()
