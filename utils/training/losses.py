"""The losses that SFT, LoRA and DPO minimise. The training loop takes one of them as an argument.

A loss is a sum over the units of a batch (trained tokens, or pairs) times `scale`, 1 / units of a whole optimizer step. So the
result does not depend on how the step's rows are split up among batches or processes.
"""

from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.kept import read_kept, write_kept
from utils.model.lm_head import HeadGradient, backward_through_head, cross_entropy_sum
from utils.model.logprobs import answer_logps
from utils.model.packing import PackedBatch, PackedRows
from utils.text import progress

PREFERENCE = ("reward_margin", "reward_accuracy", "chosen_logps", "rejected_logps")  # DPO's metrics


class BatchLoss(NamedTuple):
    loss: Tensor  # summed over the units, times the scale
    metrics: dict[str, Tensor]  # sums over the units


def count_units(batch: PackedBatch) -> int:
    """The units that the loss of a batch is a mean over in the end: pairs for DPO, else trained tokens."""
    return len(batch.get("reference_chosen", batch["targets"]))


def sft_loss(
    hidden: Tensor, head: Tensor, batch: PackedBatch, scale: Tensor, kept: HeadGradient | None = None
) -> BatchLoss:
    """Cross-entropy of the trained tokens in nats: its sum times `scale`.

    hidden (N, H): states of the trained positions; head (V, H). `kept`: as for utils.model.lm_head.cross_entropy_sum.
    """
    targets = batch["targets"]
    return BatchLoss(cross_entropy_sum(hidden, head, targets, scale.expand(len(targets)), kept), {})


def dpo_batch_loss(
    hidden: Tensor,
    head: Tensor,
    batch: PackedBatch,
    scale: Tensor,
    kept: HeadGradient | None = None,
    *,
    beta: float,
    sft_weight: float,
) -> BatchLoss:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), sigmoid loss, plus an SFT term.

    Items carry "reference_chosen" and "reference_rejected" (add_reference). A reward is beta x (log-probability of the answer -
    that under the reference). The SFT term, sft_weight x the chosen answer's mean cross-entropy over its tokens, keeps its
    probability from falling with the rejected one's. Other arguments as for sft_loss.
    """
    pairs, documents, metrics = len(batch["reference_chosen"]), batch["label_documents"], {}

    def of_answers(values: Tensor) -> Tensor:  # (N,) of tokens -> sums (pairs, 2) of chosen and rejected
        zeros = torch.zeros(2 * pairs, device=values.device, dtype=values.dtype)
        return zeros.index_add(0, documents, values).view(pairs, 2)

    def loss_of_logps(logps: Tensor) -> Tensor:
        chosen, rejected = of_answers(logps).unbind(1)
        lengths = of_answers(torch.ones_like(logps))
        rewards = beta * (chosen - batch["reference_chosen"]), beta * (rejected - batch["reference_rejected"])
        margins = rewards[0] - rewards[1]
        sums = margins.sum(), (margins > 0).sum(), chosen.sum(), rejected.sum()
        metrics.update(zip(PREFERENCE, sums))
        return (-F.logsigmoid(margins) - sft_weight * chosen / lengths[:, 0]).sum() * scale

    loss = backward_through_head(hidden, head, batch["targets"], loss_of_logps, kept)
    return BatchLoss(loss, metrics)


def add_reference(run, model, splits: dict[str, PackedRows]) -> None:
    """Give every pair its "reference_chosen" and "reference_rejected", log-probabilities under `model` before training.

    The main process computes them and keeps them in reference_logps.json of the run's folder, under the run's identity (the
    sha256 of model and pairs, number format, ...). No second model is ever in memory.
    """
    path, identity = run.folder / "reference_logps.json", run.record["identity"]
    with run.accelerator.main_process_first():
        kept = read_kept(path, identity)
        if kept is None:
            print("computing the reference log-probabilities, once", flush=True)
            kept = {
                name: answer_logps(model, rows, run.device, progress(f"reference, {name} pairs", "rows"))
                for name, rows in splits.items()
            }
            write_kept(path, identity, kept)
    for name, rows in splits.items():
        chosen, rejected = numpy.array(kept[name]).reshape(len(rows.items), 2).T
        rows.numbers.update(reference_chosen=chosen, reference_rejected=rejected)
