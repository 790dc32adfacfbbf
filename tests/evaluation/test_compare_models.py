"""The script: what it writes and prints, what it compares by default, what it refuses."""

import math
import shutil

import pytest
from evaluation_files import compare, make_arguments
from tiny_model import make_tiny_model

from model_finetune import compare_models
from utils.files import read_json, write_json


@pytest.fixture
def arguments(tmp_path):
    return make_arguments(tmp_path)


@pytest.mark.slow
def test_the_comparison_is_written_and_printed(folder, arguments, tmp_path, capsys):
    other = make_tiny_model(tmp_path / "sft_finetuned", seed=1)
    assert compare("--models", folder, other, *arguments) == 0
    written = read_json(tmp_path / "out/comparison.json")
    assert list(written["models"]) == ["base", "sft"]
    wanted = "heldout_loss exam_accuracy exam_n preference_accuracy exam_letter_accuracy general_loss ended_share repetition mean_tokens"
    for found in written["models"].values():
        assert {*wanted.split(), "tokens_per_second"} <= found.keys() and found["exam_n"] == 10
        assert found["exam_interval"][0] <= found["exam_accuracy"] <= found["exam_interval"][1]
        assert found["perplexity"] == pytest.approx(math.exp(found["heldout_loss"]))
    [pair] = written["differences"]
    assert (pair["from"], pair["to"]) == ("base", "sft") and 0 <= pair["exam_letter"]["p"] <= 1
    said, told = capsys.readouterr().out, (tmp_path / "out/comparison.md").read_text(encoding="utf-8")
    for text in (said, told):
        assert "| exam by option letter" in text and "麻黄" in text and "sft against base" in text
    assert "sft - base" in told and "McNemar" in told and "comparison.png" in told
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_is_the_base_and_every_finished_run(folder, tmp_path, monkeypatch, capsys):

    monkeypatch.setattr("utils.model.folder.ROOT", tmp_path)
    monkeypatch.setattr(compare_models, "ROOT", tmp_path)
    for name, status in (
        ("sft_finetuned", "finished"),
        ("sft_finetuned.20261129-214800", "finished"),  # set aside by --fresh
        ("my_run", "finished"),
        ("dpo_finetuned", "running"),
        ("copied", None),
    ):
        shutil.copytree(folder, tmp_path / "trainer_output" / name)
        if status:
            record = {"status": status, "identity": {}, "settings": {"MODEL": "x"}, "results": {}}
            write_json(tmp_path / "trainer_output" / name / "run.json", record)
    for number, damaged in enumerate(("{", "[]", '{"status": "finished"}', '{"status": 3, "settings": []}')):
        place = shutil.copytree(folder, tmp_path / f"trainer_output/damaged{number}")
        (place / "run.json").write_text(damaged, encoding="utf-8")
    settings = compare_models.read_settings(vars(compare_models), ["--base-model", str(folder)])
    named = compare_models.models_to_compare(settings)
    assert set(named) == {"base", "sft", "my_run"} and list(named)[0] == "base"
    said = capsys.readouterr().out
    assert all(f"damaged{number}/run.json" in said for number in range(4)) and said.count("left out: ") == 4


def test_only_what_was_asked_for_is_compared(folder, arguments, tmp_path):
    no_files = [word for name in ("exam", "pairs", "general") for word in (f"--{name}-file", "")]
    assert compare("--models", folder, *arguments, *no_files, "--generate", 0) == 0
    found = read_json(tmp_path / "out/comparison.json")["models"]["base"]
    names = "folder weights heldout_loss heldout_loss_interval heldout_loss_n perplexity seconds"
    assert found.keys() == set(names.split())


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--models", "nowhere/at/all"], "does not exist"),
        (["--exam-file", "no.csv"], "no.csv does not exist"),
        (["--eval-file", "nowhere.jsonl"], "make it with: python data_prepare/convert_to_qwen3_format.py"),
        (["--thinking", "maybe"], "--thinking is 'maybe', wanted auto | on | off"),
    ],
)
def test_wrong_input_is_one_line(folder, arguments, capsys, changes, message):
    assert compare("--models", folder, *arguments, *changes) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1
