"""The life of a training folder: finished, changed, moved aside, held by another run, with a damaged checkpoint."""

import json
import shutil

from small_runs import same_weights, train

from utils.files import read_json


def test_a_finished_run_says_so_and_is_left_alone(runs, place, capsys):
    before = (runs("sft") / "model.safetensors").stat().st_mtime_ns
    assert train("sft", place, runs("sft")) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (runs("sft") / "model.safetensors").stat().st_mtime_ns == before


def test_changed_settings_are_refused_by_name(runs, place, capsys):
    assert train("sft", place, runs("sft"), "--learning-rate", "1e-4") == 2
    assert "LEARNING_RATE: 0.003 -> 0.0001" in capsys.readouterr().err


def test_fresh_keeps_the_earlier_run(runs, place, capsys):
    output = place / "again"
    shutil.copytree(runs("sft"), output)
    assert train("sft", place, output, "--fresh", "--max-steps", 2) == 0
    assert "the earlier run is kept in" in capsys.readouterr().out
    (kept,) = place.glob("again.*")
    assert same_weights(kept, runs("sft"))
    assert read_json(output / "run.json")["results"]["steps"] == 2


def test_a_second_run_in_the_folder_is_refused(place, capsys):
    import fcntl

    output = place / "held"
    output.mkdir()
    with open(output / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        assert train("sft", place, output) == 2
    assert "in use by another run (process 4711)" in capsys.readouterr().err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(runs, place, capsys):
    output = place / "damaged"
    shutil.copytree(runs("sft"), output)
    record = read_json(output / "run.json")
    (output / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    damaged = newest / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert train("sft", place, output) == 0
    said = capsys.readouterr().out
    assert f"{newest.name} is damaged (model.safetensors)" in said
    assert same_weights(output, runs("sft"))


def test_estimate_tells_and_touches_nothing(place, tmp_path, capsys, method):
    assert train(method, place, tmp_path / "out", "--estimate") == 0
    said = capsys.readouterr().out
    assert "memory: " in said and "disk: " in said and "steps" in said
    assert not (tmp_path / "out").exists()
