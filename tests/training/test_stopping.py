"""Ctrl-C in an evaluation, numbers that make no sense, and runs that are too short."""

import os
import signal

import pytest
import torch
from small_runs import same_weights, train

from utils.files import read_json, read_jsonl
from utils.training.loop import Learner


@pytest.fixture
def ctrl_c(monkeypatch):
    """ctrl_c(step): as if the user had pressed Ctrl-C in the evaluation after `step`."""
    evaluate, batch_loss, evaluating = Learner.evaluate_and_log, Learner.batch_loss, []

    def at(step):
        def begun(self, plan, now, done):
            evaluating[:] = [now]
            return evaluate(self, plan, now, done)

        def pressed(self, batch, scale):
            if evaluating == [step] and not torch.is_grad_enabled():
                os.kill(os.getpid(), signal.SIGINT)
            return batch_loss(self, batch, scale)

        monkeypatch.setattr(Learner, "evaluate_and_log", begun)
        monkeypatch.setattr(Learner, "batch_loss", pressed)

    return at


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 12])
def test_ctrl_c_in_an_evaluation_loses_nothing(runs, place, tmp_path, capsys, ctrl_c, step):
    output = tmp_path / "out"
    ctrl_c(step)
    assert train("sft", place, output) == 130
    assert (
        f"stopped after step {step}, checkpoint written; the same command goes on" in capsys.readouterr().err
    )
    assert (output / f"checkpoint-{step}").is_dir()
    log = list(read_jsonl(output / "training_log.jsonl"))
    assert log[-1]["step"] == step and "loss" in log[-1]
    ctrl_c(-1)
    assert train("sft", place, output) == 0
    assert same_weights(output, runs("sft"))
    assert (output / "training_log.jsonl").read_bytes() == (runs("sft") / "training_log.jsonl").read_bytes()


def test_ctrl_c_before_the_first_step(place, tmp_path, capsys, ctrl_c):
    ctrl_c(0)
    assert train("sft", place, tmp_path / "out") == 130
    assert "stopped before the first step; the same command starts it again" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "flag, value, wanted",
    [
        ("--epochs", 0, "wanted"),
        ("--rows-per-step", 0, "wanted"),
        ("--keep-checkpoints", 0, "wanted"),
        ("--evaluations", 0, "wanted"),
        ("--checkpoint-minutes", -1, "wanted a number: 0 or more"),
        ("--warmup", 3, "wanted"),
        ("--warmup", 1, "wanted a number: 0 to 0.99"),
        ("--keep", "first", "wanted best | last"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(place, tmp_path, capsys, flag, value, wanted):
    assert train("sft", place, tmp_path / "out", flag, value) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag}") and wanted in said and said.count("\n") == 1


def test_half_an_epoch_is_half_an_epoch(place, tmp_path):
    assert train("sft", place, tmp_path / "out", "--epochs", 0.5) == 0
    assert read_json(tmp_path / "out/run.json")["results"]["steps"] == 3


@pytest.mark.parametrize(
    "settings, advice",
    [
        ([], "ROWS_PER_STEP 1 and EPOCHS 3 give 30; more rows are better"),
        (["--epochs", 3, "--rows-per-step", 4], "lower ROWS_PER_STEP to 1"),
    ],
)
def test_few_steps_are_warned_of_with_what_gives_more(place, tmp_path, capsys, settings, advice):
    assert train("sft", place, tmp_path / "out", *settings, "--estimate") == 0
    said = capsys.readouterr().out
    assert "warning: too few optimizer steps to learn much; " in said and advice in said


def test_enough_steps_are_not_warned_of(place, tmp_path, capsys):
    assert train("sft", place, tmp_path / "out", "--epochs", 6, "--estimate") == 0
    assert "warning" not in capsys.readouterr().out
