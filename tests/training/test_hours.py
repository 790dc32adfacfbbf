"""HOURS: a run ends in time, whatever slows it down, at the end of its schedule; on a clock that the tests turn."""

import itertools
import shutil
import time

import pytest
import torch
from small_runs import same_run, train

from utils.files import read_json, read_jsonl, write_json, write_jsonl
from utils.training import plan
from utils.training.loop import Learner
from utils.training.run import Run

pytestmark = pytest.mark.slow
HOUR = 3600.0
GIVEN = "--epochs 1000 --hours 1 --evaluations 5 --checkpoint-minutes 10 --keep-checkpoints 9".split()


class Clock:
    """Stands still but for what the parts of a run take: a step (seconds, as a function of the time), an evaluation's row, a
    checkpoint."""

    def __init__(self, monkeypatch):
        self.now, self.step, self.row, self.checkpoint = 1000.0, lambda seconds: 60.0, 2.0, 15.0
        self.ids: list[list[str]] = []  # of the rows of each step
        self.dies = None  # in the step after so many of this process
        backward, batch_loss, save = Learner.backward, Learner.batch_loss, Run.save_checkpoint

        def timed_step(learner, batches, way):
            if len(self.ids) == self.dies:
                raise SystemExit(9)
            self.now += self.step(self.now - 1000.0)
            self.ids.append([name for batch in batches for name in batch["ids"]])
            return backward(learner, batches, way)

        def timed_row(learner, *given):
            self.now += 0.0 if torch.is_grad_enabled() else self.row
            return batch_loss(learner, *given)

        def timed_save(run, *given):
            self.now += self.checkpoint
            return save(run, *given)

        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(Learner, "backward", timed_step)
        monkeypatch.setattr(Learner, "batch_loss", timed_row)
        monkeypatch.setattr(Run, "save_checkpoint", timed_save)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def rates(folder):
    log = list(read_jsonl(folder / "training_log.jsonl"))
    return [entry["learning_rate"] / 3e-3 for entry in log if "loss" in entry]


def third(seconds):
    return HOUR / 3 < seconds < 2 * HOUR / 3


STEPS = {
    "slow third": lambda seconds: 120.0 if third(seconds) else 60.0,  # another program takes a core
    "faster": lambda seconds: 80.0 if seconds < 300 else 30.0,
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_run_ends_in_time_and_its_schedule_with_it(place, tmp_path, clock, step):
    clock.step = step
    assert train("sft", place, tmp_path / "out", *GIVEN) == 0
    assert 0.95 * HOUR <= clock.now - 1000.0 <= HOUR
    curve = rates(tmp_path / "out")
    peak = curve.index(max(curve))
    assert curve[peak:] == sorted(curve[peak:], reverse=True) and curve[-1] < 0.03
    assert max(before - after for before, after in itertools.pairwise(curve[peak:])) < 0.12  # no jump
    evaluations = [entry for entry in read_jsonl(tmp_path / "out/training_log.jsonl") if "eval_loss" in entry]
    assert len(evaluations) == 6
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) >= 5  # each ten minutes


def test_a_machine_that_stood_still_costs_no_more_than_a_step(place, tmp_path, clock):
    """For half an hour in one step: what was planned cannot be kept, the time can."""
    clock.step = lambda seconds: 60.0 if len(clock.ids) != 30 else 1800.0
    assert train("sft", place, tmp_path / "out", *GIVEN) == 0
    assert clock.now - 1000.0 <= 60.0 * 31 + 1800.0 + 300


def test_epochs_that_take_less_end_the_run(place, tmp_path, clock):
    assert train("sft", place, tmp_path / "out", *GIVEN, "--epochs", 2) == 0
    assert read_json(tmp_path / "out/run.json")["results"]["steps"] == 12 and clock.now - 1000.0 < 900


def test_a_killed_run_counts_only_the_time_it_ran_and_ends_in_the_same_bits(place, tmp_path, clock):
    slow = lambda seconds: 90.0 if third(seconds) else 60.0  # noqa: E731
    clock.step = slow
    assert train("sft", place, tmp_path / "whole", *GIVEN) == 0
    clock.ids.clear()
    clock.now, clock.dies = 1000.0, 33
    assert train("sft", place, tmp_path / "out", *GIVEN) == 9
    clock.ids.clear()
    kept = [read_json(path / "state.json")["elapsed"] for path in (tmp_path / "out").glob("checkpoint-*")]
    lost = clock.now - 1000.0 - max(kept)
    clock.now, clock.dies = clock.now + 86400.0, None  # a day later
    clock.step = lambda seconds: slow(seconds - 86400.0 - lost)
    assert train("sft", place, tmp_path / "out", *GIVEN) == 0
    assert same_run(tmp_path / "out", tmp_path / "whole")


def test_steps_that_are_done_again_take_the_rates_that_they_had(place, tmp_path, clock):
    """Killed long after a checkpoint, and gone on with on a faster machine: the logged steps are the same, the end is in time."""
    given = [*GIVEN, "--keep", "last"]
    assert train("sft", place, tmp_path / "whole", *given) == 0
    output = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", output)
    record, lines = read_json(output / "run.json"), list(read_jsonl(output / "training_log.jsonl"))
    for path in output.glob("checkpoint-*"):
        if read_json(path / "state.json")["progress"] > 0.3:
            shutil.rmtree(path)
    write_json(output / "run.json", record | {"status": "running"})
    killed = [entry for entry in lines if entry["step"] <= 30]
    write_jsonl(output / "training_log.jsonl", killed)
    clock.now, clock.step = 5e6, lambda seconds: 40.0
    assert train("sft", place, output, *given) == 0
    again = list(read_jsonl(output / "training_log.jsonl"))
    assert again[: len(killed)] == killed and again[-1]["step"] > lines[-1]["step"]


def test_pairs_whose_reference_takes_longer_than_hours_are_refused(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "forward_rate", lambda *_: 1.0)  # a token a second
    assert train("dpo", place, tmp_path / "out", "--hours", 0.5) == 2
    said = capsys.readouterr().err
    assert "reference log-probabilities of 56 pairs alone take about" in said and "HOURS is 0.5" in said
