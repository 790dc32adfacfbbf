"""How long a run will be, before it begins: its steps, its evaluations, and the hours to its end."""

import hashlib
import math
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from utils.device import Device
from utils.errors import UserError
from utils.files import show_path
from utils.model.lm_head import cross_entropy_sum
from utils.model.packing import Item, PackedRows, collate, item_length, model_inputs, padding_for
from utils.text import duration
from utils.training.memory import FLOAT
from utils.training.pace import ENDING, SETTLED, done_at
from utils.training.plan import StepPlan
from utils.training.run_folder import RunFolder
from utils.training.schedule import Schedule, evaluation_count, evaluation_rows, make_schedule

FEW_STEPS = 30  # a run of fewer is hardly more than its warm-up
MARGIN = 1.25  # more pairs than should fit into HOURS
TIMED_TOKENS = 512  # that a forecast is measured on, about
WRITTEN = 16 << 20  # bytes that the disk's speed is measured on


class RunSize(NamedTuple):
    steps: int  # of the whole run, at most: HOURS may end it earlier
    steps_per_epoch: int
    tokens_per_step: float  # on average
    eval_rows: int  # rows that an evaluation takes
    forward_rate: float  # tokens a second that go forward through the model, in all processes
    train_rate: float  # and that are trained on: measured for an estimate, else judged by the forward pass
    checkpoint_seconds: float
    saving_seconds: float  # of the finished model


def measure_run(
    model, train_rows: PackedRows, plan: StepPlan, settings, device: Device, run: RunFolder
) -> RunSize:
    """Share the rows out evenly among the processes, print what is about to be trained, and measure it; warn of few steps."""
    processes = run.processes.num_processes
    rows_per_step = plan.rows_at_once * plan.passes * processes
    if processes > 1:
        train_rows.even_out(rows_per_step)
    steps_per_epoch = math.ceil(len(train_rows) / rows_per_step)
    steps = settings.MAX_STEPS or math.ceil(steps_per_epoch * settings.EPOCHS)
    if steps <= run.first_step:
        raise UserError(
            f"{show_path(run.folder)} has been trained for {run.first_step} steps, and this command asks for {steps} in all: nothing "
            "is left to train; give more --epochs"
        )
    print(
        f"training: {len(train_rows.items):,} examples, {train_rows.tokens:,} tokens ({train_rows.trained_tokens:,} trained) in "
        f"{len(train_rows):,} packed rows; {steps:,} steps"
        + (f" on {processes} processes" if processes > 1 else "")
    )
    if steps - run.first_step < FEW_STEPS and not settings.MAX_STEPS:
        print(
            f"warning: only {steps - run.first_step} optimizer steps, too few to learn much; {_more_steps(train_rows, settings)}"
        )
    tokens_per_step = train_rows.tokens / steps_per_epoch
    forward = run.from_main(forward_rate(model, train_rows, device)) * processes
    trainable, stored = count_weights(model)
    if settings.ESTIMATE:
        training = train_rate(model, train_rows, plan, device) * processes
    else:  # in passes: the backward one takes as long as two forward ones, or as one where few weights are trained
        training = forward / (3 if 2 * trainable > stored else 2) * (3 / 4 if plan.recompute else 1)
    tokens = (steps - run.first_step) * tokens_per_step
    if settings.HOURS:
        tokens = min(tokens, run.seconds_given(settings.HOURS) * training)
    per_row = train_rows.tokens / len(train_rows.items)
    seconds_per_byte = run.from_main(disk_seconds_per_byte(run.folder, trainable * FLOAT))
    return RunSize(
        steps,
        steps_per_epoch,
        tokens_per_step,
        run.kept("eval_rows", evaluation_rows(settings.EVAL_ROWS, tokens, per_row, settings.EVALUATIONS)),
        forward,
        training,
        3 * trainable * FLOAT * seconds_per_byte,
        stored * FLOAT * seconds_per_byte,
    )


def draw_in_time(model, train_rows: PackedRows, settings, device: Device, run: RunFolder) -> PackedRows:
    """With HOURS, the pairs that DPO can train on in that time: the reference of each costs a forward pass before training.

    They are those with the lowest hashes of their ids, so that what fits in one hour is part of what fits in eight. As the rate is judged
    by a forward pass, there are a quarter more than should fit.
    """
    if not settings.HOURS:
        return train_rows
    trainable, stored = count_weights(model)
    passes = 1 + (3 if 2 * trainable > stored else 2)  # that of the reference, and those of training
    tokens = MARGIN * run.seconds_given(settings.HOURS) * forward_rate(model, train_rows, device) / passes
    order = numpy.argsort(train_rows.keys, kind="stable")
    fits = int(numpy.searchsorted(numpy.cumsum(train_rows.sizes.tokens[order]), tokens)) + 1
    fits = run.kept("pairs_in_time", run.from_main(min(fits, len(order))))
    if fits == len(order):
        return train_rows
    print(
        f"hours: {fits:,} of {len(order):,} pairs, drawn by their ids, are more than what fits into {settings.HOURS:g} h"
    )
    return train_rows.select(numpy.sort(order[:fits]))


def _more_steps(train_rows, settings):
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


def count_weights(model) -> tuple[int, int]:
    """(weights that are trained, all weights) of a model."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def some_items(train_rows: PackedRows, tokens: int) -> list[Item]:
    """Items of the first row, about `tokens` tokens."""
    items: list[Item] = []
    for item in train_rows[0]:
        if items and sum(map(item_length, items)) + item_length(item) > tokens:
            break
        items.append(item)
    return items


def _tokens(items):
    return sum(len(prompt) + len(answer) for item in items for prompt, answer in item["documents"])


def forward_rate(model, train_rows: PackedRows, device: Device) -> float:
    """Tokens a second of a forward pass, as an evaluation does one."""
    model.eval().to(device.name)
    with torch.no_grad():
        return _rate(model, train_rows, device, backward=False)


def train_rate(model, train_rows: PackedRows, plan: StepPlan, device: Device) -> float:
    """Tokens a second of a forward and a backward pass. Gradients are thrown away."""
    rate = _rate(model.train().to(device.name), train_rows, device, backward=True)
    for weight in model.parameters():
        weight.grad = None
    # Recomputing is a second forward pass; the backward pass takes as long as two.
    return rate * (3 / 4 if plan.recompute else 1)


def _rate(model, train_rows, device, backward):
    seconds = 1.0
    for tokens in (1, TIMED_TOKENS):  # the first pass, over one item, only warms up
        items = some_items(train_rows, tokens)
        seconds = _seconds_of_loss(model, items, train_rows.max_length, device, backward)
    return _tokens(items) / seconds


def _seconds_of_loss(model, items, max_length, device, backward):
    batch = collate([items], padding_for(device.name, device.bf16, max_length))
    batch = {name: part.to(device.name) if torch.is_tensor(part) else part for name, part in batch.items()}
    began = time.monotonic()
    with torch.autocast(device.name, torch.bfloat16, enabled=device.bf16):
        hidden = model(**model_inputs(batch))
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


def plan_schedule(
    size: RunSize, eval_rows: PackedRows, settings, run: RunFolder, reference_tokens: int = 0
) -> Schedule:
    """The run's schedule, and printed: its evaluations, and the hours to its end.

    reference_tokens: those whose log-probabilities DPO computes first.
    """
    steps, reason = size.steps, "as asked for"
    if settings.HOURS:
        fits = int(run.seconds_given(settings.HOURS) * size.train_rate / size.tokens_per_step)
        if run.first_step + fits < steps:
            steps, reason = run.first_step + max(SETTLED + 1, fits), "judged by a forward pass"
    tokens = size.tokens_per_step * (steps - run.first_step)
    evaluations = evaluation_count(settings.EVAL_ROWS, tokens, eval_rows.tokens, settings.EVALUATIONS)
    schedule = make_schedule(settings, run, steps, evaluations, reason)
    share = (schedule.evaluations + 1) * eval_rows.tokens / size.forward_rate
    share /= share + tokens / size.train_rate
    times = (
        f"before training and {schedule.evaluations} times in it"
        if schedule.evaluations > 1
        else "before and after training"
    )
    print(f"evaluation: {len(eval_rows.items):,} held-out examples, {times}: about {share:.1%} of the time")
    if settings.HOURS:
        epochs = schedule.total / size.steps_per_epoch
        print(
            f"hours: {settings.HOURS:g} h given, about {schedule.total - schedule.start:,} steps or {epochs:.2g} epochs; the first ones will tell better"
        )
    _tell_hours(size, schedule, eval_rows.tokens, 0 if run.checkpoint else reference_tokens, settings, run)
    return schedule


def _tell_hours(size, schedule, eval_tokens, reference_tokens, settings, run):
    done = run.checkpoint_step or schedule.start
    training = (schedule.total - done) * size.tokens_per_step / size.train_rate
    evaluations = schedule.evaluations - schedule.evaluations_done(done) + (done == schedule.start)
    by_clock = training / (60 * settings.CHECKPOINT_MINUTES) if settings.CHECKPOINT_MINUTES else 0
    checkpoints = by_clock + math.ceil((schedule.total - done) / size.steps_per_epoch)
    parts = {
        "reference": reference_tokens / size.forward_rate,
        f"training at {size.train_rate:,.0f} tokens/s": training,
        "evaluations": evaluations * eval_tokens / size.forward_rate,
        "saving": checkpoints * size.checkpoint_seconds + size.saving_seconds + ENDING,
    }
    total = sum(parts.values())
    if done == schedule.start:  # not of a resumed run: what it has left is no forecast of the whole
        run.record["time_forecast_seconds"] = round(total, 1)
    listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    how = (
        "measured on one row"
        if settings.ESTIMATE
        else "judged by a forward pass; the first steps will tell better"
    )
    print(f"time: about {duration(total)}, done at {done_at(total)} ({listed}; {how})")
