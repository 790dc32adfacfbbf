"""What the parts of a run take, measured while it goes, and the time that is left."""

import datetime
import math
import time

from utils.training.schedule import Schedule

STEPS = 50  # the time of a step is averaged over about so many
SETTLED = 3  # steps that are timed before the time left is told
ENDING = 2.0  # seconds: the last picture, run.json, the interpreter's end


class Pace:
    """Seconds of an optimizer step, an evaluation, a checkpoint, each measured from the event before it.

    checkpoint, saving: seconds that these two are expected to take; a checkpoint that is written corrects it.
    """

    def __init__(self, checkpoint: float, saving: float, checkpoint_minutes: float, steps_per_epoch: int):
        self.seconds = {"step": 0.0, "evaluation": 0.0, "checkpoint": checkpoint}
        self.saving, self.steps_per_epoch = saving, steps_per_epoch
        self.between_checkpoints = 60 * checkpoint_minutes or math.inf
        self.steps = 0
        self.mark = self.pending = 0.0

    def begin(self) -> None:
        """Time runs from now on."""
        self.mark, self.pending = time.monotonic(), 0.0

    def hold(self) -> None:
        """What was done since the last event belongs to the next step, whatever event comes first."""
        now = time.monotonic()
        self.pending, self.mark = self.pending + now - self.mark, now

    def ended(self, kind: str) -> None:
        """A step, an evaluation or a checkpoint is over; what happened since the last event was part of it."""
        now = time.monotonic()
        seconds, self.mark = now - self.mark, now
        if kind == "step":
            seconds, self.pending, self.steps = seconds + self.pending, 0.0, self.steps + 1
            # the first step also makes kernels and buffers: it counts only until there is another
            weight = 1.0 if self.steps < SETTLED else max(1 / (self.steps - 1), 1 / STEPS)
            seconds = self.seconds["step"] + weight * (seconds - self.seconds["step"])
        self.seconds[kind] = seconds

    @property
    def settled(self) -> bool:
        return self.steps >= SETTLED

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


def done_at(seconds: float) -> str:
    """The time of day in so many seconds; with the date where that is not today."""
    now = datetime.datetime.now()
    then = now + datetime.timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%H:%M on %Y-%m-%d}"
