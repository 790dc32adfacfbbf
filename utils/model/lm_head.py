"""The LM head on trained positions only, in chunks: cross-entropy with its gradient, and log-probabilities.

Matrix products run in bfloat16 under autocast, else in the dtype of `hidden`; softmax and sums in float32 (float64 for float64).
Shapes: hidden (N, H), weight (V, H), targets (N,) int64. Rows of `hidden` beyond the last target weigh nothing. The (N, V) matrix
of logits never exists as a whole. torch's own F.linear_cross_entropy is slower on CPUs, and it cannot weigh single tokens.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.model.mixed import REDUCED, matmul_dtype, on_cuda

CHUNK = 512  # positions scored at once, at most: 512 x 151,936 logits are 148 MiB in bfloat16
CACHED = 16  # of them, whose softmax is worked out at a time: 9 MiB in float32, which stay in a CPU's cache
UNIT = 1 << 12  # float16 holds softmax values in units of 1 / UNIT: its least number is 6e-8
SLICE = 1 << 14  # rows of the weight whose gradient is formed at a time in bfloat16: 32 MiB


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    kept: "HeadGradient | None" = None,
) -> Tensor:
    """Sum over the positions of token_weight x cross-entropy, differentiable in `hidden` and `weight`.

    token_weights: (N,) float32, or None for ones; no gradient flows to them. The gradient is formed in the forward pass, chunk by
    chunk, and scaled in place in the backward pass, which can therefore run only once. With `kept` the gradient of the weight is
    added to `weight.grad` at once, which saves a second matrix of its size (0.6 GB): the sum must be the loss then, unscaled.
    """
    if token_weights is None:
        token_weights = torch.ones(len(targets), device=hidden.device)
    if extra := len(hidden) - len(targets):
        targets, token_weights = F.pad(targets, (0, extra)), F.pad(token_weights, (0, extra))
    if not torch.is_grad_enabled():  # autograd asks for the gradient of a weight even then
        hidden, weight = hidden.detach(), weight.detach()
    return _CrossEntropySum.apply(hidden, weight, targets, token_weights, kept)


class HeadGradient:
    """The memory of the head's gradient, kept from one optimizer step to the next: fresh 0.6 GB would come page by page, in 0.4 to
    1.0 s of a step of 6."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """weight.grad, zeros where there was none."""
        if weight.grad is None:
            self.memory = torch.zeros_like(weight) if self.memory is None else self.memory.zero_()
            weight.grad = self.memory
        return weight.grad


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, kept):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        exact = _exact_dtype(hidden)
        head = weight.to(matmul_dtype(hidden))
        hidden_gradient = torch.empty_like(hidden, dtype=exact) if need_hidden else None
        weight_gradient = None
        if need_weight:
            weight_gradient = kept.of(weight) if kept else torch.zeros_like(weight)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets)):
                states, weights = hidden[part].to(head.dtype), token_weights[part].to(exact)
                if on_cuda(hidden) and head.dtype in REDUCED:
                    given = (None if hidden_gradient is None else hidden_gradient[part], weight_gradient)
                    total += _loss_on_cuda(states, head, targets[part], weights, *given)
                    continue
                logits = states @ head.T
                total += _loss_and_gradient(logits, targets[part], weights)
                if need_hidden:
                    hidden_gradient[part] = logits @ head
                if need_weight and logits.dtype == weight_gradient.dtype:
                    weight_gradient.addmm_(logits.T, states)
                elif need_weight:  # a slice at a time: the sum of products in bfloat16 is kept in float32
                    for rows, columns in zip(weight_gradient.split(SLICE), logits.split(SLICE, dim=1)):
                        rows += columns.T @ states
        ctx.into_grad, ctx.hidden_dtype = need_weight and kept is not None, hidden.dtype
        ctx.save_for_backward(hidden_gradient, None if ctx.into_grad else weight_gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if ctx.into_grad and not on_cuda(upstream) and upstream != 1:  # a GPU would have to be waited for
            raise RuntimeError("the loss was scaled after its gradient had been added up")
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.mul_(upstream).to(ctx.hidden_dtype)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(upstream.to(weight_gradient.dtype))
        return hidden_gradient, weight_gradient, None, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """The loss of one chunk, of which d loss / d logits takes the place of the `logits`: on a CPU a few positions at a time, whose
    passes over the vocabulary stay in the cache."""
    losses = []
    size = CACHED if logits.device.type == "cpu" else len(targets)
    for block, wanted, weights in zip(logits.split(size), targets.split(size), token_weights.split(size)):
        scores = block.to(token_weights.dtype)
        highest = scores.amax(dim=1)
        right = scores.gather(1, wanted[:, None])[:, 0]
        sums = scores.sub_(highest[:, None]).exp_().sum(dim=1)
        losses.append(weights * (highest + sums.log() - right))
        # d loss / d logits = token_weight x (softmax - 1 at the target)
        gradient = scores.mul_((weights / sums)[:, None])
        gradient[torch.arange(len(wanted), device=wanted.device), wanted] -= weights
        if gradient.dtype != block.dtype:
            block.copy_(gradient)
    return torch.cat(losses).sum()


def _loss_on_cuda(states, head, targets, token_weights, hidden_gradient, weight_gradient) -> Tensor:
    """The loss of one chunk, its gradients written to `hidden_gradient` (n, H) and added to `weight_gradient` (V, H), in as few passes
    over the scores (n, V) as torch's kernels allow: the much smaller states take the token weights."""
    logps = torch.log_softmax(torch.mm(states, head.T, out_dtype=torch.float32), dim=1)
    right = logps.gather(1, targets[:, None])
    loss = -(right[:, 0] * token_weights).sum()
    unit, weights = 1, token_weights[:, None]
    if head.dtype == torch.float16:  # keeps softmax values down to 1e-11
        unit, weights, logps = UNIT, weights / UNIT, logps.add_(math.log(UNIT))
    gradient = torch.exp(logps, out=torch.empty_like(logps, dtype=head.dtype))
    gradient.scatter_(1, targets[:, None], (unit * (right.exp() - 1)).to(head.dtype))
    if hidden_gradient is not None:
        torch.mul(torch.mm(gradient, head, out_dtype=torch.float32), weights, out=hidden_gradient)
    if weight_gradient is not None:
        weighted = torch.mul(states, weights, out=torch.empty_like(states))
        torch.addmm(weight_gradient, gradient.T, weighted, out_dtype=torch.float32, out=weight_gradient)
    return loss


def backward_through_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_of_logps: Callable[[Tensor], Tensor],
    kept: HeadGradient | None = None,
) -> Tensor:
    """The loss `loss_of_logps(logps)` of the targets' log-probabilities (N,), differentiable in `hidden` and `weight`.

    The first pass over the head gives d loss / d logp of each token, the second the gradient with these as token weights.
    """
    logps = token_logps(hidden.detach(), weight, targets)
    if not torch.is_grad_enabled():
        return loss_of_logps(logps)
    logps.requires_grad_()
    loss = loss_of_logps(logps)
    (per_token,) = torch.autograd.grad(loss, logps)
    surrogate = cross_entropy_sum(hidden, weight, targets, -per_token, kept)
    return loss.detach() + surrogate - surrogate.detach()


@torch.no_grad()
def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: (N,) float32 (float64 for float64 input)."""
    head, count = weight.to(matmul_dtype(hidden)), len(targets)
    targets = F.pad(targets, (0, len(hidden) - count)) if len(hidden) > count else targets
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for part in _chunks(len(targets)):
            states = hidden[part].to(head.dtype)
            if on_cuda(hidden) and head.dtype in REDUCED:
                scores = torch.log_softmax(torch.mm(states, head.T, out_dtype=torch.float32), dim=1)
                parts.append(scores.gather(1, targets[part, None])[:, 0])
            else:
                scores = (states @ head.T).to(_exact_dtype(hidden))
                parts.append(scores.gather(1, targets[part, None])[:, 0] - torch.logsumexp(scores, dim=1))
            del scores  # before the next ones are made
    return torch.cat(parts)[:count]


def _chunks(count: int) -> Iterator[slice]:
    """Slices of at most CHUNK, as equal as can be: the product of a short rest is slow for what it computes."""
    size = math.ceil(count / max(1, math.ceil(count / CHUNK))) or 1
    return (slice(start, start + size) for start in range(0, max(1, count), size))


def _exact_dtype(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
