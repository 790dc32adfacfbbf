"""Before hours are spent: how an optimizer step is computed on this machine, and whether memory and disk hold the run.

The user sets the rows of an optimizer step. How many of them go through the model at once follows from the memory: as many as are
worth it, else fewer, else one whose activations are computed twice instead of kept (gradient checkpointing, Chen et al. 2016,
arXiv:1604.06174), else the run is refused. All ways give the same result but for rounding.
"""

import math
import shutil
from typing import NamedTuple

import numpy

from utils.device import Device
from utils.errors import UserError
from utils.files import show_path
from utils.model.packing import ROUNDED, PackedRows, wants_rows_of_one_length
from utils.text import format_bytes
from utils.training.memory import FLOAT, Costs, free_memory, measure_costs, memory_parts

# Tokens in one pass from which on more bring no speed: products of the CPU are near their peak at 1,024 already.
ENOUGH_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 32768}


class StepPlan(NamedTuple):
    """How a process computes an optimizer step: `passes` batches of `rows_at_once` packed rows."""

    rows_at_once: int
    passes: int
    recompute: bool  # activations are computed again in the backward pass

    def __str__(self) -> str:
        rows = f"{self.rows_at_once} row{'s' if self.rows_at_once > 1 else ''} at once"
        again = ", activations recomputed (a third slower)" if self.recompute else ""
        return f"{rows}, {self.passes} pass{'es' if self.passes > 1 else ''} a step{again}"


def check_settings(settings) -> None:
    """UserError, by name, where a number of a training's settings makes no sense, before anything is loaded."""
    above_zero = ("EPOCHS", "LEARNING_RATE", "MAX_LENGTH", "ROWS_PER_STEP", "EVALUATIONS", "KEEP_CHECKPOINTS")
    not_below = ("MAX_STEPS", "EVAL_ROWS", "WARMUP", "WEIGHT_DECAY", "CHECKPOINT_MINUTES", "HOURS")
    for names, fits, wanted in (
        (above_zero, lambda value: value > 0, "more than 0"),
        (not_below, lambda value: value >= 0, "0 or more"),
    ):
        for name in names:
            if not fits(value := getattr(settings, name)):
                raise UserError(f"--{name.lower().replace('_', '-')} is {value}, wanted {wanted}")
    if settings.WARMUP >= 1:
        raise UserError(f"--warmup is {settings.WARMUP}, wanted a share of the steps, such as 0.03")
    if settings.KEEP not in ("best", "last"):
        raise UserError(f"--keep is {settings.KEEP!r}, wanted best or last")


def rows_of_each_process(rows_per_step: int, processes: int) -> int:
    """UserError where the rows of a step cannot be shared out evenly."""
    if rows_per_step < 1 or rows_per_step % processes:
        raise UserError(
            f"--rows-per-step is {rows_per_step}, wanted a multiple of the {processes} processes"
            if processes > 1
            else f"--rows-per-step is {rows_per_step}, wanted 1 or more"
        )
    return rows_per_step // processes


def ways(rows: int) -> list[StepPlan]:
    """All ways to compute a step of `rows` rows, the one with the fewest passes first."""
    divisors = [count for count in range(rows, 0, -1) if rows % count == 0]
    return [StepPlan(count, rows // count, False) for count in divisors] + [StepPlan(1, rows, True)]


def plan_step(model, train_rows: PackedRows, settings, device: Device, run) -> StepPlan:
    """Choose how steps are computed, print it with the memory it needs, and return it; UserError where nothing fits.

    The plan is kept in run.json: a run that goes on keeps it, and ends in the same bits.
    """
    possible = ways(rows_of_each_process(settings.ROWS_PER_STEP, run.processes.num_processes))
    costs, free = measure_costs(model, device.bf16), free_memory(device)
    lengths = len(numpy.unique(train_rows.sizes.lengths))

    def parts(plan: StepPlan) -> dict[str, int]:
        # MPS has no fused kernel for training.
        row_length = train_rows.max_length if device.name == "mps" else 0
        tokens = tokens_at_once(train_rows, plan, device)
        return memory_parts(costs, tokens, plan.recompute, device, row_length, plan.passes, lengths)

    needed = {plan: sum(parts(plan).values()) for plan in possible}
    kept = StepPlan(*run.record["plan"]) if run.checkpoint and "plan" in run.record else None
    plan = kept or choose(possible, needed, free, train_rows.max_length, device)
    if settings.ESTIMATE:
        for way in possible:
            fits = "chosen" if way == plan else "fits" if needed[way] <= free else "does not fit"
            print(f"  {way!s:<72} {format_bytes(needed[way]):>9}  {fits}")
    if plan is None:
        least = min(needed.values())
        raise UserError(
            f"the run needs {format_bytes(least)} of memory even with one row at once and activations recomputed, and "
            f"{format_bytes(free)} are free; {_what_would_fit(costs, parts(possible[-1]), free, train_rows, model)}"
        )
    if not settings.ESTIMATE:
        run.record.update(plan=list(plan), memory_forecast_bytes=needed[plan])
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts(plan).items())
    print(f"memory: {format_bytes(needed[plan])} needed ({listed}), {format_bytes(free)} free; {plan}")
    return plan


def choose(
    possible: list[StepPlan], needed: dict[StepPlan, int], free: int, max_length: int, device: Device
) -> StepPlan | None:
    """The first way that fits and is worth it: no more tokens at once than bring speed on this device."""
    enough = max(1, ENOUGH_TOKENS[device.name] // max_length)
    worth = [plan for plan in possible if plan.rows_at_once <= enough or plan == possible[-1]]
    return next((plan for plan in worth if needed[plan] <= free), None)


def tokens_at_once(train_rows: PackedRows, plan: StepPlan, device: Device) -> int:
    """Tokens of the largest batch."""
    if wants_rows_of_one_length(device.name, device.bf16):
        return plan.rows_at_once * train_rows.max_length
    return math.ceil(train_rows.fullest(plan.rows_at_once) / ROUNDED) * ROUNDED


def _what_would_fit(costs: Costs, parts: dict[str, int], free: int, train_rows: PackedRows, model) -> str:
    tokens = train_rows.fullest(1)
    per_token = (parts["activations"] + parts["fragments"] - costs.kept / costs.layers) / tokens
    room = tokens - (sum(parts.values()) - free) / per_token
    if room >= 128:
        return f"lower MAX_LENGTH to {int(room):,} tokens"
    return (
        "train with LoRA, or a smaller model"
        if costs.head_trained
        else "close other programs, or take a smaller model"
    )


def check_disk(model, settings, folder) -> None:
    """Print the disk that checkpoints and finished model need; UserError where they do not fit."""
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    stored = sum(weight.numel() for weight in model.parameters())
    checkpoints = settings.KEEP_CHECKPOINTS + 1  # a new one is whole before an old one goes
    best = 2 * (settings.KEEP == "best")  # copies of the best weights: one is whole before the other goes
    # weights and two moments in each checkpoint
    needed = ((3 * checkpoints + best) * trainable + stored) * FLOAT
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    print(
        f"disk: {format_bytes(needed)} needed (at most {checkpoints} checkpoints at a time, {best} copies of the best weights, "
        f"the finished model), "
        f"{format_bytes(free)} free"
    )
    if needed > free:
        raise UserError(
            f"{show_path(folder)} needs {format_bytes(needed)} of disk and {format_bytes(free)} are free; free some, lower "
            "KEEP_CHECKPOINTS, or choose another --output-dir"
        )
