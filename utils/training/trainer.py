"""transformers' Trainer over packed rows: the loss on trained tokens only, evaluation by token, checkpoints that are whole.

`PackedTrainer` trains on conversations (SFT, full or LoRA), `PackedDPOTrainer` on preference pairs. Both keep Trainer's
loop, optimizer, schedule, mixed precision, accumulation, several processes and resuming.
"""

import math
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from utils.errors import RunError
from utils.model.lm_head import sum_of_losses, token_logps
from utils.model.packing import collate, split_batch
from utils.progress import progress
from utils.text import listed
from utils.training.checkpoints import list_checkpoints, write_manifest


class PackedTrainer(Trainer):
    """Supervised fine-tuning. The loss is the mean cross-entropy over the trained tokens of a whole optimizer step."""

    loss_is_scaled_for_ga = (
        True  # compute_loss divides by the units of the whole step, not of one micro-batch
    )

    def __init__(self, model, args, train_dataset, eval_dataset, tokenizer, callbacks=()):
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # our own callback prints one line a step
        self.metrics = {}  # sums over the present step: {name: float}

    def batch_loss(self, hidden, targets, rest):
        """(summed loss with gradient, its number of units, {metric: sum over units}) of one micro-batch.

        hidden (N, H) and targets (N,) are the trained positions; `rest` is what else `collate` made. A unit is a token.
        """
        return sum_of_losses(hidden, self.head_weight(), targets), len(targets), {}

    def count_units(self, batch):
        """Units that the loss of a batch is a mean over: trained tokens."""
        return len(batch["label_documents"])

    def head_weight(self):
        """The LM head's (vocabulary, hidden) matrix, under any wrapper (adapter, several processes)."""
        return self.accelerator.unwrap_model(self.model).get_output_embeddings().weight

    def _get_num_items_in_batch(self, batch_samples, device):
        units = torch.tensor(sum(self.count_units(batch) for batch in batch_samples), device=device)
        return self.accelerator.gather(units).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forward, targets, rest = split_batch(inputs)
        loss, _, sums = self.batch_loss(model(**forward), targets, rest)
        for name, value in sums.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value / num_items_in_batch.item()
        # every process divides by the units of all; the gradients are then averaged over the processes
        loss = loss * self.accelerator.num_processes / num_items_in_batch
        if not torch.isfinite(loss):
            raise RunError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}, in rows {listed(rest['ids'])}; lower "
                "LEARNING_RATE, or look at these rows; the last checkpoint is unharmed"
            )
        return loss

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The mean loss and metrics over all units of the evaluation rows: the same for any batch size and packing."""
        self.model.eval()
        totals, units = {"loss": 0.0}, 0
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for index in progress("evaluation", "rows")(range(rank, len(self.eval_dataset), processes)):
            forward, targets, rest = split_batch(self._prepare_inputs(collate([self.eval_dataset[index]])))
            with self.compute_loss_context_manager():
                loss, count, sums = self.batch_loss(self.model(**forward), targets, rest)
            units += count
            for name, value in {"loss": loss.item(), **sums}.items():
                totals[name] = totals.get(name, 0.0) + value
        joined = torch.tensor(
            [units, *totals.values()],
            dtype=torch.float64 if self.args.device.type == "cpu" else torch.float32,
        )
        joined = self.accelerator.reduce(joined.to(self.args.device), "sum").tolist()
        metrics = {
            f"{metric_key_prefix}_{name}": total / joined[0] for name, total in zip(totals, joined[1:])
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs:
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                raise RunError(
                    f"the gradient became {logs['grad_norm']} at step {self.state.global_step}; lower LEARNING_RATE; the "
                    "last checkpoint is unharmed"
                )
            names = list(self.metrics)
            values = torch.tensor([self.metrics[name] for name in names], device=self.args.device)
            logs.update(zip(names, self.accelerator.reduce(values, "sum").tolist()))
            self.metrics = {}
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result):
        tied = (
            getattr(self.model, "_tied_weights_keys", None) or {}
        )  # stored once, under the embedding's name
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            raise RunError(
                f"the checkpoint does not fit the model: {', '.join([*missing, *load_result.unexpected_keys][:3])} ..."
            )

    def _save_checkpoint(self, model, trial):
        """Write the checkpoint under a hidden name and move it into place when it is whole."""
        run_dir = Path(self.args.output_dir)
        partial = run_dir / ".partial-checkpoint"
        if self.args.should_save:
            print(
                f"writing {PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", flush=True
            )  # 7 GB take a while
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:  # a full disk, above all: the half that was written must not keep it full
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            self.args.output_dir = str(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            write_manifest(partial / name)
            for file in (partial / name).iterdir():  # the data on the disk before the name, for the power cut
                with open(file, "r+b") as opened:  # Windows flushes only what is open for writing
                    os.fsync(opened.fileno())
            shutil.rmtree(run_dir / name, ignore_errors=True)  # there only if it was found damaged
            os.replace(partial / name, run_dir / name)
            partial.rmdir()
            for old in list_checkpoints(run_dir)[: -self.args.save_total_limit]:
                shutil.rmtree(old)


class PackedDPOTrainer(PackedTrainer):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), sigmoid loss, plus an SFT term.

    Items carry "documents" [chosen, rejected] and "reference_chosen", "reference_rejected": the log-probabilities of the two
    answers under the frozen starting model. Loss of a pair: -log sigmoid(beta x (chosen - rejected)) of the log-ratios to the
    reference, plus sft_weight x the mean cross-entropy of the chosen answer, which keeps its probability from falling
    along with the rejected one's. A unit is a pair.
    """

    def __init__(self, *args, beta, sft_weight, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta, self.sft_weight = beta, sft_weight

    def count_units(self, batch):
        return len(batch["reference_chosen"])

    def batch_loss(self, hidden, targets, rest):
        pairs, documents = len(rest["reference_chosen"]), rest["label_documents"]
        logps = token_logps(hidden.detach(), self.head_weight(), targets)
        lengths = torch.bincount(documents, minlength=2 * pairs)
        sums = torch.zeros(2 * pairs, device=logps.device, dtype=logps.dtype).index_add_(0, documents, logps)
        with torch.enable_grad():
            sums.requires_grad_()
            chosen, rejected = sums.view(pairs, 2).unbind(1)
            rewards = (
                self.beta * (chosen - rest["reference_chosen"]),
                self.beta * (rejected - rest["reference_rejected"]),
            )
            margins = rewards[0] - rewards[1]
            loss = (-F.logsigmoid(margins) - self.sft_weight * chosen / lengths.view(pairs, 2)[:, 0]).sum()
            (per_document,) = torch.autograd.grad(loss, sums)
        metrics = {
            "reward_margin": margins.sum(),
            "reward_accuracy": (margins > 0).sum(),
            "chosen_logps": chosen.sum(),
            "rejected_logps": rejected.sum(),
        }
        metrics = {name: value.item() for name, value in metrics.items()}
        if not torch.is_grad_enabled():
            return loss.detach(), pairs, metrics
        # d loss / d logp of a token is that of its answer; the same pass that scores the tokens forms their gradient
        surrogate = sum_of_losses(hidden, self.head_weight(), targets, -per_document[documents])
        return loss.detach() + surrogate - surrogate.detach(), pairs, metrics
