"""The script: every result agrees with a plain loop, what it writes and prints, what it compares by default, what it refuses."""

import json
import shutil

import pytest
from evaluation_files import EXAM, alone, compare, load_plain, make_arguments, prompt_of
from tiny_model import make_tiny_model

from model_finetune import compare_models
from utils.evaluation import report
from utils.files import read_json

KINDS = "exam exam_letter exam_true_false exam_true_false_letter preference".split()


@pytest.fixture(scope="module")
def comparison(folder, tmp_path_factory):
    """(the place of the files, the panels of the picture): two models compared in all that there is."""
    place, drawn = tmp_path_factory.mktemp("comparison"), []
    other = make_tiny_model(place / "sft_finetuned", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        draw = report.plot_comparison
        patch.setattr(
            report, "plot_comparison", lambda panels, *more: drawn.append(panels) or draw(panels, *more)
        )
        assert compare("--models", folder, other, *make_arguments(place), "--follow-ups", 5) == 0
    return place / "out", drawn[0]


@pytest.mark.slow
def test_the_comparison_is_written(comparison):
    place, drawn = comparison
    written = read_json(place / "comparison.json")
    assert list(written["models"]) == ["base", "sft"]
    counts = dict.fromkeys(("exam", "exam_letter", "heldout_loss"), 10) | {
        "preference": 12,
        "mean_tokens": 90,
    }
    counts |= {"exam_true_false": 2, "second": 5, "fourth": 5, "caution": 1}
    for found in written["models"].values():
        assert {name: found[f"{name}_n"] for name in counts} == counts
        assert {f"{name}_accuracy" for name in KINDS} <= found.keys()
        assert found["exam_interval"][0] <= found["exam_accuracy"] <= found["exam_interval"][1]
        assert (found["exam_chance"], found["preference_chance"]) == (0.25, 0.5)
    [pair] = written["differences"]
    assert (pair["from"], pair["to"]) == ("base", "sft") and pair.keys() >= {*KINDS, "heldout_loss", "second"}
    assert 0 <= pair["exam_letter"]["p"] <= 1
    told = (place / "comparison.md").read_text(encoding="utf-8")
    for text in ("sft - base", "McNemar", "comparison.png", "- 5 of the held-out questions once more",
                 "sft against base", "1 rows of the exam file were left out: questions with several right answers",
                 "| exam by option letter", "| second question", "| caution where not asked"):  # fmt: skip
        assert text in told
    assert {panel.title for panel in drawn} >= {
        "exam by option text, n = 10",
        "true or false, by text, n = 2",
        "held-out loss (lower is better), n = 10",
    }
    assert (place / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_item_is_kept_and_agrees_with_a_plain_loop(comparison, folder):
    [path] = (comparison[0] / "comparison").glob("tiny-*.json")
    items, (tokenizer, model), of = read_json(path)["value"], load_plain(folder), {}
    for item in items:
        of.setdefault(item["test"], []).append(item)
    counts = {"heldout": 10, "exam": 12, "preference": 12, "answer": 102}
    assert {test: len(found) for test, found in of.items()} == counts
    answers = [tokenizer(text + "<|im_end|>")["input_ids"] for text in ("药性是温。", "寒。")]
    for row, loss, pair, exam in zip(EXAM, of["heldout"], of["preference"], of["exam"]):
        logps = [alone(model, prompt_of(tokenizer, row["question"]), answer) for answer in answers]
        assert loss["loss"] == pytest.approx(-logps[0], rel=1e-4) and loss["tokens"] == len(answers[0])
        assert [pair["chosen"], pair["rejected"]] == pytest.approx(logps, rel=1e-4)
        assert exam["question"] == row["question"] and set(exam["text"]) == set(exam["letter"]) == set("ABCD")
    assert of["heldout"][0]["id"] == "0" and {item["tokens"] for item in of["answer"]} <= set(range(1, 7))


def test_only_what_was_asked_for_is_compared(folder, tmp_path, capsys):
    arguments = [*make_arguments(tmp_path), "--pairs-file", "", "--general-file", "", "--generate", 0]
    assert compare("--models", folder, *arguments, "--letter-rows", -1, "--precision", "bf16") == 0
    found = read_json(tmp_path / "out/comparison.json")["models"]["base"]
    assert found["exam_n"] == 10 and "exam_letter_n" not in found
    said = capsys.readouterr().out
    assert "| exam by option text" in said and "preference" not in said
    assert "exam.jsonl: 1 rows left out: questions with several right answers" in said
    assert compare("--models", folder, *arguments, "--exam-file", "") == 0
    found = read_json(tmp_path / "out/comparison.json")["models"]["base"]
    assert found.keys() == set("folder weights heldout_loss heldout_loss_interval heldout_loss_n".split())


def test_the_default_is_the_base_and_every_finished_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.model.folder.ROOT", tmp_path)
    monkeypatch.setattr(compare_models, "ROOT", tmp_path)
    record = {"identity": {}, "settings": {"MODEL": "x"}, "results": {}}
    records = {"sft_finetuned": record | {"status": "finished"}, "my_run": record | {"status": "finished"}}
    records["sft_finetuned.20261129-214800"] = record | {"status": "finished"}  # set aside by --fresh
    records |= {"dpo_finetuned": record | {"status": "running"}, "copied": None}
    damaged = ["{", [], {"status": "finished"}, {"status": 3, "settings": []}]
    records |= {f"damaged{number}": content for number, content in enumerate(damaged)}
    for name, content in records.items():
        place = shutil.copytree(folder, tmp_path / "trainer_output" / name)
        if content is not None:
            text = content if content == "{" else json.dumps(content)
            (place / "run.json").write_text(text, encoding="utf-8")
    settings = compare_models.read_settings(vars(compare_models), ["--base-model", str(folder)])
    named = compare_models.models_to_compare(settings)
    assert set(named) == {"base", "sft", "my_run"} and list(named)[0] == "base"
    said = capsys.readouterr().out
    assert all(f"damaged{number}" in said for number in range(4)) and said.count("left out: ") == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--models", "nowhere/at/all"], "does not exist"),
        (["--exam-file", "no.csv"], "no.csv does not exist"),
        (["--eval-file", "nowhere.jsonl"], "make it with: python data_prepare/convert_to_qwen3_format.py"),
        (["--thinking", "maybe"], "--thinking is 'maybe', wanted auto | on | off"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, capsys, changes, message):
    assert compare("--models", folder, *make_arguments(tmp_path), *changes) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1
