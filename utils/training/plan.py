"""Before hours are spent: how an optimizer step is computed on this machine, and whether memory and disk hold the run.

The user sets the rows of an optimizer step. How many of them go through the model at once follows from the memory: as many as are
worth it, else fewer, else one whose activations are computed twice instead of kept (gradient checkpointing, Chen et al. 2016,
arXiv:1604.06174), else the run is refused. All ways give the same result but for rounding.
"""

import math
import shutil
import time
from typing import NamedTuple

import torch

from utils.device import Device
from utils.errors import UserError
from utils.files import show_path
from utils.model.batching import (
    ROUNDED,
    PackedRows,
    collate,
    model_inputs,
    padding_for,
    wants_rows_of_one_length,
)
from utils.model.lm_head import cross_entropy_sum
from utils.text import duration, format_bytes
from utils.training.memory import FLOAT, Costs, free_memory, measure_costs, memory_parts

RECOMPUTED = (
    4 / 3
)  # a second forward pass beside one of each kind, of which the backward pass takes two thirds
TIMED_TOKENS = 512  # of the row that an estimate is measured on, about
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

    def parts(plan: StepPlan) -> dict[str, int]:
        row_length = (
            train_rows.max_length if device.name == "mps" else 0
        )  # no fused kernel for training there
        tokens = tokens_at_once(train_rows, plan, device)
        return memory_parts(costs, tokens, plan.recompute, device, row_length)

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
    per_token = (parts["activations"] - costs.kept / costs.layers) / tokens
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
    needed = (3 * trainable * checkpoints + stored) * FLOAT  # weights and two moments in each
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    print(
        f"disk: {format_bytes(needed)} needed (at most {checkpoints} checkpoints at a time, and the finished model), "
        f"{format_bytes(free)} free"
    )
    if needed > free:
        raise UserError(
            f"{show_path(folder)} needs {format_bytes(needed)} of disk and {format_bytes(free)} are free; free some, lower "
            "KEEP_CHECKPOINTS, or choose another --output-dir"
        )


class RunSize(NamedTuple):
    steps: int
    tokens_per_step: float  # on average


def measure_run(
    train_rows: PackedRows, eval_rows: PackedRows, plan: StepPlan, settings, processes: int
) -> RunSize:
    """Share the rows out evenly among the processes, print what is about to be trained, and count it."""
    rows_per_step = plan.rows_at_once * plan.passes * processes
    if processes > 1:
        train_rows.even_out(rows_per_step)
    steps_per_epoch = math.ceil(len(train_rows) / rows_per_step)
    steps = settings.MAX_STEPS or steps_per_epoch * int(settings.EPOCHS)
    print(
        f"training: {len(train_rows.items):,} examples, {train_rows.tokens:,} tokens ({train_rows.trained_tokens:,} trained) in "
        f"{len(train_rows):,} packed rows; evaluation: {len(eval_rows.items):,} examples; {steps:,} steps"
        + (f" on {processes} processes" if processes > 1 else "")
    )
    return RunSize(steps, train_rows.tokens / steps_per_epoch)


def estimate_hours(model, train_rows: PackedRows, size: RunSize, plan: StepPlan, device: Device) -> None:
    """Print how long the run will take, from a forward and backward pass over one of its rows, which is then thrown away."""
    model.train().to(device.name)
    rate = max(_tokens_per_second(model, train_rows, device) for _ in range(2))  # the first pass warms up
    print("time: " + ", ".join(_hours_of_ways(size, rate, plan)))


def _tokens_per_second(model, train_rows: PackedRows, device: Device) -> float:
    row = train_rows[int(abs(train_rows.row_lengths() - TIMED_TOKENS).argmin())]
    batch = collate([row], padding_for(device.name, device.bf16, train_rows.max_length))
    batch = {name: part.to(device.name) if torch.is_tensor(part) else part for name, part in batch.items()}
    began = time.monotonic()
    with torch.autocast(device.name, torch.bfloat16, enabled=device.bf16):
        loss = cross_entropy_sum(
            model(**model_inputs(batch)), model.get_output_embeddings().weight, batch["targets"]
        )
    loss.backward()
    loss.item()  # waits for the device
    seconds = time.monotonic() - began
    for weight in model.parameters():
        weight.grad = None
    return sum(len(prompt) + len(answer) for item in row for prompt, answer in item["documents"]) / seconds


def _hours_of_ways(size: RunSize, rate: float, plan: StepPlan) -> list[str]:
    seconds = size.steps * size.tokens_per_step / rate
    kept, again = duration(seconds), duration(seconds * RECOMPUTED)
    told = again if plan.recompute else kept
    other = f"activations kept {kept}" if plan.recompute else f"with activations recomputed {again}"
    return [
        f"about {told} of training at {rate:,.0f} tokens/s, measured on one row",
        other,
        "evaluations and checkpoints apart",
    ]
