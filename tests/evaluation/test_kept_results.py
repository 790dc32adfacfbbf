"""Results that were measured before: found again only where everything that decides a score is the same, and whole."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from evaluation_files import compare, make_arguments
from tiny_model import make_tiny_model

from utils.evaluation import exams, report
from utils.evaluation import measure as kept_results
from utils.files import read_json, write_json, write_jsonl


@pytest.fixture
def place(tmp_path, monkeypatch):
    """tmp_path with a model (one/) and test files (arguments: `place.arguments`); `place.measured()` tells which folders were
    measured since the last call."""
    monkeypatch.setattr(report, "plot_comparison", lambda panels, models, path: None)  # about a second each
    folders, measure = [], kept_results.measure
    monkeypatch.setattr(
        kept_results,
        "measure",
        lambda folder, *rest: (folders.append(Path(folder).name), measure(folder, *rest))[1],
    )
    return Place(tmp_path, folders)


class Place:
    def __init__(self, path, folders):
        self.path, self.folders = path, folders
        self.one = make_tiny_model(path / "one")
        self.arguments = [*make_arguments(path), "--general-file", "", "--generate", 2]

    def measured(self, *more, models=()):
        """The names of the folders that a comparison with such arguments measures."""
        self.folders.clear()
        assert compare("--models", self.one, *models, *self.arguments, *more) == 0
        return list(self.folders)

    def kept_file(self):
        [path] = (self.path / "out/comparison").glob("one-*.json")
        return path


def test_a_second_call_measures_only_what_is_new(place, capsys):
    assert place.measured() == ["one"]
    before = read_json(place.path / "out/comparison.json")["models"]["base"]
    two = make_tiny_model(place.path / "two", seed=1)
    assert place.measured(models=[two]) == ["two"] and "measured before" in capsys.readouterr().out
    assert read_json(place.path / "out/comparison.json")["models"]["base"] == before
    assert place.measured("--show", 1, models=[two]) == []
    assert place.measured("--fresh") == ["one"] and place.measured("--exam-rows", 5) == ["one"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name, value",
    [
        (exams, "LETTER_PROMPT", "{subject}：{question}\n{options}\n选："),
        (exams, "TEXT_PROMPT", "{question}\n{instruction}\n答："),
        (exams, "INSTRUCTION", "答："),
        (exams, "SUBJECT", "中医"),
        (exams, "JUDGE_INSTRUCTION", "对吗？只写{words}。"),
        (exams, "KIND_NAMES", dict.fromkeys(exams.KIND_NAMES, "题")),
        (exams, "LONGEST_SET", 5),
        (kept_results, "SCORING_VERSION", -1),
        (kept_results, "version", lambda package: "0.0"),
    ],
)
def test_a_change_in_the_code_is_measured_anew(place, monkeypatch, module, name, value):
    assert place.measured() == ["one"] and place.measured() == []
    monkeypatch.setattr(module, name, value)
    assert place.measured() == ["one"]


@pytest.mark.slow
def test_a_change_in_a_file_is_measured_anew(place):
    terms = shutil.copy(ROOT / "data_prepare/sample/terms.jsonl", place.path / "terms.jsonl")
    place.arguments += ["--terms-file", terms]
    assert place.measured() == ["one"] and place.measured() == []

    config = read_json(place.one / "generation_config.json")
    write_json(place.one / "generation_config.json", config | {"eos_token_id": 5})  # other end tokens
    assert place.measured() == ["one"]
    template = place.one / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert place.measured() == ["one"]
    write_jsonl(terms, [{"kind": "herb", "term": "麻黄"}])
    assert place.measured() == ["one"]
    rows = [json.loads(line) for line in (place.path / "exam.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(place.path / "exam.jsonl", rows[:4])
    assert place.measured() == ["one"] and place.measured() == []


@pytest.mark.slow
def test_another_number_format_is_measured_anew(place):
    assert place.measured() == ["one"] and place.measured("--precision", "bf16") == ["one"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"answer": "A"', '"answer": "B"', 1),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"seconds": ', '"seconds": 1', 1),
        lambda text: "",
    ],
)
def test_a_damaged_or_edited_result_is_measured_again(place, capsys, damage):
    assert place.measured() == ["one"]
    whole = place.kept_file().read_text(encoding="utf-8")
    before = read_json(place.path / "out/comparison.json")["models"]["base"]
    place.kept_file().write_text(damage(whole), encoding="utf-8")
    assert place.kept_file().read_text(encoding="utf-8") != whole
    capsys.readouterr()
    assert place.measured() == ["one"]
    [line] = [line for line in capsys.readouterr().out.splitlines() if "making it again" in line]
    assert place.kept_file().name in line and "damaged" in line
    after = read_json(place.path / "out/comparison.json")["models"]["base"]
    assert {**after, "seconds": 0, "tokens_per_second": 0} == {**before, "seconds": 0, "tokens_per_second": 0}
    assert place.measured() == []


@pytest.mark.slow
def test_a_result_under_another_models_name_is_not_taken(place):
    two = make_tiny_model(place.path / "two", seed=1)
    assert place.measured(models=[two]) == ["one", "two"]
    [other] = (place.path / "out/comparison").glob("two-*.json")
    shutil.copy(other, place.kept_file())
    assert place.measured(models=[two]) == ["one"]
