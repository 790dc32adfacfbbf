"""What stops a training: wrong input, Ctrl-C, a loss that is no number, no memory; each told in one line."""

import os
import re
import shutil
import signal

import pytest
import torch
from conftest import ROOT
from small_runs import same_run, same_weights, train

from utils.files import read_json, read_jsonl, write_json
from utils.training.loop import Learner
from utils.training.memory import StepPlan


@pytest.mark.parametrize(
    "change, message",
    [
        (["--device", "cuda"], "no cuda device here"),
        (["--max-length", "5"], "no row fits into MAX_LENGTH = 5"),
        (["--epochs", 0], "--epochs is 0"),
        (["--keep", "first"], "wanted best | last"),
        (["--tracker", "wandb"], "--tracker wandb needs its package: pip install wandb"),
    ],
)
def test_wrong_input_is_one_line(place, tmp_path, capsys, monkeypatch, change, message):
    if change[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(ROOT)
    assert train("sft", place, tmp_path / "out", *change) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.strip().splitlines()) == 1


@pytest.fixture
def ctrl_c(monkeypatch):
    """ctrl_c(step): as if the user had pressed Ctrl-C in the evaluation after `step`."""
    evaluate, batch_loss, evaluating = Learner.evaluate, Learner.batch_loss, []

    def at(step):
        def begun(self, plan, now, done):
            evaluating[:] = [now]
            return evaluate(self, plan, now, done)

        def pressed(self, batch, scale):
            if evaluating == [step] and not torch.is_grad_enabled():
                os.kill(os.getpid(), signal.SIGINT)
            return batch_loss(self, batch, scale)

        monkeypatch.setattr(Learner, "evaluate", begun)
        monkeypatch.setattr(Learner, "batch_loss", pressed)

    return at


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 12])
def test_ctrl_c_in_an_evaluation_loses_nothing(runs, place, tmp_path, capsys, ctrl_c, step):
    output = tmp_path / "out"
    ctrl_c(step)
    assert train("sft", place, output) == 130
    told = f"stopped after step {step}, checkpoint written; the same command goes on"
    assert told in capsys.readouterr().err and (output / f"checkpoint-{step}").is_dir()
    log = list(read_jsonl(output / "training_log.jsonl"))
    assert log[-1]["step"] == step and "loss" in log[-1]
    ctrl_c(-1)
    assert train("sft", place, output) == 0
    assert same_run(output, runs("sft"))


def test_ctrl_c_before_the_first_step(place, tmp_path, capsys, ctrl_c):
    ctrl_c(0)
    assert train("sft", place, tmp_path / "out") == 130
    assert "stopped before the first step; the same command starts it again" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_rows(place, tmp_path, capsys, monkeypatch):
    whole, steps = Learner.backward, []

    def spoilt(self, batches, way):
        result = whole(self, batches, way)
        steps.append(result)
        return (
            result
            if len(steps) != 3
            else result._replace(losses=[loss + float("nan") for loss in result.losses])
        )

    monkeypatch.setattr(Learner, "backward", spoilt)
    assert train("sft", place, tmp_path / "out") == 1
    told = r"the loss became nan at step 3, in rows ((\d+, ){4}\d+)( and \d+ more)?; lower"
    said = re.search(told, capsys.readouterr().err)
    assert said and all(int(row) < 60 for row in said[1].split(", "))


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: torch.tensor(float("inf")))
    assert train("sft", place, tmp_path / "out", "--max-steps", 1) == 1
    assert "the gradient became inf at step 1" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


NO_MEMORY = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.fixture
def hungry(monkeypatch):
    """hungry(step, rows) -> memory is too short for so many rows at once, in the step after `step` and later."""

    def run(step, rows):
        whole, steps = Learner.backward, []

        def backward(self, batches, way):
            if len(steps) >= step and way.rows_at_once >= rows:
                raise RuntimeError(NO_MEMORY)
            steps.append(way)
            return whole(self, batches, way)

        monkeypatch.setattr(Learner, "backward", backward)
        return steps

    return run


def test_no_memory_underway_names_the_last_checkpoint(place, tmp_path, capsys, hungry):
    hungry(8, 1)
    assert train("sft", place, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert "not enough memory after step 8" in errors and "checkpoint-6 is kept" in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_where_memory_runs_out_the_next_plan_is_taken_and_kept(place, tmp_path, capsys, hungry, monkeypatch):
    """The run goes on from its last step; killed and started again, it ends in the same bits."""
    output, two = tmp_path / "out", StepPlan(2, 1, False)
    monkeypatch.setattr("utils.training.plan.choose", lambda *_: two)
    used = hungry(8, 2)
    assert train("sft", place, output) == 0
    assert used == [two] * 8 + [StepPlan(1, 2, False)] * 4
    assert "out of memory in step 9; from here on 1 row at once, 2 passes a step" in capsys.readouterr().out
    record = read_json(output / "run.json")
    assert record["plan"] == [[0, *two], [8, 1, 2, False]]
    shutil.copytree(output, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoint-12")
    write_json(tmp_path / "again/run.json", record | {"status": "running"})
    used.clear()
    assert train("sft", place, tmp_path / "again") == 0
    assert used == [two] * 2 + [StepPlan(1, 2, False)] * 4
    assert same_weights(output, tmp_path / "again")
