"""The LM head on trained positions only, in chunks: summed cross-entropy with its gradient, and log-probabilities."""

import math

import torch

CHUNK = 512  # positions scored at once, at most: 512 x 151,936 fp32 logits are 311 MB


def sum_of_losses(hidden, weight, targets, token_weights=None):
    """Sum over N positions of token_weight x cross-entropy, differentiable in `hidden` (N, H) and `weight` (V, H).

    targets: (N,) int64. token_weights: (N,) float32 or None for ones; no gradient flows to them. Logits are made for CHUNK
    positions at a time and the gradient is formed at once, in the forward pass, so that the (N, V) matrix never exists. That
    gradient is scaled in place by the backward pass, which therefore can be run once only (a second time is an error).
    Products run in bfloat16 under autocast, else in the dtype of `hidden`; softmax and sums are float32 (float64 for
    float64 input).
    """
    if token_weights is None:
        token_weights = torch.ones(len(targets), device=hidden.device)
    return _SumOfLosses.apply(hidden, weight, targets, token_weights)


class _SumOfLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        compute, exact = dtypes(hidden)
        head = weight.to(compute)
        hidden_gradient = torch.empty_like(hidden, dtype=exact) if need_hidden else None
        weight_gradient = torch.empty_like(weight) if need_weight else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(targets)):
                states, wanted, scale = hidden[part].to(compute), targets[part], token_weights[part].to(exact)
                # In place throughout: a second (CHUNK, V) matrix would be the peak of the memory.
                logits = (states @ head.T).to(exact)
                most = logits.amax(dim=1)
                right = logits.gather(1, wanted[:, None])[:, 0]
                sums = logits.sub_(most[:, None]).exp_().sum(dim=1)
                total += (scale * (most + sums.log() - right)).sum()
                if need_hidden or need_weight:
                    # d loss / d logits = scale x (softmax - one at the target)
                    gradient = logits.mul_((scale / sums)[:, None])
                    gradient[torch.arange(len(wanted), device=wanted.device), wanted] -= scale
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


@torch.no_grad()
def token_logps(hidden, weight, targets):
    """Log-probability of each target: (N,) float32 (float64 for float64 input), from `hidden` (N, H), `weight` (V, H)."""
    compute, exact = dtypes(hidden)
    head = weight.to(compute)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for part in _parts(len(targets)):
            logits = (hidden[part].to(compute) @ head.T).to(exact)
            parts.append(logits.gather(1, targets[part, None])[:, 0] - torch.logsumexp(logits, dim=1))
    return torch.cat(parts)


def _parts(count):
    """Slices of at most CHUNK, as equal as can be: the matrix product of a short rest is slow for what it computes."""
    size = math.ceil(count / max(1, math.ceil(count / CHUNK))) or 1
    return [slice(start, start + size) for start in range(0, max(1, count), size)]


def dtypes(hidden):
    """(dtype of matrix products with `hidden` now, under autocast or not; dtype of softmax and sums)."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type), torch.float32
    return hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
