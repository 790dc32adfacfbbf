"""Before hours are spent: how an optimizer step is computed on this machine, whether memory and disk hold the run, and its hours.

The user sets the rows of an optimizer step. How many of them go through the model at once follows from the memory: as many as are
worth it, else fewer, else one whose activations are computed twice instead of kept (gradient checkpointing, Chen et al. 2016,
arXiv:1604.06174), else the run is refused. All ways give the same result but for rounding.
"""

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from utils.device import Device
from utils.errors import UserError
from utils.files import show_path
from utils.model.lm_head import cross_entropy_sum
from utils.model.packing import (
    ROUNDED,
    Item,
    PackedRows,
    collate,
    item_length,
    padding_for,
    wants_rows_of_one_length,
)
from utils.model.qwen3_train import forward
from utils.text import duration, format_bytes
from utils.training.memory import (
    ALLOCATOR_BYTES,
    ALLOCATOR_SHARE,
    FLOAT,
    Costs,
    StepPlan,
    free_memory,
    measure_costs,
    memory_parts,
    ways,
)
from utils.training.run import Run
from utils.training.schedule import ENDING, Schedule, done_at, evaluation_count, evaluation_rows

# Tokens in one pass from which on more bring no speed: products of the CPU are near their peak at 1,024 already.
ENOUGH_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 32768}
FEW_STEPS = 30  # a run of fewer is hardly more than its warm-up
MARGIN = 1.25  # more pairs than should fit into HOURS
TIMED_TOKENS = 512  # that a CPU is timed on, about
WRITTEN = 16 << 20  # bytes that the disk's speed is measured on


class Plan(NamedTuple):
    """A run that is about to begin."""

    train_rows: PackedRows
    eval_rows: PackedRows
    schedule: Schedule
    steps_per_epoch: int
    tokens_per_step: float  # on average
    train_rate: (
        float  # tokens a second, in all processes: measured for an estimate, else judged by a forward pass
    )
    checkpoint_seconds: float
    saving_seconds: float  # of the finished model


def plan_run(
    run: Run, model, train_rows: PackedRows, load_eval: Callable[[int], PackedRows], conversations: str
) -> Plan:
    """Plan memory, steps, evaluations and hours, and print all of it. UserError, with the numbers, if something does not fit.

    load_eval(count): so many rows to evaluate on; conversations: "single" or "several" questions in a row. With HOURS, DPO takes the
    pairs that can be trained on in that time: the reference of each costs a forward pass before training.
    """
    settings, pairs = run.settings, "BETA" in vars(run.settings)
    way = plan_step(run, model, train_rows)
    forward = -run.smallest(-rate_of(run, model, train_rows, way, backward=False)) * run.processes
    trainable, stored = count_weights(model)
    passes = (
        3 if 2 * trainable > stored else 2
    )  # in forward passes: the backward one takes as long as two, or as one
    if pairs and settings.HOURS:
        train_rows = draw_in_time(run, train_rows, forward / (1 + passes))
    rows_per_step = way.rows_at_once * way.passes * run.processes
    if run.processes > 1:
        train_rows.even_out(rows_per_step)
    steps_per_epoch = math.ceil(len(train_rows) / rows_per_step)
    steps = settings.MAX_STEPS or math.ceil(steps_per_epoch * settings.EPOCHS)
    print(
        f"training: {len(train_rows.items):,} examples, {train_rows.tokens:,} tokens ({train_rows.trained_tokens:,} trained) in "
        f"{len(train_rows):,} packed rows; {steps:,} steps"
        + (f" on {run.processes} processes" if run.processes > 1 else "")
    )
    if steps < FEW_STEPS and not settings.MAX_STEPS:
        advice = more_steps(train_rows, settings)
        print(f"warning: only {steps} optimizer steps, too few to learn much; {advice}")
    train_rate = forward / passes * (3 / 4 if way.recompute else 1)
    if settings.ESTIMATE:
        train_rate = rate_of(run, model, train_rows, way, backward=True) * run.processes
    tokens_per_step = train_rows.tokens / steps_per_epoch
    planned = steps
    if settings.HOURS:
        planned = min(steps, max(1, int(3600 * settings.HOURS * train_rate / tokens_per_step)))
    tokens, per_row = planned * tokens_per_step, train_rows.tokens / len(train_rows.items)
    count = evaluation_rows(settings.EVAL_ROWS, tokens, per_row, settings.EVALUATIONS)
    eval_rows = load_eval(run.keep("eval_rows", count))
    check_disk(run, model)
    evaluations = evaluation_count(settings.EVAL_ROWS, tokens, eval_rows.tokens, settings.EVALUATIONS)
    share = settings.WARMUP if settings.HOURS else 0.0
    schedule = Schedule(steps, math.ceil(settings.WARMUP * planned), evaluations, share)
    schedule = Schedule(**run.from_main(run.keep("schedule", schedule._asdict())))
    run.keep("conversations", conversations)
    disk = disk_seconds_per_byte(run.folder, trainable * FLOAT) * FLOAT
    plan = Plan(
        train_rows,
        eval_rows,
        schedule,
        steps_per_epoch,
        tokens_per_step,
        train_rate,
        3 * trainable * disk,
        stored * disk,
    )
    _tell_hours(run, plan, planned, forward, pairs)
    return plan


# ---- Memory and disk


def plan_step(run: Run, model, train_rows: PackedRows) -> StepPlan:
    """Choose how steps are computed, print it with the memory it needs, and return it; UserError if nothing fits.

    The choice is kept in run.json: a run that goes on keeps it, and ends in the same bits. Of several processes the one with
    the least memory decides, as all have to compute in the same way.
    """
    settings, device = run.settings, run.device
    if device.name == "cuda":  # its forms of attention are others than a CPU's
        model.to(run.accelerator.device)
    possible = ways(rows_of_each_process(settings.ROWS_PER_STEP, run.processes))
    usual = int(train_rows.sizes.lengths.mean())
    costs, free = measure_costs(model, device.bf16, usual), int(run.smallest(free_memory(device)))
    lengths = len(numpy.unique(train_rows.sizes.lengths))

    def parts(way: StepPlan) -> dict[str, int]:
        # MPS has no fused kernel for training.
        row_length = train_rows.max_length if device.name == "mps" else 0
        tokens = tokens_at_once(train_rows, way, device)
        return memory_parts(costs, tokens, way.recompute, device, row_length, way.passes, lengths)

    needed = {way: sum(parts(way).values()) for way in possible}
    usable = free - (int(ALLOCATOR_SHARE * free) + ALLOCATOR_BYTES if device.name == "cuda" else 0)
    way = choose(possible, needed, usable, train_rows.max_length, device)
    if run.checkpoint:
        way = run.way(run.step)
    if settings.ESTIMATE:
        for each in possible:
            fits = "chosen" if each == way else "fits" if needed[each] <= usable else "does not fit"
            print(f"  {each!s:<72} {format_bytes(needed[each]):>9}  {fits}")
    if way is None:
        least = min(needed.values())
        raise UserError(
            f"the run needs {format_bytes(least)} of memory even with one row at once and activations recomputed, and "
            f"{format_bytes(usable)} are free; {_what_would_fit(costs, parts(possible[-1]), usable, train_rows)}"
        )
    run.keep("plan", [[0, *way]])
    run.keep("memory_forecast_bytes", needed[way])
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts(way).items() if size)
    print(f"memory: {format_bytes(needed[way])} needed ({named}), {format_bytes(usable)} free; {way}")
    return way


def rows_of_each_process(rows_per_step: int, processes: int) -> int:
    """UserError if the rows of a step cannot be shared out evenly."""
    if rows_per_step % processes:
        raise UserError(f"--rows-per-step is {rows_per_step}, wanted a multiple of the {processes} processes")
    return rows_per_step // processes


def choose(
    possible: list[StepPlan], needed: dict[StepPlan, int], free: int, max_length: int, device: Device
) -> StepPlan | None:
    """The first way that fits and is worth it: no more tokens at once than bring speed on this device."""
    enough = max(1, ENOUGH_TOKENS[device.name] // max_length)
    worth = [way for way in possible if way.rows_at_once <= enough or way == possible[-1]]
    return next((way for way in worth if needed[way] <= free), None)


def tokens_at_once(train_rows: PackedRows, way: StepPlan, device: Device) -> int:
    """Tokens of the largest batch."""
    if wants_rows_of_one_length(device.name, device.bf16):
        return way.rows_at_once * train_rows.max_length
    return math.ceil(train_rows.fullest(way.rows_at_once) / ROUNDED) * ROUNDED


def _what_would_fit(costs: Costs, parts: dict[str, int], free: int, train_rows: PackedRows) -> str:
    tokens = train_rows.fullest(1)
    per_token = (parts["activations"] + parts["fragments"] - costs.kept / costs.layers) / tokens
    room = tokens - (sum(parts.values()) - free) / per_token
    if room >= 128:
        return f"lower MAX_LENGTH to {int(room):,} tokens"
    smaller = "train with LoRA, or a" if costs.head_trained else "close other programs, or take a"
    return f"{smaller} smaller model"


def check_disk(run: Run, model) -> None:
    """Print the disk that checkpoints and finished model need; UserError if they do not fit."""
    settings, folder = run.settings, run.folder
    trainable, stored = count_weights(model)
    checkpoints = settings.KEEP_CHECKPOINTS + 1  # a new one is whole before an old one goes
    best = 2 * (settings.KEEP == "best")  # copies of the best weights: one is whole before the other goes
    # weights and two moments in each checkpoint
    needed = ((3 * checkpoints + best) * trainable + stored) * FLOAT
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    print(
        f"disk: {format_bytes(needed)} needed (at most {checkpoints} checkpoints at a time, {best} copies of the best weights, "
        f"the finished model), {format_bytes(free)} free"
    )
    if needed > free:
        raise UserError(
            f"{show_path(folder)} needs {format_bytes(needed)} of disk and {format_bytes(free)} are free; free some, lower "
            "KEEP_CHECKPOINTS, or choose another --output-dir"
        )


def count_weights(model) -> tuple[int, int]:
    """(weights that are trained, all weights) of a model."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


# ---- Steps and hours


def more_steps(train_rows: PackedRows, settings) -> str:
    """The change of settings that gives FEW_STEPS, the gentlest first."""
    rows = len(train_rows) * settings.EPOCHS
    if rows >= FEW_STEPS:
        return f"--rows-per-step {max(1, int(rows // FEW_STEPS))} gives {FEW_STEPS} or more"
    shorter = int(train_rows.tokens * settings.EPOCHS / FEW_STEPS * 0.9)
    longest = int(train_rows.sizes.lengths.max())
    if shorter >= longest:
        return f"--rows-per-step 1 --max-length {shorter} gives about {FEW_STEPS}: shorter packed rows are more steps"
    rows = max(1, int(train_rows.tokens / max(longest, 1)))
    return (
        f"--rows-per-step 1 --max-length {longest} --epochs {math.ceil(FEW_STEPS / rows)} gives about {FEW_STEPS}; "
        "more rows of data are better"
    )


def draw_in_time(run: Run, train_rows: PackedRows, rate: float) -> PackedRows:
    """The pairs that fit into HOURS at this rate (tokens a second), and a quarter more.

    They are those with the lowest hashes of their ids, so that what fits in one hour is part of what fits in eight.
    """
    tokens = MARGIN * 3600 * run.settings.HOURS * rate
    order = numpy.argsort(train_rows.keys, kind="stable")
    fits = int(numpy.searchsorted(numpy.cumsum(train_rows.sizes.tokens[order]), tokens)) + 1
    fits = run.keep("pairs_in_time", min(fits, len(order)))
    if fits == len(order):
        return train_rows
    print(
        f"hours: {fits:,} of {len(order):,} pairs, drawn by their ids, are more than what fits into {run.settings.HOURS:g} h"
    )
    return train_rows.select(numpy.sort(order[:fits]))


def some_items(train_rows: PackedRows, tokens: int) -> list[Item]:
    """Items of the first row, about `tokens` tokens."""
    items: list[Item] = []
    for item in train_rows[0]:
        if items and sum(map(item_length, items)) + item_length(item) > tokens:
            break
        items.append(item)
    return items


def rate_of(run: Run, model, train_rows: PackedRows, way: StepPlan, backward: bool) -> float:
    """Tokens a second of a forward pass, as an evaluation does one, or of a forward and a backward pass.

    A first pass only warms up. A CPU is timed on a part of a row; a GPU, which waits for work otherwise, on a batch of its real size.
    """
    model.train(backward).to(run.accelerator.device)
    batches = [[some_items(train_rows, tokens)] for tokens in (1, TIMED_TOKENS)]
    if run.device.name != "cpu":
        batches = [[train_rows[row] for row in range(min(way.rows_at_once, len(train_rows)))]] * 2
    for rows in batches:
        seconds = _seconds_of_pass(run, model, rows, train_rows.max_length, backward)
    for weight in model.parameters():
        weight.grad = None
    documents = [document for items in rows for item in items for document in item["documents"]]
    # Recomputing is a second forward pass; the backward pass takes as long as two.
    again = 3 / 4 if backward and way.recompute else 1
    return again * sum(len(prompt) + len(answer) for prompt, answer in documents) / seconds


def _seconds_of_pass(run, model, rows, max_length, backward):
    batch = collate(rows, padding_for(run.device.name, run.device.bf16, max_length))
    began = time.monotonic()
    with torch.set_grad_enabled(backward), run.device.autocast():
        hidden, batch = forward(model, batch, run.device)
        loss = cross_entropy_sum(hidden, model.get_output_embeddings().weight, batch["targets"])
    if backward:
        loss.backward()
    loss.item()  # waits for the device
    return max(time.monotonic() - began, 1e-6)


def disk_seconds_per_byte(folder: Path, most: int) -> float:
    """Seconds to write a byte to the disk under `folder`, with its checksum, as a checkpoint is written. Writes `most` bytes at most:
    a disk that takes the run's files takes those of this trial."""
    place = next(place for place in (folder, *folder.parents) if place.is_dir())
    block = os.urandom(min(1 << 20, most))
    blocks = min(WRITTEN, most) // len(block)
    began = time.monotonic()
    with tempfile.TemporaryFile(dir=place) as file:
        for _ in range(blocks):
            file.write(block)
            hashlib.sha256(block)
        file.flush()
        os.fsync(file.fileno())
    return (time.monotonic() - began) / (blocks * len(block))


def _tell_hours(run: Run, plan: Plan, planned: int, forward: float, pairs: bool) -> None:
    """Print how often is evaluated, and the hours to the end."""
    settings, schedule, eval_tokens = run.settings, plan.schedule, plan.eval_rows.tokens
    share = (schedule.evaluations + 1) * eval_tokens / forward
    share /= share + planned * plan.tokens_per_step / plan.train_rate
    often = f"before training and {schedule.evaluations} times in it"
    times = often if schedule.evaluations > 1 else "before and after training"
    print(
        f"evaluation: {len(plan.eval_rows.items):,} held-out examples, {times}: about {share:.1%} of the time"
    )
    if settings.HOURS:
        epochs = planned / plan.steps_per_epoch
        print(
            f"hours: {settings.HOURS:g} h given, about {planned:,} steps or {epochs:.2g} epochs; the first ones will tell better"
        )
    training = max(0, planned - run.step) * plan.tokens_per_step / plan.train_rate
    evaluations = schedule.evaluations + 1 - schedule.evaluations_due(min(1.0, run.step / planned))
    by_clock = training / (60 * settings.CHECKPOINT_MINUTES) if settings.CHECKPOINT_MINUTES else 0
    checkpoints = by_clock + math.ceil(max(0, planned - run.step) / plan.steps_per_epoch)
    reference = plan.train_rows.tokens + eval_tokens if pairs and not run.checkpoint else 0
    parts = {
        "reference": reference / forward,
        f"training at {plan.train_rate:,.0f} tokens/s": training,
        "evaluations": evaluations * eval_tokens / forward,
        "saving": checkpoints * plan.checkpoint_seconds + plan.saving_seconds + ENDING,
    }
    total = sum(parts.values())
    run.keep("time_forecast_seconds", round(total, 1))
    named = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    how = "judged by a forward pass; the first steps will tell better"
    if settings.ESTIMATE:
        how = "measured on one row"
    print(f"time: about {duration(total)}, done at {done_at(total)} ({named}; {how})")
