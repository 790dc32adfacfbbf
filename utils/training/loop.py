"""The training loop: forward, backward, clipping, step, log, evaluation, checkpoint, with the loss as an argument.

Rows are packed once and there is no dropout: with the weights, the optimizer's moments and the number of steps a run goes on
exactly where it stopped. accelerate joins several processes, each of which computes its share of a step's rows.
"""

import contextlib
import gc
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.device import release_memory
from utils.errors import NO_MEMORY, RunError
from utils.files import show_path
from utils.model.lm_head import HeadGradient
from utils.model.mixed import FoldedStep
from utils.model.packing import PackedBatch, collate
from utils.model.qwen3_train import forward
from utils.text import listed, progress
from utils.training.log import best_of, verdict
from utils.training.losses import PREFERENCE, BatchLoss, count_units
from utils.training.memory import StepPlan, peak_memory, ways
from utils.training.plan import Plan
from utils.training.run import Run, list_checkpoints

MAX_NORM = 1.0  # gradients of a greater norm are scaled down to it


def train(
    run: Run, model, loss: Callable[..., BatchLoss], plan: Plan, save: Callable[[Path], None]
) -> dict[str, Any]:
    """Train from where `run` stands to the end, put the weights to keep into `model`, and return the results for run.json.

    loss: sft_loss, or dpo_batch_loss with its settings bound; save(folder): writes model and tokenizer, for checkpoints.
    RunError, in one line, if a loss is no number or memory runs out; KeyboardInterrupt after Ctrl-C, once the checkpoint is written.
    """
    settings, schedule, learner = run.settings, plan.schedule, Learner(run, model, loss)
    run.begin(plan, learner)
    clock, step, done, owed = run.clock, run.step, run.done, run.evaluation_owed
    unread = None  # the latest step, whose numbers a GPU may still be computing: they are read one step later
    try:
        with ThreadPoolExecutor(1) as beside:  # collates the next step's batches while a step is computed
            coming = beside.submit(step_batches, run, plan, step)
            stop = owed and not learner.evaluate(plan, step, done)
            while done < 1 and not stop:
                batches = coming.result()
                coming = beside.submit(step_batches, run, plan, step + 1)
                rate = settings.LEARNING_RATE * schedule.rate(step, done)
                clock.start()
                result, changed = backward_that_fits(learner, plan, step, batches)
                learner.step(rate)
                if changed:
                    coming = beside.submit(step_batches, run, plan, step + 1)

                before, step = done, step + 1
                clock.ended("step")
                done = run.progress(step, done, schedule.steps)
                stop, by_clock = run.agree(bool(run.asked_to_stop), run.main and clock.checkpoint_due)
                owed = schedule.evaluations_due(done) > schedule.evaluations_due(before)
                saving = stop or by_clock or done >= 1 or step % plan.steps_per_epoch == 0
                if unread:
                    log_step(run, *unread)
                unread = step, step / plan.steps_per_epoch, rate, done, result
                if owed or saving or run.device.name != "cuda":
                    log_step(run, *unread)
                    unread = None

                if owed and not stop:
                    owed = not learner.evaluate(plan, step, done)
                    stop = owed  # it was asked to stop meanwhile: the evaluation is made when the run goes on
                if saving or stop:
                    run.save_checkpoint(step, done, bool(owed), learner, save)
        if stop or any(run.agree(bool(run.asked_to_stop))):
            if step:
                raise KeyboardInterrupt(
                    f"stopped after step {step}, checkpoint written; the same command goes on"
                )
            raise KeyboardInterrupt("stopped before the first step; the same command starts it again")
        return _results(run, model, plan, step)
    finally:
        run.log.draw()


class StepResult(NamedTuple):
    """The numbers of an optimizer step, as tensors that may still be computed on a GPU."""

    losses: list[Tensor]  # of each batch; together the mean over the units of the step
    ids: list[list[str]]  # of the rows in each batch
    norm: Tensor  # of the gradients, before they were clipped
    metrics: dict[str, Tensor]
    scale: Tensor | None  # of the loss, in float16


class Learner:
    """A model with its optimizer, and what is computed with it."""

    def __init__(self, run: Run, model, loss: Callable[..., BatchLoss]):
        self.run, self.model, self.loss, self.device = run, model, loss, run.device
        self.accelerator, settings = run.accelerator, run.settings
        self.parallel = self.accelerator.prepare_model(model)  # in a single process the model itself
        self.head, self.recomputes = model.get_output_embeddings().weight, False
        self.optimizer = make_optimizer(model, settings.LEARNING_RATE, settings.WEIGHT_DECAY)
        folds = self.device.name == "cuda" or self.device.fp16
        self.folded = FoldedStep(self.optimizer, self.device) if folds else None
        # The head's gradient goes straight to where it is added up; several processes have to exchange it first.
        alone = self.device.name == "cpu" and run.processes == 1
        self.head_gradient = HeadGradient() if run.processes == 1 and (alone or folds) else None
        # The few gradients of an adapter stay where they are from step to step. Made anew, each would lie between activations that
        # are freed around it, and the next batch's, of another length, would not fit there: memory grew by half of the activations.
        self.keeps_gradients = alone and not self.head.requires_grad

    def batch_loss(self, batch: PackedBatch, scale: Tensor) -> BatchLoss:
        """The loss of one batch, forward only."""
        with self.device.autocast():  # over both, so that weights are cast once
            hidden, batch = forward(self.parallel, batch, self.device)
            return self.loss(hidden, self.head, batch, scale, self.head_gradient)

    def backward(self, batches: list[PackedBatch], way: StepPlan) -> StepResult:
        """The clipped gradients of one step's batches, added up."""
        if way.recompute and not self.recomputes:
            self.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
            self.recomputes = True
        self.model.train()
        # Every process divides by the units of all; the gradients are then averaged over the processes.
        units = torch.full((), float(sum(map(count_units, batches))), device=self.accelerator.device)
        units = self.accelerator.reduce(units, "sum")
        scale = self.run.processes / units
        factor = self.folded.scale.clone() if self.folded else None  # of float16; 1 for other formats
        losses, metrics = [], {}
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.parallel):
                result = self.batch_loss(batch, scale * factor if self.folded else scale)
                self.accelerator.backward(result.loss)
            losses.append(result.loss.detach() / factor if self.folded else result.loss.detach())
            for name, value in result.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach() / units
            if way.recompute and self.device.name == "cpu":
                release_memory()  # which is short: the heap gives back what it holds
        if self.folded:
            norm = self.folded.clip(MAX_NORM)
        else:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        return StepResult(losses, [batch["ids"] for batch in batches], norm, metrics, factor)

    def step(self, rate: float) -> None:
        """Change the weights by the gradients, and forget those."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self.model.zero_grad(set_to_none=not self.keeps_gradients)

    @torch.no_grad()
    def evaluate(self, plan: Plan, step: int, done: float) -> bool:
        """Log the mean loss and metrics over all units of the rows to evaluate on, and keep the weights if they are the best.

        The numbers are the same for any batch size and packing: sums are taken in float64. False if a process was asked to stop
        meanwhile.
        """
        self.model.eval()
        run, device, rows = self.run, self.accelerator.device, plan.eval_rows
        names = ["loss", *(PREFERENCE if rows.numbers else ())]
        exact = torch.float32 if device.type == "mps" else torch.float64
        sums, units, whole = [0.0] * len(names), 0, torch.ones((), device=device)
        mine = range(self.accelerator.process_index, len(rows), run.processes)
        for index in progress("evaluation", "rows")(mine):
            if run.asked_to_stop:
                break
            batch = collate([rows[index]], self.device, rows.max_length)
            result = self.batch_loss(batch, whole)
            units += count_units(batch)
            values = {"loss": result.loss, **result.metrics}
            sums = [total + values[name].item() for total, name in zip(sums, names)]
        joined = torch.tensor([bool(run.asked_to_stop), units, *sums], dtype=exact).to(device)
        stop, units, *sums = self.accelerator.reduce(joined, "sum").tolist()
        if stop:
            return False
        found = {f"eval_{name}": total / units for name, total in zip(names, sums)}
        run.add({"step": step, **found, "epoch": step / plan.steps_per_epoch}, done)
        if 0 < done < 1:  # after the last step the best is what is in memory, and in the last checkpoint
            run.keep_if_best(step, self.model)
        run.clock.ended("evaluation")
        return True


def make_optimizer(model, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained; norms and biases are not pulled towards zero."""
    decayed, others = [], []
    for weight in model.parameters():
        if weight.requires_grad:
            (decayed if weight.dim() > 1 else others).append(weight)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def step_batches(run: Run, plan: Plan, step: int) -> list[PackedBatch]:
    """The batches of this process for the optimizer step that follows `step` finished ones.

    Every epoch has its own random order of the rows, which SEED fixes.
    """
    rows, way, cuda = plan.train_rows, run.way(step), run.device.name == "cuda"
    epoch, index = divmod(step, plan.steps_per_epoch)
    drawn = torch.Generator().manual_seed(run.settings.SEED + epoch)
    order = torch.randperm(len(rows), generator=drawn).tolist()
    per_step = way.rows_at_once * way.passes * run.processes
    order = order[index * per_step : (index + 1) * per_step]
    numbers = [order[start : start + way.rows_at_once] for start in range(0, len(order), way.rows_at_once)]
    batches = []
    for batch in numbers[run.accelerator.process_index :: run.processes]:
        joined = collate([rows[row] for row in batch], run.device, rows.max_length)
        for name in [name for name, part in joined.items() if cuda and torch.is_tensor(part)]:
            joined[name] = joined[name].pin_memory()
        batches.append(joined)
    return batches


def backward_that_fits(
    learner: Learner, plan: Plan, step: int, batches: list[PackedBatch]
) -> tuple[StepResult, bool]:
    """The gradients of a step. If memory runs out, the next way to compute it is taken from here on, which the second value tells.

    RunError if there is no such way. Several processes would have to agree on one: they end.
    """
    run, changed = learner.run, False
    while True:
        way = run.way(step)
        try:
            return learner.backward(batches, way), changed
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in NO_MEMORY):
                raise
        possible = ways(way.rows_at_once * way.passes)
        less = possible[possible.index(way) + 1 :]
        if not less or run.processes > 1:
            checkpoints = list_checkpoints(run.folder)
            kept = f"{show_path(checkpoints[-1])} is kept" if checkpoints else "no checkpoint was written yet"
            advice = f"lower MAX_LENGTH, or close other programs; {kept}"
            raise RunError(f"not enough memory after step {step}; {advice}")
        learner.forget_gradients()
        gc.collect()
        if run.device.name == "cuda":
            torch.cuda.empty_cache()
        run.log.tell(f"out of memory in step {step + 1}; from here on {less[0]}")
        run.record["plan"].append([step, *less[0]])
        run.write()
        batches, changed = step_batches(run, plan, step), True


def log_step(run: Run, step: int, epoch: float, rate: float, done: float, result: StepResult) -> None:
    """Read the numbers of a step, and log them. RunError if a loss or the gradient is no number."""
    values = torch.stack([sum(result.losses), *result.metrics.values()])
    loss, *metrics = run.accelerator.reduce(values, "sum").tolist()
    norm, unharmed = result.norm.item(), "the last checkpoint is unharmed"
    if not math.isfinite(loss):
        bad = [ids for value, ids in zip(result.losses, result.ids) if not torch.isfinite(value)]
        rows = f", in rows {listed(bad[0])}" if bad else ""
        advice = f"lower LEARNING_RATE, or look at these rows; {unharmed}"
        raise RunError(f"the loss became {loss} at step {step}{rows}; {advice}")
    entry = {"step": step, "loss": loss / run.processes, "grad_norm": norm, "learning_rate": rate}
    if not math.isfinite(norm):
        if not run.device.fp16 or result.scale.item() < 1:
            raise RunError(f"the gradient became {norm} at step {step}; lower LEARNING_RATE; {unharmed}")
        run.log.tell(f"step {step} changed no weight: its gradient overflowed fp16; the loss scale is halved")
        del entry["grad_norm"]
    entry |= dict(zip(result.metrics, metrics)) | {"epoch": epoch}
    run.log.step_seconds += run.clock.seconds["step"]
    run.add(entry | ({"progress": done} if run.settings.HOURS else {}), done)


def _results(run: Run, model, plan: Plan, step: int) -> dict[str, Any]:
    """Put the weights to keep into the model; tell which those are; the results for run.json."""
    log, kept = run.log, run.load_best(model)
    evaluations, start = log.evaluations(), log.entries[0]  # the evaluation before training
    run.record["told"] = verdict(start, evaluations, log.losses(), kept, len(plan.eval_rows.items))
    print("\n".join(run.record["told"]))
    accuracy = "eval_reward_accuracy"
    return {
        "steps": step,
        "kept_step": kept["step"],
        "best_step": best_of(evaluations)["step"],
        "tokens": round(plan.tokens_per_step * step),
        "train_loss": log.losses()[-1],
        "measured_on": run.settings.EVAL_FILE.name,
        "eval_loss_before": start["eval_loss"],
        "eval_loss": kept["eval_loss"],
        "eval_loss_last": evaluations[-1]["eval_loss"],
        **({accuracy: kept[accuracy]} if accuracy in kept else {}),
        "seconds": round(run.clock.elapsed(), 1),
        "tokens_per_second": round(log.tokens_per_second(), 1),
        "peak_memory_bytes": peak_memory(run.device),
    }
