"""Before hours are spent: how an optimizer step is computed on this machine, whether memory and disk hold the run, and its hours.

The user sets the rows of an optimizer step. How many of them go through the model at once follows from the memory: as many as are
worth it, else fewer, else one whose activations are computed twice instead of kept (gradient checkpointing, Chen et al. 2016,
arXiv:1604.06174), else the run is refused. All ways give the same result but for rounding.
"""

import math
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from utils.errors import UserError
from utils.files import show_path
from utils.model.folder import read_record, run_folder
from utils.model.lm_head import cross_entropy_sum
from utils.model.packing import PackedRows, collate
from utils.model.qwen3_train import forward
from utils.text import duration, format_bytes
from utils.training.log import DISK, ENDING, done_at, other_programs
from utils.training.memory import FLOAT, MemoryForecast, StepPlan, free_memory, ways
from utils.training.rows import Loaded, tell_shared_rows
from utils.training.run import Run

# Tokens in one pass from which on more bring no speed: products of the CPU are near their peak at 1,024 already.
ENOUGH_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 32768}
FEW_STEPS = 30  # a run of fewer is hardly more than its warm-up
TIMED_ITEMS = 4  # that a CPU is timed on
SHARE_OF_EVALUATIONS = 0.05  # of the run's time, at most
FORWARD = 0.5  # time of a token in an evaluation against one in training: a third for SFT, a half for LoRA
EVAL_ROWS = (50, 500)  # below the first, evaluations become fewer instead; above the second, more say little


class Schedule(NamedTuple):
    """The course of one run, as it stands in run.json. It follows from the run's progress, from 0 to 1: the larger of the share of
    the steps that are done and the share of HOURS that is over."""

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


class Plan(NamedTuple):
    """A run that is about to begin."""

    train_rows: PackedRows
    eval_rows: PackedRows
    schedule: Schedule
    steps_per_epoch: int
    tokens_per_step: float  # on average
    train_rate: float  # tokens a second, in all processes, judged by a forward pass
    weights: tuple[int, int]  # bytes of a checkpoint and of the finished model


def plan_run(run: Run, model, train: Loaded, load_eval: Callable[[int], Loaded]) -> Plan:
    """Plan memory, steps, evaluations and hours, and print all of it. UserError, with the numbers, if something does not fit.

    load_eval(count): so many rows to evaluate on.
    """
    settings, rows, pairs = run.settings, train.rows, "BETA" in vars(run.settings)
    way = plan_step(run, model, rows)
    rows_per_step = settings.ROWS_PER_STEP
    if run.processes > 1:
        rows.even_out(rows_per_step)
    steps_per_epoch = math.ceil(len(rows) / rows_per_step)
    steps = settings.MAX_STEPS or math.ceil(steps_per_epoch * settings.EPOCHS)
    tokens_per_step = rows.tokens / steps_per_epoch
    processes = f" on {run.processes} processes" if run.processes > 1 else ""
    print(
        f"training: {len(rows.items):,} examples, {rows.tokens:,} tokens ({rows.trained_tokens:,} trained) in "
        f"{len(rows):,} packed row{'s' * (len(rows) > 1)}; {steps:,} step{'s' * (steps > 1)}{processes}"
    )
    if steps < FEW_STEPS and not settings.MAX_STEPS:
        fewer = int(len(rows) * settings.EPOCHS // FEW_STEPS)
        if not fewer:
            fewer = f"1 and EPOCHS to {math.ceil(FEW_STEPS / len(rows))}; more rows are better"
        print(f"warning: too few optimizer steps to learn much; set ROWS_PER_STEP to {fewer}")

    # Time: of a forward pass, of a step, of DPO's reference log-probabilities before the first step
    trained = FLOAT * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    stored = FLOAT * sum(weight.numel() for weight in model.parameters())
    rate = run.processes * run.agree(forward_rate(run, model, rows, way))[0]
    passes = 3 if 2 * trained > stored else 2  # a step, in forward passes: the backward one takes one or two
    train_rate = rate / passes * (3 / 4 if way.recompute else 1)
    reference = rows.tokens / rate if pairs and not run.checkpoint else 0.0
    given, planned = 3600 * settings.HOURS, steps
    if given and reference >= given:
        takes = f"the reference log-probabilities of {len(rows.items):,} pairs alone take about {duration(reference)}"
        raise UserError(f"{takes}, and HOURS is {settings.HOURS:g}; raise it, or give fewer pairs")
    if given:
        planned = max(1, min(steps, int((given - reference) * train_rate / tokens_per_step)))

    tokens, per_row = planned * tokens_per_step, rows.tokens / len(rows.items)
    count, evaluations = plan_evaluations(settings.EVAL_ROWS, settings.EVALUATIONS, tokens, per_row)
    held_out = load_eval(run.keep("eval_rows", count))
    tell_shared_rows(settings.TRAIN_FILE, train, settings.EVAL_FILE, held_out)
    warmup, share = math.ceil(settings.WARMUP * planned), settings.WARMUP if given else 0.0
    schedule = Schedule(*run.keep("schedule", [steps, warmup, evaluations, share]))
    several = [train.conversations]
    if pairs:  # of single questions do not take away that a model knows conversations
        several.append((read_record(run_folder(settings.MODEL)) or {}).get("conversations"))
    run.keep("conversations", "several" if "several" in several else "single")
    check_disk(run, trained, stored)
    weights = 3 * trained, stored
    plan = Plan(rows, held_out.rows, schedule, steps_per_epoch, tokens_per_step, train_rate, weights)
    tell_time(run, plan, planned, rate, reference)
    return plan


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


def plan_step(run: Run, model, train_rows: PackedRows) -> StepPlan:
    """Choose how steps are computed, print it with the memory it needs, and return it; UserError if nothing fits.

    The choice is kept in run.json: a run that goes on keeps it, and ends in the same bits. Of several processes the one with
    the least memory decides, as all have to compute in the same way.
    """
    settings, device = run.settings, run.device
    if settings.ROWS_PER_STEP % run.processes:
        raise UserError(
            f"--rows-per-step is {settings.ROWS_PER_STEP}, wanted a multiple of the {run.processes} processes"
        )
    if device.name == "cuda":  # its forms of attention are others than a CPU's
        model.to(run.accelerator.device)
    forecast = MemoryForecast(model, device, train_rows)
    parts = {way: forecast.parts(way) for way in ways(settings.ROWS_PER_STEP // run.processes)}
    needed = {way: sum(sizes.values()) for way, sizes in parts.items()}
    free = int(-run.agree(-free_memory(device))[0])
    enough = max(1, ENOUGH_TOKENS[device.name] // train_rows.max_length)
    way = run.way(run.step) if run.checkpoint else choose(needed, free, enough)
    if settings.ESTIMATE:
        for each, size in needed.items():
            fits = "chosen" if each == way else "fits" if size <= free else "does not fit"
            print(f"  {each!s:<72} {format_bytes(size):>9}  {fits}")
    if way is None:
        raise UserError(
            f"the run needs {format_bytes(min(needed.values()))} of memory even with one row at once and activations recomputed, "
            f"and {format_bytes(free)} are free; lower MAX_LENGTH, train with LoRA, or take a smaller model"
        )
    run.keep("plan", [[0, *way]])
    run.keep("memory_forecast_bytes", needed[way])
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts[way].items() if size)
    print(f"memory: {format_bytes(needed[way])} needed ({named}), {format_bytes(free)} free; {way}")
    return way


def choose(needed: dict[StepPlan, int], free: int, enough: int) -> StepPlan | None:
    """The first way that fits into `free` bytes, with no more than `enough` rows at once, which bring speed on this device."""
    worth = [way for way in needed if way.rows_at_once <= enough or way.recompute]
    return next((way for way in worth if needed[way] <= free), None)


def check_disk(run: Run, trained: int, stored: int) -> None:
    """Print the disk that checkpoints and finished model need; UserError if they do not fit. trained, stored: bytes of weights."""
    checkpoints = run.settings.KEEP_CHECKPOINTS + 1  # a new one is whole before an old one goes
    best = 2 * (run.settings.KEEP == "best")  # copies of the best weights: one is whole before the other goes
    needed = (3 * checkpoints + best) * trained + stored  # weights and two moments in each checkpoint
    free = shutil.disk_usage(next(path for path in (run.folder, *run.folder.parents) if path.is_dir())).free
    sizes = f"{format_bytes(needed)} needed ({checkpoints} checkpoints, {best} copies of the best weights, the model)"
    print(f"disk: {sizes}, {format_bytes(free)} free")
    if needed > free:
        raise UserError(
            f"{show_path(run.folder)} needs {format_bytes(needed)} of disk and {format_bytes(free)} are free; free some, lower "
            "KEEP_CHECKPOINTS, or choose another --output-dir"
        )


@torch.no_grad()
def forward_rate(run: Run, model, train_rows: PackedRows, way: StepPlan) -> float:
    """Tokens a second of a forward pass, as an evaluation does one. A first pass only warms up.

    A CPU is timed on a part of a row; a GPU, which waits for work otherwise, on a batch of its real size.
    """
    model.eval().to(run.accelerator.device)
    batches = [[train_rows[0][:1]], [train_rows[0][:TIMED_ITEMS]]]
    if run.device.name != "cpu":
        batches = [[train_rows[row] for row in range(min(way.rows_at_once, len(train_rows)))]] * 2
    for rows in batches:
        batch = collate(rows, run.device, train_rows.max_length)
        began = time.monotonic()
        with run.device.autocast():
            hidden, batch = forward(model, batch, run.device)
            cross_entropy_sum(hidden, model.get_output_embeddings().weight, batch["targets"]).item()
        seconds = max(time.monotonic() - began, 1e-6)
    documents = [document for items in rows for item in items for document in item["documents"]]
    return sum(len(prompt) + len(answer) for prompt, answer in documents) / seconds


def tell_time(run: Run, plan: Plan, planned: int, rate: float, reference: float) -> None:
    """Print how often is evaluated, and the hours to the end. rate: tokens a second of a forward pass."""
    settings, schedule, eval_tokens = run.settings, plan.schedule, plan.eval_rows.tokens
    left = max(0, planned - run.step)
    training = left * plan.tokens_per_step / plan.train_rate
    evaluations = schedule.evaluations + 1 - schedule.evaluations_due(min(1.0, run.step / planned))
    checkpoint, model = (size / DISK for size in plan.weights)
    parts = {
        "reference": reference and reference + eval_tokens / rate,
        f"training at {plan.train_rate:,.0f} tokens/s": training,
        "evaluations": evaluations * eval_tokens / rate,
        "saving": math.ceil(left / plan.steps_per_epoch) * checkpoint + model + ENDING,
    }
    total = sum(parts.values())
    run.keep("time_forecast_seconds", round(total, 1))
    print(
        f"evaluation: {len(plan.eval_rows.items):,} examples of {settings.EVAL_FILE.name}, {evaluations} times"
    )
    if settings.HOURS:
        epochs = planned / plan.steps_per_epoch
        print(f"hours: {settings.HOURS:g} h given, about {planned:,} steps or {epochs:.2g} epochs")
    named = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    others = other_programs(run.used)
    judged = "judged by a forward pass" + (f" while {others}" if others else "")
    print(
        f"time: about {duration(total)}, done at {done_at(total)} ({named}; {judged}, the first steps will tell better)"
    )
