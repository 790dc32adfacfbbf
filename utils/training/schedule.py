"""How a run goes from its first step to its last: learning rate, evaluations, length, and what of it was changed underway.

Everything is a function of the run's progress, which grows from 0 to 1 with the steps. The plan in run.json says how fast: each of its
entries sets the total number of steps anew, from a certain step on. Progress has no jump there, so that a run which has to end
earlier goes down the rest of the same curve in fewer steps. A run that goes on reads the plan again, and computes the same.
"""

import math
from typing import Any, NamedTuple

from utils.training.run_folder import RunFolder

SHARE_OF_EVALUATIONS = 0.05  # of the run's time, at most
FORWARD = (
    0.5  # cost of a token in an evaluation against one in training: a third for SFT, up to a half for LoRA
)
MOST_EVAL_ROWS = 500  # conversations: more say little more about a small model
FEWEST_EVAL_ROWS = 50  # below that, evaluations become fewer instead


class Change(NamedTuple):
    step: int  # from here on
    total: int  # the run ends after so many steps
    reason: str


class Schedule:
    """The course of one run. `start`: the step it began at, 0 unless it prolongs a finished run."""

    def __init__(self, start: int, warmup: int, evaluations: int, plan: list[Change]):
        self.start, self.warmup, self.evaluations, self.plan = start, warmup, evaluations, plan

    @property
    def total(self) -> int:
        """The number of steps at which the run ends, by the latest plan."""
        return self.plan[-1].total

    def progress(self, step: int) -> float:
        """The share of the run that is done after `step` steps: 0 at its start, 1 at its end."""
        done = 0.0
        for change, after in zip(self.plan, [*self.plan[1:], None]):
            if change.step > step:
                break
            upto = step if after is None else min(step, after.step)
            if upto >= change.total:
                return 1.0
            done += (1.0 - done) * (upto - change.step) / (change.total - change.step)
        return done

    def rate(self, step: int) -> float:
        """The learning rate of the step that follows `step` finished ones, as a share of the peak: above 0 for each.

        It rises evenly over the warm-up, and a cosine over the whole run brings it down to zero.
        """
        rising = min(1.0, (step - self.start + 1) / (self.warmup + 1))
        return rising * (1 + math.cos(math.pi * self.progress(step))) / 2

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows `step` steps: at the start, then evenly, and at the end."""
        return step == self.start or self.evaluations_done(step) > self.evaluations_done(step - 1)

    def evaluations_done(self, step: int) -> int:
        """How many of the evaluations are due by `step`, that of the start not counted."""
        return math.floor(self.progress(step) * self.evaluations + 1e-9)

    def change(self, step: int, total: int, reason: str) -> None:
        """From `step` on, the run ends after `total` steps."""
        self.plan.append(Change(step, total, reason))

    def as_dict(self) -> dict[str, Any]:
        """As it stands in run.json."""
        return {
            "start": self.start,
            "warmup": self.warmup,
            "evaluations": self.evaluations,
            "plan": [list(change) for change in self.plan],
        }


def make_schedule(settings, run: RunFolder, steps: int, evaluations: int, reason: str) -> Schedule:
    """The schedule of a run that ends after `steps` steps; a run that goes on keeps what its run.json says."""
    if kept := run.record.get("schedule"):
        plan = [Change(*change) for change in kept["plan"]]
        return Schedule(kept["start"], kept["warmup"], kept["evaluations"], plan)
    start = run.first_step
    schedule = Schedule(
        start, math.ceil(settings.WARMUP * (steps - start)), evaluations, [Change(start, steps, reason)]
    )
    run.record["schedule"] = schedule.as_dict()
    return schedule


def evaluation_rows(wanted: int, tokens: float, tokens_per_row: float, evaluations: int) -> int:
    """How many rows an evaluation takes: `wanted`, or with 0 so many that all evaluations take 5 % of the run's time at most.

    `tokens`: of the whole training. Between 50 and 500 rows; a run so short that 50 are too many is evaluated less often
    (`evaluation_count`), and only one that cannot afford even two evaluations of 50 takes fewer.
    """
    if wanted:
        return wanted
    affordable = SHARE_OF_EVALUATIONS * tokens / (FORWARD * tokens_per_row)  # rows, over all evaluations
    rows = affordable / (evaluations + 1)  # the one before training counts
    return round(max(8, min(MOST_EVAL_ROWS, max(rows, min(FEWEST_EVAL_ROWS, affordable / 2)))))


def evaluation_count(wanted_rows: int, tokens: float, eval_tokens: int, evaluations: int) -> int:
    """How many evaluations follow the one before training: `evaluations`, or fewer where they would take over 5 % of the time.

    Where the user said how many rows an evaluation takes (`wanted_rows`), there are as many evaluations as asked for.
    """
    if wanted_rows:
        return evaluations
    affordable = math.floor(SHARE_OF_EVALUATIONS * tokens / (FORWARD * eval_tokens))
    return max(1, min(evaluations, affordable - 1))
