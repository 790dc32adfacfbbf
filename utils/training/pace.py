"""What the parts of a run take, measured while it goes; the time that is left, and how many steps fit into it."""

import datetime
import math
import statistics
import time
from typing import Any

from utils.training.schedule import Schedule

STEPS = 50  # the time of a step is averaged over about so many
SETTLED = 3  # steps that are timed before the time left is told
ENDING = 2.0  # seconds: the last picture, run.json, the interpreter's end
# Of the time that HOURS gives:
AIM = 0.99  # is planned with
AVERAGED = 0.04  # the time of a step is averaged over about so much
LATE, EARLY = 0.005, 0.015  # so much too late, or too early, changes the plan
APART = 0.02  # before the first change, and between two of them, but for the last part of the run
LAST = 0.9  # from here on


class Pace:
    """Seconds of an optimizer step, an evaluation, a checkpoint, each measured from the event before it.

    checkpoint, saving: seconds that a checkpoint and the finished model are expected to take, the first until one is written;
    began: when the process began, in monotonic seconds; limit: seconds given to the run, or infinity.
    """

    def __init__(
        self,
        checkpoint: float,
        saving: float,
        checkpoint_minutes: float,
        steps_per_epoch: int,
        began: float,
        limit: float,
    ):
        self.seconds = {"step": 0.0, "evaluation": 0.0, "checkpoint": checkpoint}
        self.saving, self.steps_per_epoch = saving, steps_per_epoch
        self.between_checkpoints = 60 * checkpoint_minutes or math.inf
        self.began, self.limit = began, limit
        self.steps, self.timed = 0, 0.0  # steps so far, and seconds of them
        self.first: list[float] = []  # seconds of this process's steps, as long as there is no plan by them
        self.mark = self.last_save = self.pending = self.planned = self.before = 0.0

    def begin(self, kept: dict[str, Any] | None = None) -> None:
        """Training begins. `kept`: what `as_dict` said when the checkpoint was written that the run goes on from."""
        self.mark = self.last_save = time.monotonic()
        if kept:
            self.before, self.seconds = kept["elapsed"], dict(kept["seconds"])
            self.steps, self.timed, self.planned = kept["steps"], kept["timed"], kept["planned"]

    def as_dict(self) -> dict[str, Any]:
        """As it stands in run.json beside a checkpoint."""
        return {
            "elapsed": self.elapsed(),
            "steps": self.steps,
            "timed": self.timed,
            "seconds": dict(self.seconds),
            "planned": self.planned,
        }

    def elapsed(self) -> float:
        """Seconds that the run has run, in this process and in those before it."""
        return self.before + time.monotonic() - self.began

    def hold(self) -> None:
        """What was done since the last event belongs to the next step, whatever event comes first."""
        now = time.monotonic()
        self.pending, self.mark = self.pending + now - self.mark, now

    def ended(self, kind: str) -> None:
        """A step, an evaluation or a checkpoint is over; what happened since the last event was part of it."""
        now = time.monotonic()
        seconds, self.mark = now - self.mark, now
        if kind == "step":
            seconds, self.pending = seconds + self.pending, 0.0
            self.steps, self.timed = self.steps + 1, self.timed + seconds
            self.first = [*self.first, seconds][-STEPS:]
            seconds = self.seconds["step"] + self._weight() * (seconds - self.seconds["step"])
        if kind == "checkpoint":
            self.last_save = now
        self.seconds[kind] = seconds

    def _weight(self):
        """How much the latest step counts. The first one also makes kernels and buffers: the second replaces it."""
        window = STEPS
        if self.limit < math.inf and self.seconds["step"]:
            window = max(SETTLED, AVERAGED * self.limit / self.seconds["step"])
        return max(1 / max(self.steps - 1, 1), 1 / window)

    @property
    def settled(self) -> bool:
        """Whether enough steps were timed to tell how long the run will take."""
        return self.steps >= SETTLED

    @property
    def checkpoint_due(self) -> bool:
        return time.monotonic() - self.last_save > self.between_checkpoints

    def seconds_left(self, schedule: Schedule, step: int) -> float:
        """Until the process ends: the steps after `step`, evaluations, checkpoints, and the finished model."""
        return (schedule.total - step) * self.seconds_per_step() + self.seconds_beside(schedule, step)

    def seconds_per_step(self) -> float:
        """A step with its share of the checkpoints that are written by the clock and at the ends of epochs."""
        step, checkpoint = self.seconds["step"], self.seconds["checkpoint"]
        return step + step * checkpoint / self.between_checkpoints + checkpoint / self.steps_per_epoch

    def seconds_beside(self, schedule: Schedule, step: int) -> float:
        """What is still to come after `step`, however many steps there will be."""
        evaluations = schedule.evaluations - schedule.evaluations_done(step)
        return evaluations * self.seconds["evaluation"] + self.seconds["checkpoint"] + self.saving + ENDING

    def new_total(self, schedule: Schedule, step: int, most: int) -> int:
        """The number of steps, `most` at most, at which the run should end after `step`, so as to end in time; 0: as planned.

        A plan that was made for a later step already, before the run was stopped, is kept until then.
        """
        if schedule.plan[-1].step == step:  # as it was recorded before the run was stopped
            self.planned = self.elapsed()
            return 0
        first = len(schedule.plan) == 1
        enough = self.timed >= APART * self.limit or step >= schedule.total - 1
        if self.limit == math.inf or not self.settled or not enough or schedule.plan[-1].step > step:
            return 0
        if first:
            self.seconds["step"] = statistics.median(self.first)
        each, elapsed = self.seconds_per_step(), self.elapsed()
        left = AIM * self.limit - elapsed - self.seconds_beside(schedule, step)
        fits = min(most, step + max(0, math.floor(left / each)))
        too_long = (schedule.total - fits) * each  # seconds; below 0: too short
        apart = APART * self.limit if elapsed < LAST * self.limit else 0.0
        if first or elapsed - self.planned >= apart:
            late = too_long > max(each, LATE * self.limit)
            early = -too_long > max(2 * each, EARLY * self.limit)
            if fits != schedule.total and (first or late or early):
                self.planned = elapsed
                return fits
        return 0


def done_at(seconds: float) -> str:
    """The time of day in so many seconds; with the date where that is not today."""
    now = datetime.datetime.now()
    then = now + datetime.timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%H:%M on %Y-%m-%d}"
