"""What makes packed training exact and cheap: attention within each document, and an LM head on trained positions only.

`prepare_packed(model)` changes how a Qwen3 model computes while it trains; its weights and what it saves stay as they are.
"""

import itertools

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from utils.packing import IGNORED

CHUNK = 256         # positions scored at once: 256 x 151,936 fp32 logits are 156 MB


def document_attention(module, query, key, value, attention_mask, scaling, document_lengths=None, **kwargs):
    """Causal attention inside each document of a packed row. query: (1, heads, T, head_dim); key, value: (1, kv, T, head_dim).

    Documents of equal length that stand next to one another are computed together. The cost is the sum of the squared
    document lengths, not the square of their sum, and no mask is ever built.
    Returns (1, T, heads, head_dim) and no weights, as transformers' attention functions do.
    """
    runs = [(length, len(list(run))) for length, run in itertools.groupby(document_lengths)]
    spans = [length * count for length, count in runs]
    parts = []
    for (length, count), *states in zip(runs, *(states[0].split(spans, dim=1) for states in (query, key, value))):
        # (heads, count x length, head_dim) -> (count, heads, length, head_dim)
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in states)
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


AttentionInterface.register("document_attention", document_attention)


def prepare_packed(model):
    """Let `model` (Qwen3ForCausalLM) take the batches of utils.packing.collate and return the hidden states that count.

    Its forward then gives a (N, hidden) tensor: the final hidden states of the N positions that have a label. The LM head
    is left to the loss, which sees only those. Call it before an adapter is put on.
    """
    model.set_attn_implementation("document_attention")

    def forward(input_ids, position_ids, shift_labels, document_lengths, **unset):      # PEFT adds arguments that are None
        hidden = model.model(input_ids=input_ids, position_ids=position_ids, document_lengths=document_lengths,
                             use_cache=False).last_hidden_state
        return hidden[shift_labels != IGNORED]

    model.forward = forward
    return model


def sum_of_losses(hidden, weight, targets, token_weights=None):
    """Sum over N positions of token_weight x cross-entropy, differentiable in `hidden` (N, H) and `weight` (V, H).

    targets: (N,) int64. token_weights: (N,) float32 or None for ones; no gradient flows to them. Logits are made for CHUNK
    positions at a time and the gradient is formed at once, in the forward pass, so that the (N, V) matrix never exists.
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
        compute, exact = _dtypes(hidden)
        head = weight.to(compute)
        hidden_gradient = torch.empty_like(hidden, dtype=exact) if need_hidden else None
        weight_gradient = torch.zeros_like(weight) if need_weight else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), CHUNK):
                part = slice(start, start + CHUNK)
                states, wanted, scale = hidden[part].to(compute), targets[part], token_weights[part].to(exact)
                logits = (states @ head.T).to(exact)
                logsumexp = torch.logsumexp(logits, dim=1)
                total += (scale * (logsumexp - logits.gather(1, wanted[:, None])[:, 0])).sum()
                if need_hidden or need_weight:
                    # d loss / d logits = scale x (softmax - one at the target), written over the logits
                    gradient = logits.sub_(logsumexp[:, None]).exp_()
                    gradient[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
                    gradient = gradient.mul_(scale[:, None]).to(compute)
                    if need_hidden:
                        hidden_gradient[part] = gradient @ head
                    if need_weight:
                        weight_gradient.addmm_(gradient.T.to(weight.dtype), states.to(weight.dtype))
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            None if hidden_gradient is None else (hidden_gradient * upstream).to(ctx.hidden_dtype),
            None if weight_gradient is None else weight_gradient * upstream.to(weight_gradient.dtype),
            None,
            None,
        )


@torch.no_grad()
def token_logps(hidden, weight, targets):
    """Log-probability of each target: (N,) float32 (float64 for float64 input), from `hidden` (N, H), `weight` (V, H)."""
    compute, exact = _dtypes(hidden)
    head = weight.to(compute)
    parts = [torch.zeros(0, dtype=exact, device=hidden.device)]
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(targets), CHUNK):
            logits = (hidden[start:start + CHUNK].to(compute) @ head.T).to(exact)
            wanted = targets[start:start + CHUNK, None]
            parts.append(logits.gather(1, wanted)[:, 0] - torch.logsumexp(logits, dim=1))
    return torch.cat(parts)


def _dtypes(hidden):
    """(dtype of the products, dtype of softmax and sums)."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type), torch.float32
    return hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
