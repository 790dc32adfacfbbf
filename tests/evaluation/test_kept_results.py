"""Results that were measured before: found again only where everything that decides a score is the same."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from evaluation_files import EXAM, compare, make_arguments
from tiny_model import make_tiny_model

from utils.evaluation import measure, report
from utils.files import read_json, write_json, write_jsonl

LOSS = {"test": "heldout", "id": "0", "loss": 1.5, "tokens": 3}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(argument, ..., models=[...]) -> the names of the folders that a comparison measures: tmp_path/one and these. What
    measuring would give is written here."""
    monkeypatch.setattr(report, "plot_comparison", lambda panels, models, path: None)
    folders, one = [], make_tiny_model(tmp_path / "one")
    monkeypatch.setattr(measure, "measure", lambda folder, *_: folders.append(Path(folder).name) or [LOSS])
    arguments = [*make_arguments(tmp_path), "--general-file", "", "--terms-file"]
    arguments += [shutil.copy(ROOT / "data_prepare/sample/terms.jsonl", tmp_path / "terms.jsonl")]

    def measured(*more, models=()):
        folders.clear()
        assert compare("--models", one, *models, *arguments, *more) == 0
        return list(folders)

    return measured


def test_a_second_call_measures_only_what_is_new(measured, tmp_path, capsys):
    assert measured() == ["one"]
    before = read_json(tmp_path / "out/comparison.json")["models"]["base"]
    two = make_tiny_model(tmp_path / "two", seed=1)
    assert measured(models=[two]) == ["two"] and "measured before" in capsys.readouterr().out
    assert read_json(tmp_path / "out/comparison.json")["models"]["base"] == before
    assert measured("--show", 1, models=[two]) == [] and measured("--fresh") == ["one"]
    for changed in (["--exam-rows", 5], ["--precision", "bf16"], ["--follow-ups", 3]):
        assert measured(*changed) == ["one"]


def test_a_change_in_the_code_or_a_library_is_measured_anew(measured, monkeypatch):
    for name, value in (("SCORING_VERSION", -1), ("version", lambda package: "0.0")):
        assert measured() == ["one"] and measured() == []
        monkeypatch.setattr(measure, name, value)
    assert measured() == ["one"]


def test_a_change_in_a_file_is_measured_anew(measured, tmp_path):
    assert measured() == ["one"]
    config = tmp_path / "one/generation_config.json"
    write_json(config, read_json(config) | {"eos_token_id": 5})  # other end tokens
    assert measured() == ["one"]
    template = tmp_path / "one/chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert measured() == ["one"]
    write_jsonl(tmp_path / "terms.jsonl", [{"kind": "herb", "term": "麻黄"}])
    assert measured() == ["one"]
    write_jsonl(tmp_path / "exam.jsonl", EXAM[:4])
    assert measured() == ["one"] and measured() == []
