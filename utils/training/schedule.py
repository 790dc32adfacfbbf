"""How a run goes from its first step to its last: learning rate, evaluations, and the time that HOURS gives.

Everything follows from the run's progress, which grows from 0 to 1: the larger of the share of the steps that are done and the
share of the time that is over.
"""

import datetime
import math
import time
from typing import NamedTuple

STEPS = 50  # the time of a step is averaged over about so many
SETTLED = 3  # steps that are timed before the time left is told
ENDING = 2.0  # seconds: the last picture, run.json, the interpreter's end
AIM = 0.99  # share of HOURS that is planned with
DISK = 200e6  # bytes written per second, with their checksum, until a checkpoint was timed
SHARE_OF_EVALUATIONS = 0.05  # of the run's time, at most
FORWARD = (
    0.5  # time of a token in an evaluation against one in training: a third for SFT, up to a half for LoRA
)
EVAL_ROWS = (
    50,
    500,
)  # below the first, evaluations become fewer instead; above the second, more say little more


class Schedule(NamedTuple):
    """The course of one run, as it stands in run.json."""

    steps: int  # at most: HOURS may end the run earlier
    warmup: int  # steps with a rising learning rate
    evaluations: int  # beside the one before training
    warmup_share: float = 0.0  # with HOURS: progress at which the warm-up ends at the latest

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of the step that follows `step` finished ones, as a share of the peak: above 0 for each.

        It rises evenly over the warm-up, and a cosine over the whole run brings it down to zero.
        """
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        if self.warmup_share:  # the number of steps was only judged
            rising = max(rising, min(1.0, progress / self.warmup_share))
        return rising * (1 + math.cos(math.pi * progress)) / 2

    def evaluations_due(self, progress: float) -> int:
        """The number of evaluations that are due by then, the one before training not counted."""
        return math.floor(progress * self.evaluations + 1e-9)


def plan_evaluations(rows: int, evaluations: int, tokens: float, tokens_per_row: float) -> tuple[int, int]:
    """(rows of an evaluation, evaluations after the one before training).

    rows: as the user said, or with 0 so many that all evaluations take 5 % of the time of training on `tokens` tokens at most: 50 to
    500, of a short run fewer evaluations, and only of one that cannot afford two evaluations of 50 rows fewer rows.
    """
    if rows:
        return rows, evaluations
    affordable = SHARE_OF_EVALUATIONS * tokens / (FORWARD * tokens_per_row)  # rows, over all evaluations
    fewest, most = EVAL_ROWS
    each = affordable / (evaluations + 1)  # the one before training counts
    rows = round(max(8, min(most, max(each, min(fewest, affordable / 2)))))
    return rows, max(1, min(evaluations, math.floor(affordable / rows) - 1))


class Clock:
    """The time that a run has taken, in this process and in those before it (`before`), and the `seconds` that its parts take.

    began: when the process began, in monotonic seconds; hours: given to the run, 0: no limit; checkpoint_minutes: between two
    checkpoints, 0: no limit; checkpoint, model: bytes of a checkpoint and of the finished model.
    """

    def __init__(self, began: float, hours: float, checkpoint_minutes: float, checkpoint: int, model: int):
        self.began, self.before, self.limit = began, 0.0, AIM * 3600 * hours or math.inf
        self.seconds = {"step": 0.0, "evaluation": 0.0, "checkpoint": checkpoint / DISK}
        self.saving, self.between_checkpoints = model / checkpoint, 60 * checkpoint_minutes or math.inf
        self.steps, self.last_step = 0, 0.0  # steps of this process, and seconds of the latest
        self.mark = self.last_save = time.monotonic()

    def elapsed(self) -> float:
        """Seconds that the run has run."""
        return self.before + time.monotonic() - self.began

    def start(self) -> None:
        """What comes next is timed from now on."""
        self.mark = time.monotonic()

    def ended(self, part: str) -> None:
        """A step, an evaluation or a checkpoint has ended. It took the time since the one before."""
        now = time.monotonic()
        seconds, self.mark = now - self.mark, now
        if part == "checkpoint":
            self.last_save = now
        if part == "step":
            # The first step of a process also makes kernels and buffers: the second one replaces it.
            self.steps, self.last_step = self.steps + 1, seconds
            weight = max(1 / max(self.steps - 1, 1), 1 / STEPS)
            seconds = self.seconds["step"] + weight * (seconds - self.seconds["step"])
        self.seconds[part] = seconds

    @property
    def checkpoint_due(self) -> bool:
        return time.monotonic() - self.last_save > self.between_checkpoints

    def ending(self) -> float:
        """Seconds from the last step to the end of the process, but for the last evaluation."""
        return (1 + self.saving) * self.seconds["checkpoint"] + ENDING

    def progress(self) -> float:
        """The share of the time that is over; 1 if no further step fits in. 0 without a limit."""
        training = self.limit - self.seconds["evaluation"] - self.ending()
        full = self.elapsed() + max(self.seconds["step"], self.last_step) > training
        return 1.0 if full else self.elapsed() / training

    def seconds_left(self, schedule: Schedule, step: int, progress: float) -> float:
        """Seconds until the process ends: the steps after `step`, evaluations, a checkpoint, and the finished model."""
        evaluations = schedule.evaluations - schedule.evaluations_due(progress)
        each = self.seconds["step"] * (1 + self.seconds["checkpoint"] / self.between_checkpoints)
        left = (schedule.steps - step) * each + evaluations * self.seconds["evaluation"] + self.ending()
        return min(left, max(0.0, self.limit - self.elapsed()))


def done_at(seconds: float) -> str:
    """The time of day in so many seconds; with the date if that is not today."""
    now = datetime.datetime.now()
    then = now + datetime.timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%H:%M on %Y-%m-%d}"
