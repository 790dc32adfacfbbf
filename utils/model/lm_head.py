"""The LM head on trained positions only, in chunks: cross-entropy with its gradient, and log-probabilities.

Matrix products run in bfloat16 under autocast, else in the dtype of `hidden`; softmax and sums in float32 (float64 for float64).
Shapes: hidden (N, H), weight (V, H), targets (N,) int64. The (N, V) matrix of logits never exists as a whole.

torch's own F.linear_cross_entropy does the same in chunks, but slower on CPUs, and it cannot weigh single tokens
(tests/benchmarks/README.md).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 512  # positions scored at once, at most: 512 x 151,936 float32 logits are 297 MiB


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> Tensor:
    """Sum over the positions of token_weight x cross-entropy, differentiable in `hidden` and `weight`.

    token_weights: (N,) float32, or None for ones; no gradient flows to them. The gradient is formed in the forward pass, chunk by
    chunk, and scaled in place in the backward pass, which can therefore run only once (a second time is an error).
    """
    if token_weights is None:
        token_weights = torch.ones(len(targets), device=hidden.device)
    return _CrossEntropySum.apply(hidden, weight, targets, token_weights)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        compute, exact = matmul_dtype(hidden), _exact_dtype(hidden)
        head = weight.to(compute)
        hidden_gradient = torch.empty_like(hidden, dtype=exact) if need_hidden else None
        weight_gradient = torch.empty_like(weight) if need_weight else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets)):
                states = hidden[part].to(compute)
                loss, gradient = _chunk_loss(
                    (states @ head.T).to(exact), targets[part], token_weights[part].to(exact)
                )
                total += loss
                if need_hidden or need_weight:
                    gradient = gradient.to(compute)
                if need_hidden:
                    hidden_gradient[part] = gradient @ head
                if need_weight:
                    weight_gradient.addmm_(
                        gradient.T.to(weight.dtype), states.to(weight.dtype), beta=int(part.start > 0)
                    )
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            None if hidden_gradient is None else hidden_gradient.mul_(upstream).to(ctx.hidden_dtype),
            None if weight_gradient is None else weight_gradient.mul_(upstream.to(weight_gradient.dtype)),
            None,
            None,
        )


def _chunk_loss(logits: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d logits) of one chunk. In place throughout: a second (chunk, V) matrix would be the peak of the memory."""
    highest = logits.amax(dim=1)
    right = logits.gather(1, targets[:, None])[:, 0]
    sums = logits.sub_(highest[:, None]).exp_().sum(dim=1)
    loss = (token_weights * (highest + sums.log() - right)).sum()
    # d loss / d logits = token_weight x (softmax - 1 at the target)
    gradient = logits.mul_((token_weights / sums)[:, None])
    gradient[torch.arange(len(targets), device=targets.device), targets] -= token_weights
    return loss, gradient


def backward_through_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_of_logps: Callable[[Tensor], Tensor]
) -> Tensor:
    """The loss `loss_of_logps(logps)`, a scalar function of the targets' log-probabilities (N,), differentiable in `hidden` and `weight`.

    Two passes over the head: the first scores the tokens, which gives d loss / d logp of each; the second forms the gradient
    with these as token weights. Without gradients the first pass is all.
    """
    logps = token_logps(hidden.detach(), weight, targets)
    if not torch.is_grad_enabled():
        return loss_of_logps(logps)
    logps.requires_grad_()
    loss = loss_of_logps(logps)
    (per_token,) = torch.autograd.grad(loss, logps)
    surrogate = cross_entropy_sum(hidden, weight, targets, -per_token)
    return loss.detach() + surrogate - surrogate.detach()


@torch.no_grad()
def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: (N,) float32 (float64 for float64 input)."""
    head = weight.to(matmul_dtype(hidden))
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for part in _chunks(len(targets)):
            logits = (hidden[part].to(head.dtype) @ head.T).to(_exact_dtype(hidden))
            parts.append(logits.gather(1, targets[part, None])[:, 0] - torch.logsumexp(logits, dim=1))
    return torch.cat(parts)


def _chunks(count: int) -> Iterator[slice]:
    """Slices of at most CHUNK, as equal as can be: the matrix product of a short rest is slow for what it computes."""
    size = math.ceil(count / max(1, math.ceil(count / CHUNK))) or 1
    return (slice(start, start + size) for start in range(0, max(1, count), size))


def matmul_dtype(states: Tensor) -> torch.dtype:
    """The dtype of matrix products with `states` here and now, under autocast or not."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _exact_dtype(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
