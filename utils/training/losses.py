"""The losses, as functions of tensors: what SFT, LoRA and DPO minimise.

The trainer divides sums by the units of a whole optimizer step (trained tokens, or pairs), so that the result does not depend on
how the step's rows are split up among batches or processes.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from utils.model.lm_head import HeadGradient, cross_entropy_sum


def sft_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, scale: Tensor, kept: HeadGradient | None = None
) -> Tensor:
    """Cross-entropy of the trained tokens in nats: its sum times `scale`, 1 / (trained tokens of the step) for their mean.

    hidden (N, H), head (V, H), targets (N,). `kept`: as for utils.model.lm_head.cross_entropy_sum.
    """
    return cross_entropy_sum(hidden, head, targets, scale.expand(len(targets)), kept)


class DPOLoss(NamedTuple):
    losses: Tensor  # (pairs,)
    margins: Tensor  # (pairs,): reward of the chosen answer less that of the rejected one


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    sft_weight: float = 0.0,
    chosen_lengths: Tensor | float = 1.0,
) -> DPOLoss:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), sigmoid loss, plus an SFT term.

    The first four are the log-probabilities (pairs,) of whole answers, under the policy and under the reference. A reward is
    beta x (log-probability - that under the reference). The SFT term, sft_weight x the chosen answer's mean cross-entropy over
    its `chosen_lengths` tokens, keeps its probability from falling together with the rejected one's.
    """
    margins = beta * (chosen - reference_chosen) - beta * (rejected - reference_rejected)
    return DPOLoss(-F.logsigmoid(margins) - sft_weight * chosen / chosen_lengths, margins)
