"""The life of a training folder: finished, changed, moved aside, held by another run, damaged."""

import itertools
import shutil

import filelock
import pytest
from small_runs import same_run, same_weights, train

from utils.files import read_json, write_json
from utils.training import log
from utils.training import run as run_module


def test_a_finished_run_says_so_and_is_left_alone(runs, place, capsys):
    before = (runs("sft") / "model.safetensors").stat().st_mtime_ns
    assert train("sft", place, runs("sft")) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (runs("sft") / "model.safetensors").stat().st_mtime_ns == before


def test_changed_settings_and_data_are_refused_by_name(runs, place, capsys):
    more = ["--learning-rate", "1e-4", "--train-file", place / "sft_eval.jsonl"]
    assert train("sft", place, runs("sft"), *more) == 2
    said = capsys.readouterr().err
    assert "LEARNING_RATE: 0.003 -> 0.0001" in said and "TRAIN_FILE has other content" in said
    assert "train it further into another --output-dir with --model" in said and "sha256" not in said


def test_fresh_keeps_the_earlier_run(runs, place, capsys):
    output = shutil.copytree(runs("sft"), place / "again")
    assert train("sft", place, output, "--fresh", "--max-steps", 2) == 0
    assert "the earlier run is kept in" in capsys.readouterr().out
    (kept,) = place.glob("again.*")
    assert same_weights(kept, runs("sft"))
    assert read_json(output / "run.json")["results"]["steps"] == 2


def test_a_second_run_in_the_folder_is_refused(place, capsys):
    output = place / "held"
    output.mkdir()
    (output / ".lock.pid").write_text("4711", encoding="utf-8")
    with filelock.FileLock(output / ".lock"):
        assert train("sft", place, output) == 2
    assert "in use by another run (process 4711)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["base", "sft_train.jsonl"])
def test_fresh_moves_nothing_that_the_run_reads(place, tmp_path, capsys, name):
    output = tmp_path / "out"
    output.mkdir()
    (shutil.copytree if name == "base" else shutil.copy)(place / name, output / name)
    flag = "--model" if name == "base" else "--train-file"
    assert train("sft", place, output, flag, output / name, "--fresh") == 2
    assert f"--fresh would move {'MODEL' if name == 'base' else 'TRAIN_FILE'}" in capsys.readouterr().err
    assert (output / name).exists()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(runs, place, tmp_path, capsys):
    output = shutil.copytree(runs("sft"), tmp_path / "damaged")
    write_json(output / "run.json", read_json(output / "run.json") | {"status": "running"})
    damaged = output / "checkpoint-12/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert train("sft", place, output) == 0
    assert "checkpoint-12 is damaged (model.safetensors); going back" in capsys.readouterr().out
    assert same_run(output, runs("sft"))


@pytest.mark.slow
def test_a_manifest_that_lists_no_whole_checkpoint(stopped, place, capsys):
    output = stopped("sft")
    (output / "checkpoint-6/MANIFEST.json").write_text("{}", encoding="utf-8")
    assert train("sft", place, output) == 0
    said = capsys.readouterr().out
    assert "checkpoint-6 is damaged" in said and "; starting over" in said and "going on from" not in said


def test_damaged_lines_of_the_log_do_not_stop_a_run(stopped, runs, place, capsys):
    output = stopped("sft")
    log = output / "training_log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    damaged = ["", "{", "[]", '{"step": 3, "loss"', '{"loss": 1}', "\x00\x01"]
    log.write_text("\n".join([*lines[:5], *damaged, *lines[5:]]) + "\n", encoding="utf-8")
    assert train("sft", place, output) == 0
    assert "6 damaged lines are left out of the curve" in capsys.readouterr().out
    assert same_run(output, runs("sft"))


@pytest.mark.parametrize("field", ["status", "results"])
def test_a_damaged_record_is_told(runs, place, tmp_path, capsys, field):
    output = tmp_path / "out"
    output.mkdir()
    write_json(output / "run.json", read_json(runs("sft") / "run.json") | {field: 5})
    assert train("sft", place, output) == 2
    said = capsys.readouterr().err
    assert (
        "run.json is damaged; restore the file, or start over with --fresh" in said and said.count("\n") == 1
    )


@pytest.mark.slow
def test_the_reference_is_that_of_this_model_and_these_pairs(runs, place, tmp_path, capsys):
    """A run that was killed before its first checkpoint leaves its reference behind; another run must not take it."""
    output, other = tmp_path / "out", runs("dpo") / "reference_logps.json"
    output.mkdir()
    kept = read_json(other)
    kept["identity"]["TRAIN_FILE"] = "sha256 of another"
    write_json(output / "reference_logps.json", kept)
    assert train("dpo", place, output) == 0
    assert "; making it again\ncomputing the reference log-probabilities" in capsys.readouterr().out
    assert same_run(output, runs("dpo"))
    assert (output / "reference_logps.json").read_bytes() == other.read_bytes()


def test_a_busy_machine_is_told(place, tmp_path, capsys, monkeypatch):
    """Steps are slower than planned, and other programs use the cores. Without those nothing is said."""
    monkeypatch.setattr(log, "SLOWER", 0.0)
    for ours, told in ((0.1, True), (1.0, False)):
        times = ((second, ours * second) for second in itertools.count())
        for module in (log, run_module):
            monkeypatch.setattr(module, "cpu_seconds", times.__next__)
        assert train("sft", place, tmp_path / str(ours), "--max-steps", 4) == 0
        said = capsys.readouterr().out
        assert ("as slow as planned: other programs use" in said) == told
        assert ("judged by a forward pass while other programs use" in said) == told
