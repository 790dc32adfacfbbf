"""transformers' Trainer over packed rows: the loss on trained tokens only, evaluation by token, checkpoints that are whole.

`PackedTrainer` trains on conversations (SFT, full or LoRA), `PackedDPOTrainer` on preference pairs. Both keep Trainer's
loop, optimizer, schedule, accumulation, several processes and resuming.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from utils.device import release_memory
from utils.errors import RunError
from utils.model.lm_head import HeadGradient, backward_through_head
from utils.model.packing import PackedBatch, PackedRows, collate, model_inputs, padding_for
from utils.text import listed, progress
from utils.training.checkpoints import HiddenCheckpoint, remove_old_checkpoints
from utils.training.course import Course
from utils.training.losses import dpo_loss, sft_loss


class BatchLoss(NamedTuple):
    loss: Tensor  # summed over the units, times the scale
    units: int  # what the loss is a mean over in the end: trained tokens, or pairs
    metrics: dict[str, Tensor]  # sums over the units


class PackedTrainer(Trainer):
    """Supervised fine-tuning. The loss is the mean cross-entropy over the trained tokens of a whole optimizer step."""

    metric_names = ("loss",)  # of an evaluation
    loss_is_scaled_for_ga = True  # compute_loss divides by the units of the whole step, not of one batch

    def __init__(
        self,
        model,
        args,
        train_rows: PackedRows,
        eval_rows: PackedRows | None,
        tokenizer,
        course: Course | None = None,
    ):
        """`course`: what the run follows and what goes along with it; without one there are no evaluations and no resuming."""
        longest = max(rows.max_length for rows in (train_rows, eval_rows) if rows)
        super().__init__(
            model=model,
            args=args,
            data_collator=functools.partial(
                collate, padding=padding_for(args.device.type, args.bf16, longest)
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=course.callbacks if course else None,
        )
        self.course = course
        # Several processes: gradients are kept once, not also in the buckets they travel in.
        if self.accelerator.ddp_handler:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        # The head's gradient goes straight to where it is added up; several processes have to exchange it first.
        direct = args.device.type == "cpu" and self.accelerator.num_processes == 1
        self.head_gradient = HeadGradient() if direct else None
        if direct and not self.head_weight().requires_grad:
            _keep_gradients(model)
        self.remove_callback(PrinterCallback)  # our own callback prints one line a step
        self.step_metrics: dict[str, Tensor] = {}  # means over the units of the present step, so far
        self.step_losses: list[tuple[Tensor, list]] = []  # (loss, ids of its rows) of the step's batches

    def batch_loss(self, hidden: Tensor, batch: PackedBatch, scale: Tensor) -> BatchLoss:
        """The loss of one batch, from the hidden states (N, H) of its trained positions. `scale`: 1 / units of the step."""
        loss = sft_loss(hidden, self.head_weight(), batch["targets"], scale, self.head_gradient)
        return BatchLoss(loss, len(batch["targets"]), {})

    def count_units(self, batch: PackedBatch) -> int:
        """Units that the loss of a batch is a mean over: trained tokens."""
        return len(batch["targets"])

    def head_weight(self) -> Tensor:
        """The LM head's (vocabulary, hidden) matrix, under any wrapper (adapter, several processes)."""
        return self.accelerator.unwrap_model(self.model).get_output_embeddings().weight

    def compute_loss_context_manager(self):
        """Autocast over the loss as well: accelerate wraps the model's forward only, and transformers adds nothing (5.23)."""
        return self.accelerator.autocast()

    def _get_num_items_in_batch(self, batch_samples, device):
        units = torch.tensor(sum(self.count_units(batch) for batch in batch_samples), device=device)
        return self.accelerator.gather(units).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # every process divides by the units of all; the gradients are then averaged over the processes
        scale = self.accelerator.num_processes / num_items_in_batch
        loss, _, sums = self.batch_loss(model(**model_inputs(inputs)), inputs, scale)
        for name, value in sums.items():
            self.step_metrics[name] = self.step_metrics.get(name, 0.0) + value.detach() / num_items_in_batch
        self.step_losses.append((loss.detach(), inputs["ids"]))
        return loss

    def training_step(self, *given, **named):
        """transformers' training_step. Where memory is so short that activations are recomputed, what the heap holds is given back."""
        loss = super().training_step(*given, **named)
        if self.args.activation_checkpointing:
            release_memory()
        return loss

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The learning rate as the run's schedule has it, which may be changed while the run goes on."""
        if self.course is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            rate = self.course.schedule.rate
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: rate(step))
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:  # a run that prolongs another one has a schedule of its own
            scheduler = self.lr_scheduler
            rate = self.course.schedule.rate(scheduler.last_epoch)
            for group, base in zip(self.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = base * rate
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _run_epoch(self, **given):
        if self.state.global_step >= self.state.max_steps:  # it was stopped after its last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(**given)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The mean loss and metrics over all units of the evaluation rows: the same for any batch size and packing.

        Where the run is asked to stop meanwhile, nothing is logged; a checkpoint is written, and the evaluation made when the
        run goes on. KeyboardInterrupt if nothing was trained yet.
        """
        self.model.eval()
        sums, units, whole = {"loss": 0.0}, 0, torch.ones((), device=self.args.device)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for index in progress("evaluation", "rows")(range(rank, len(self.eval_dataset), processes)):
            if self.course.stop_requested():
                break
            batch = self._prepare_inputs(self.data_collator([self.eval_dataset[index]]))
            with self.compute_loss_context_manager():
                loss, count, metrics = self.batch_loss(self.model(**model_inputs(batch)), batch, whole)
            units += count
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        exact = torch.float64 if self.args.device.type == "cpu" else torch.float32
        stop = self.course.stop_requested()
        if not units:  # all processes have to exchange as many numbers
            sums = dict.fromkeys(self.metric_names, 0.0)
        joined = torch.tensor([stop, units, *sums.values()], dtype=exact).to(self.args.device)
        stop, units, *totals = self.accelerator.reduce(joined, "sum").tolist()
        if stop:
            return self._leave_evaluation()
        results = {f"{metric_key_prefix}_{name}": total / units for name, total in zip(sums, totals)}
        self.log(results)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def _leave_evaluation(self):
        if self.state.global_step == self.course.schedule.start:
            raise KeyboardInterrupt("stopped before the first step; the same command starts it again")
        self.control.should_evaluate = False
        self.control.should_save = self.control.should_training_stop = True
        return {}

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self._refuse_divergence(logs)
            if self.step_metrics:
                values = self.accelerator.reduce(
                    torch.stack(list(self.step_metrics.values())), "sum"
                ).tolist()
                logs.update(zip(self.step_metrics, values))
            self.step_metrics, self.step_losses = {}, []
        super().log(logs, start_time)

    def _refuse_divergence(self, logs):
        """RunError where a loss or the gradient of the step just done is no number. It was not saved yet."""
        step = self.state.global_step
        for loss, ids in self.step_losses:
            if not torch.isfinite(loss):
                raise RunError(
                    f"the loss became {loss.item()} at step {step}, in rows {listed(ids)}; lower LEARNING_RATE, or look at "
                    "these rows; the last checkpoint is unharmed"
                )
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            raise RunError(
                f"the gradient became {logs['grad_norm']} at step {step}; lower LEARNING_RATE; the last checkpoint is unharmed"
            )

    def _issue_warnings_after_load(self, load_result):
        # Tied weights are stored once, under the embedding's name.
        tied = getattr(self.model, "_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            names = [*missing, *load_result.unexpected_keys][:3]
            raise RunError(f"the checkpoint does not fit the model: {', '.join(names)} ...")

    def _save_checkpoint(self, model, trial):
        """Write the checkpoint under a hidden name and move it into place when it is whole."""
        run_dir = Path(self.args.output_dir)
        hidden = HiddenCheckpoint(
            run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.args.should_save
        )
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(hidden.folder)
        try:
            with hidden:
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            hidden.publish()
            remove_old_checkpoints(run_dir, self.args.save_total_limit)


def _keep_gradients(model):
    """Let the few gradients of an adapter stay where they are from step to step.

    Made anew, each would lie between activations that are freed around it, and the next batch's, of another length, would not fit
    there: memory grew by half of the activations.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    model.zero_grad = functools.partial(model.zero_grad, set_to_none=False)


class PackedDPOTrainer(PackedTrainer):
    """Direct preference optimization on packed pairs; the loss is utils.training.losses.dpo_loss. A unit is a pair.

    Items carry "documents" [chosen, rejected] and "reference_chosen", "reference_rejected": the log-probabilities of the two
    answers under the frozen starting model.
    """

    metric_names = ("loss", "reward_margin", "reward_accuracy", "chosen_logps", "rejected_logps")

    def __init__(self, *args, beta: float, sft_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta, self.sft_weight = beta, sft_weight

    def count_units(self, batch: PackedBatch) -> int:
        return len(batch["reference_chosen"])

    def batch_loss(self, hidden: Tensor, batch: PackedBatch, scale: Tensor) -> BatchLoss:
        pairs = self.count_units(batch)
        lengths = torch.bincount(batch["label_documents"], minlength=2 * pairs)
        metrics = {}

        def loss_of_logps(logps: Tensor) -> Tensor:
            answers = torch.zeros(2 * pairs, device=logps.device, dtype=logps.dtype)
            chosen, rejected = answers.index_add(0, batch["label_documents"], logps).view(pairs, 2).unbind(1)
            losses, margins = dpo_loss(
                chosen,
                rejected,
                batch["reference_chosen"],
                batch["reference_rejected"],
                self.beta,
                self.sft_weight,
                lengths.view(pairs, 2)[:, 0],
            )
            metrics.update(
                reward_margin=margins.sum(),
                reward_accuracy=(margins > 0).sum(),
                chosen_logps=chosen.sum(),
                rejected_logps=rejected.sum(),
            )
            return losses.sum() * scale

        loss = backward_through_head(
            hidden, self.head_weight(), batch["targets"], loss_of_logps, self.head_gradient
        )
        return BatchLoss(loss, pairs, metrics)
