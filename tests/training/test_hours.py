"""HOURS: a run ends in time, whatever slows it down, at the end of its schedule; on a clock that the tests turn."""

import itertools
import shutil
import time

import pytest
import torch
from small_runs import same_weights, train

from utils.files import read_json, read_jsonl, write_json
from utils.training.trainer import PackedTrainer

pytestmark = pytest.mark.slow
HOUR = 3600.0
GIVEN = [
    "--epochs",
    1000,
    "--hours",
    1,
    "--evaluations",
    5,
    "--checkpoint-minutes",
    10,
    "--keep-checkpoints",
    9,
]


class Clock:
    """Stands still but for what the parts of a run take: a step (seconds, as a function of the time), an evaluation's row, a
    checkpoint."""

    def __init__(self, monkeypatch):
        self.now, self.step, self.row, self.checkpoint = 1000.0, lambda seconds: 60.0, 2.0, 15.0
        self.ids: list[list[str]] = []  # of the rows of each step
        self.dies = None  # in the step after this one
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        for name, wrapped in (
            ("training_step", self._training_step),
            ("batch_loss", self._batch_loss),
            ("_save_checkpoint", self._save),
        ):
            monkeypatch.setattr(PackedTrainer, name, wrapped(getattr(PackedTrainer, name)))

    def _training_step(self, whole):
        def timed(trainer, model, inputs, *more):
            if trainer.state.global_step == self.dies:
                raise SystemExit(9)
            self.now += self.step(self.now - 1000.0)
            self.ids.append(inputs["ids"])
            return whole(trainer, model, inputs, *more)

        return timed

    def _batch_loss(self, whole):
        def timed(trainer, *given):
            self.now += 0.0 if torch.is_grad_enabled() else self.row
            return whole(trainer, *given)

        return timed

    def _save(self, whole):
        def timed(trainer, *given):
            self.now += self.checkpoint
            return whole(trainer, *given)

        return timed


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def rates(folder):
    log = list(read_jsonl(folder / "training_log.jsonl"))
    return [entry["learning_rate"] / 3e-3 for entry in log if "loss" in entry]


def third(seconds):
    return HOUR / 3 < seconds < 2 * HOUR / 3


@pytest.mark.parametrize(
    "step",
    [
        lambda seconds: (
            120.0 if third(seconds) else 60.0
        ),  # another program takes a core for a third of the run
        lambda seconds: 120.0 if seconds > 2 * HOUR / 3 else 60.0,
        lambda seconds: 20.0 if seconds < 600 else 80.0,
        lambda seconds: 80.0 if seconds < 300 else 20.0,
    ],
    ids=["slow third", "slow end", "slower", "faster"],
)
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


@pytest.mark.parametrize("stall", [10, 30])
def test_a_machine_that_stood_still_costs_no_more_than_a_step(place, tmp_path, clock, stall):
    """For half an hour in one step: what was planned cannot be kept, the time can."""
    clock.step = lambda seconds: 60.0 if len(clock.ids) != stall else 1800.0
    assert train("sft", place, tmp_path / "out", *GIVEN) == 0
    assert clock.now - 1000.0 <= max(HOUR, 60.0 * (stall + 1) + 1800.0 + 300)


def test_epochs_that_take_less_end_the_run(place, tmp_path, clock):
    assert train("sft", place, tmp_path / "out", *GIVEN, "--epochs", 2) == 0
    assert read_json(tmp_path / "out/run.json")["results"]["steps"] == 12 and clock.now - 1000.0 < 900


def test_the_plan_is_told_and_kept(place, tmp_path, clock, capsys):
    assert train("sft", place, tmp_path / "out", *GIVEN) == 0
    said = capsys.readouterr().out
    assert "60.0 min are " in said and "of the rows" in said and "done at" in said
    record = read_json(tmp_path / "out/run.json")
    assert record["schedule"]["plan"][1][2] == "the first steps were timed"
    assert record["schedule"]["plan"][-1][1] == record["results"]["steps"]


@pytest.mark.parametrize("dies", [20, 33])
def test_a_killed_run_counts_only_the_time_it_ran_and_ends_in_the_same_bits(
    place, tmp_path, clock, monkeypatch, dies
):
    slow = lambda seconds: 90.0 if third(seconds) else 60.0  # noqa: E731
    clock.step = slow
    assert train("sft", place, tmp_path / "whole", *GIVEN) == 0
    clock.now, clock.dies = 1000.0, dies
    assert train("sft", place, tmp_path / "out", *GIVEN) == 9
    before = read_json(tmp_path / "out/run.json")["pace"]
    lost = clock.now - 1000.0 - max(kept["elapsed"] for kept in before.values())
    clock.now, clock.dies = clock.now + 86400.0, None  # a day later
    clock.step = lambda seconds: slow(seconds - 86400.0 - lost)
    assert train("sft", place, tmp_path / "out", *GIVEN) == 0
    whole, again = (read_json(tmp_path / name / "run.json") for name in ("whole", "out"))
    assert again["schedule"] == whole["schedule"]
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    logs = [(tmp_path / name / "training_log.jsonl").read_bytes() for name in ("whole", "out")]
    assert logs[0] == logs[1]


def test_a_recorded_plan_is_followed(place, tmp_path, clock, precision):
    """Killed after a change that the checkpoint knows nothing of: the change comes at its step again, whatever the time."""
    clock.step = lambda seconds: 120.0 if third(seconds) else 60.0
    given = [*GIVEN, "--keep", "last"]
    assert train("sft", place, tmp_path / "whole", *given, precision=precision) == 0
    output = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", output)
    record = read_json(output / "run.json")
    changes = record["schedule"]["plan"]
    assert len(changes) > 3
    first, *later = sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    for step in later:
        shutil.rmtree(output / f"checkpoint-{step}")
    write_json(output / "run.json", record | {"status": "running"})
    clock.now = 5e6
    clock.step = lambda seconds: 40.0  # the machine is another one now, until the plan's last change
    last = changes[-1][0]
    assert train("sft", place, output, *given, precision=precision) == 0
    again = read_json(output / "run.json")["schedule"]["plan"]
    assert again[: len(changes)] == changes and all(change[0] >= last for change in again[len(changes) :])
    whole, lines = (
        [entry for entry in read_jsonl(folder / "training_log.jsonl") if entry["step"] <= last]
        for folder in (tmp_path / "whole", output)
    )
    assert lines == whole


def test_what_fits_in_one_hour_is_part_of_what_fits_in_two(place, tmp_path, clock):
    seen = []
    for hours in (0.25, 0.5):
        clock.ids = []
        assert train("sft", place, tmp_path / str(hours), *GIVEN, "--hours", hours) == 0
        seen.append(clock.ids)
    one, two = seen
    assert 4 < len(one) < len(two) and two[: len(one)] == one


def test_more_hours_prolong_a_run(place, tmp_path, clock, capsys):
    output = tmp_path / "out"
    assert train("sft", place, output, *GIVEN, "--hours", 0.5) == 0
    steps = read_json(output / "run.json")["results"]["steps"]
    assert train("sft", place, output, *GIVEN) == 0
    assert f"prolonging the run that was finished after step {steps}" in capsys.readouterr().out
    record = read_json(output / "run.json")
    assert record["results"]["steps"] > 1.7 * steps and 0.95 * HOUR < clock.now - 1000.0 <= 1.01 * HOUR
    assert rates(output)[steps] < rates(output)[steps + 3] > rates(output)[-1]
