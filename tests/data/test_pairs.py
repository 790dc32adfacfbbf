"""Preference pairs: wrong answers that only the question gives away, every row accounted for, the split kept."""

import random
from types import SimpleNamespace

import pytest
from conftest import ROOT
from data_rows import turns
from tiny_model import make_tiny_model

from data_prepare import build_preference_pairs
from utils.data import pairs
from utils.data.pairs import Terms
from utils.errors import run
from utils.files import read_json, read_jsonl, write_json, write_jsonl
from utils.model import generate as pairs_generate

TERMS = Terms(ROOT / "data_prepare/sample/terms.jsonl")
WEATHER = ("今天天气如何？", "今天天气很好。")


def as_row(number, question, answer):
    return {"id": str(number), "messages": turns(question, answer)}


def write_rows(data, train, evaluation=()):
    for split, rows in (("train", train), ("eval", evaluation)):
        (data / f"sft_{split}.jsonl").unlink(missing_ok=True)
        if rows:
            made = (as_row(f"{split}{n}", *row) for n, row in enumerate(rows))
            write_jsonl(data / f"sft_{split}.jsonl", made)


@pytest.fixture(scope="module")
def sample_rows():
    rows = read_jsonl(ROOT / "data_prepare/sample/tcm_sample.jsonl")
    chosen = random.Random(0).sample([row for row in rows if row["split"] == "train"], 1000)
    return [(row["instruction"], row["output"]) for row in chosen] + [WEATHER]


@pytest.fixture
def data(tmp_path, sample_rows):
    write_rows(tmp_path, sample_rows[300:], [*sample_rows[:300], WEATHER])
    return tmp_path


def build(data, *arguments):
    arguments = ["--input-dir", str(data), "--output-dir", str(data), *map(str, arguments)]
    return run(lambda: build_preference_pairs.main(arguments))


def test_pairs_of_the_sample(data, capsys):
    assert build(data, "--kind", "facts") == 0
    said, report = capsys.readouterr().out, read_json(data / "dpo_report.json")
    for split in ("train", "eval"):
        made, rows = (list(read_jsonl(data / f"{name}_{split}.jsonl")) for name in ("dpo", "sft"))
        good_of = {row["id"]: row["messages"] for row in rows}
        not_paired = len(rows) - len(made)
        assert f"{split}: {len(made):,} pairs from {len(rows):,} rows, {not_paired:,} not paired" in said
        assert report[split]["pairs"] == len(made) > 0.8 * len(rows)
        assert sum(report[split]["not_paired"].values()) == not_paired
        for pair in made:
            good, bad = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
            assert good_of[pair["id"]] == [*pair["prompt"], *pair["chosen"]] and pair["kind"] == "facts"
            assert good != bad and len(good) == len(bad)
            assert not pairs.says_the_same(good, bad, pair["prompt"][-1]["content"], TERMS)
    told = report["train"]["told_apart"]
    assert told <= 0.6 and f"told apart without the question: {told:.0%}" in said
    assert "no known term between borders in the answer" in said  # the weather is not medicine
    made = (data / "dpo_train.jsonl").read_bytes()
    for seed in (0, 1):
        assert build(data, "--kind", "facts", "--seed", seed) == 0
        assert ((data / "dpo_train.jsonl").read_bytes() == made) == (seed == 0)


def test_what_tells_bad_answers_is_measured(sample_rows):
    answers = [answer for _, answer in sample_rows[:301]] * 2
    marked = [f"{answer}乌须发。" if n % 10 else answer for n, answer in enumerate(answers)]
    for good, bad, least, most in ((answers, marked, 0.85, 1), (["麻黄"] * 9, ["麻黄"] * 9, 0.5, 0.5)):
        sides = (
            {"chosen": [{"content": one}], "rejected": [{"content": two}]} for one, two in zip(good, bad)
        )
        assert least <= pairs.told_apart(list(sides)) <= most


# Of few pairs, chance explains more.
@pytest.mark.parametrize(
    "share, count, warned", [(0.83, 24, 1), (0.83, 6, 0), (0.66, 30, 0), (0.66, 50, 1), (0.6, 900, 0)]
)
def test_pairs_that_are_told_apart_are_warned_of(capsys, share, count, warned):
    lengths = {"chosen": 5.0, "rejected": 5.0}
    found = {"rows": count, "pairs": count, "not_paired": {}, "mean_characters": lengths, "told_apart": share}
    build_preference_pairs.show("train", found, ROOT)
    assert capsys.readouterr().out.count("warning: above 65% a model learns to recognise") == warned


# ---- Swapped facts


def swapped(*rows, seed=0):
    worse = pairs.swapped_facts([as_row(0, *row) for row in rows], TERMS, random.Random(seed))
    return [answer for answer, _ in worse]


def test_only_whole_terms_are_swapped():
    # holds 黄连 and 温, neither of them whole
    cut = ("何药清热？", "双黄连注射液，里急后重者用之，口服温通经脉片。")
    others = [("何药？", f"{herb}、石膏。") for herb in ("黄芩", "桂枝", "防风", "羌活")]
    for seed in range(5):
        assert swapped(cut, *others, seed=seed)[0] is None


def test_a_substitute_is_a_term_that_stands_in_such_a_place():
    herbs = ["麻黄", "桂枝", "防风", "羌活", "白芷", "细辛", "紫苏叶", "辛夷"]
    rows = [(f"第{n}方用什么药？", f"{herb}200g,{herbs[n - 3]}100g") for n, herb in enumerate(herbs)]
    for (_, good), bad in zip(rows, swapped(*rows)):
        assert bad is None or (len(bad) == len(good) and bad != good)
        for part in (bad or good).split(","):
            assert part[:-4] in herbs
    assert sum(bad is not None for bad in swapped(*rows)) >= 6


def test_what_is_right_elsewhere_is_not_wrong():
    rows = [("麻黄的功效是什么？", answer) for answer in ("发汗解表。", "宣肺平喘。", "利水消肿。")] * 3
    assert swapped(*rows) == [None] * 9  # all that could be drawn is right of 麻黄


def test_names_are_swapped_for_names_that_look_alike():
    points = ("血海", "照海", "气海", "小海", "少海", "足三里", "手三里")
    rows = [(f"{name}穴属于哪条经脉？", f"{name}穴属于足太阴脾经。") for name in points]
    wrong = {swapped(*rows, seed=seed)[0] for seed in range(20)}
    assert 1 < len(wrong) and wrong <= {
        f"{name}穴属于足太阴脾经。" for name in ("照海", "气海", "小海", "少海")
    }


HERBS = ["麻黄、桂枝", "黄芪、白术", "川芎、红花", "黄连、黄芩"]
CASES = [(f"患者头晕，咳嗽，水肿，第{n}日，用何药？", f"常用{HERBS[n % 4]}。") for n in range(40)]


def test_of_cases_with_the_same_signs_each_has_its_own_right_answer():
    assert all(swapped(*CASES))
    rare = [("头晕而咳嗽者用何药？", "麻黄。"), ("咳嗽头晕可用何药？", "桂枝。"), ("水肿用何药？", "麻黄。")]
    right = pairs._right_about(rare, TERMS)
    assert [{"麻黄", "桂枝"} & known for known in right] == [{"麻黄", "桂枝"}] * 2 + [{"麻黄"}]


# ---- Other answers


@pytest.mark.parametrize(
    "good, other, same",
    [
        ("解表药。", "麻黄是解表药。", True),
        ("证属肝胃不和证，治宜宣肺平喘。", "辨为肝胃不和证。", False),  # less than the good one says
        ("风寒表实证。", "风寒表实证，宜麻黄汤。", True),
        ("发汗解表、宣肺平喘。", "宣肺平喘、发汗解表、利水消肿。", True),
        ("发汗解表、宣肺平喘。", "清热泻火、宣肺平喘。", False),
        ("今天天气很好，适合出门。", "今天天气很好，很适合出门。", True),
        ("今天天气很好。", "明天会下雨。", False),
    ],
)
def test_what_says_the_same(good, other, same):
    assert pairs.says_the_same(good, other, "问？", TERMS) == same


@pytest.mark.slow
def test_sampling_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    model, kept = make_tiny_model(tmp_path / "model"), tmp_path / "sampled"
    rows = [as_row(n, f"问题{n}？", "答") for n in range(12)]
    sampling = {"SAMPLES": 2, "TEMPERATURE": 1.0, "MAX_NEW_TOKENS": 4, "BATCH_SIZE": 8, "SEED": 0}
    sampling = SimpleNamespace(MODEL=str(model), **sampling)
    generate, begun = pairs_generate.generate_answers, []

    def counting(*args, seed, **how):
        begun.append(seed - sampling.SEED)
        return generate(*args, seed=seed, **how)

    monkeypatch.setattr(pairs_generate, "generate_answers", counting)
    monkeypatch.setattr(pairs, "CHUNK", 4)
    whole = pairs.sample_answers(rows, sampling, kept)
    assert [len(answers) for answers in whole] == [2] * 12
    _, second, third = sorted(kept.iterdir(), key=lambda part: read_json(part)["identity"]["seed"])
    third.unlink()  # killed while it made the third part, and a letter of the second changed
    text = second.read_text(encoding="utf-8")
    second.write_text(text.replace('"value": ["', '"value": ["x'), encoding="utf-8")
    for again in (rows, rows, rows[:11]):
        assert pairs.sample_answers(again, sampling, kept)[:8] == whole[:8]
    assert begun == [0, 4, 8, 4, 8, 8] and "is damaged" in capsys.readouterr().out
    sampling.SEED = 1
    assert pairs.sample_answers(rows, sampling, kept) != whole
    assert begun[6:] == [0, 4, 8] and len(list(kept.iterdir())) == 3


SAMPLED = ["宣肺平喘、发汗解表。", "发汗解表、清热泻火。", "清热泻火、补中益气。", "短"]


@pytest.mark.parametrize(
    "answers, worse",
    [
        (SAMPLED, ("清热泻火、补中益气。", "")),
        (SAMPLED[:1], (None, "every sampled answer is right")),
        (SAMPLED[3:], (None, "no sampled answer of similar length")),
    ],
)
def test_worst_of_the_sampled_answers_by_its_facts(monkeypatch, tmp_path, answers, worse):
    row = as_row(0, "麻黄的功效是什么？", "发汗解表、宣肺平喘。")
    monkeypatch.setattr(pairs, "sample_answers", lambda *_: [answers])
    assert list(pairs.sampled([row], TERMS, None, tmp_path)) == [worse]


# ---- What the script says


@pytest.mark.slow
def test_the_default_kind_follows_the_model(data, tmp_path, capsys):
    flags = ["--max-new-tokens", 8, "--samples", 2, "--max-train", 30, "--max-eval", 30, "--model"]
    folder = make_tiny_model(tmp_path / "sft")
    for status, kind in (("running", "facts"), ("finished", "model")):
        record = {"status": status, "identity": {}, "settings": {"MODEL": "base"}, "results": {}}
        write_json(folder / "run.json", record)
        assert build(data, *flags, folder) == 0
        assert f"kind {kind}: " in capsys.readouterr().out
        for pair in read_jsonl(data / "dpo_train.jsonl"):
            good, bad = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
            assert pair["kind"] == kind and not pairs.says_the_same(
                good, bad, pair["prompt"][-1]["content"], TERMS
            )
    (folder / "model.safetensors").unlink()
    assert build(data, "--model", folder) == 2 and "holds no *.safetensors" in capsys.readouterr().err


WRONG = [
    ("--kind opinion", "--kind is 'opinion', wanted auto | facts | model"),
    ("--input-dir nowhere", "make it with: python data_prepare/convert_to_qwen3_format.py"),
    ("--terms-file nowhere", "make it with: python data_prepare/sample/make_sample.py"),
    ("", "}); take --kind model with a trained --model, or convert rows with prompt, chosen and rejected"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_input_is_one_line(tmp_path, capsys, arguments, message):
    write_rows(tmp_path, [WEATHER])
    assert build(tmp_path, "--kind", "facts", *arguments.split()) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1 and not (tmp_path / "dpo_train.jsonl").exists()


COURTESIES = {
    "谢谢医生！": "不客气，祝您早日康复。",
    "在吗？": "您好，请问哪里不舒服？",
    "明白了": "好的，有问题随时联系我。",
}


@pytest.mark.parametrize("evaluation", [[], [WEATHER]], ids=["no evaluation rows", "none that can be paired"])
def test_courtesy_is_not_paired_and_pairs_are_held_out_if_the_evaluation_rows_yield_none(
    tmp_path, capsys, evaluation
):
    write_rows(tmp_path, [*CASES, *COURTESIES.items()], evaluation)
    assert build(tmp_path, "--kind", "facts") == 0
    trained, held_out = (list(read_jsonl(tmp_path / f"dpo_{split}.jsonl")) for split in ("train", "eval"))
    assert len(held_out) == 8 and len(trained) == 32
    asked = [{pair["prompt"][0]["content"] for pair in side} for side in (trained, held_out)]
    assert not asked[0] & asked[1] and not (asked[0] | asked[1]) & set(COURTESIES)
    said = capsys.readouterr().out
    assert "no pair of its own; 8 of the training" in said and "3  its last turn is a courtesy" in said
    write_rows(tmp_path, CASES[:3], evaluation)
    assert build(tmp_path, "--kind", "facts") == 0
    assert "--eval-file ''" in capsys.readouterr().out and not (tmp_path / "dpo_eval.jsonl").exists()
