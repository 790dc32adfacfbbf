"""What makes packed training exact and cheap: attention within each document, and an LM head on trained positions only.

`prepare_packed(model)` changes how a Qwen3 model computes while it trains; its weights and what it saves stay as they are.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from utils.fused_layers import fuse_layers
from utils.packing import IGNORED

CHUNK = 512         # positions scored at once, at most: 512 x 151,936 fp32 logits are 311 MB


def document_attention(module, query, key, value, attention_mask, scaling, layout=None, **kwargs):
    """Causal attention inside each document of a packed row. query: (1, heads, T, head_dim); key, value: (1, kv, T, head_dim).

    `layout` is collate's. Trees of one shape that stand next to one another are computed together. The cost is the sum of
    the squared document lengths, not the square of their sum, and no mask over the row is ever built.
    Returns (1, T, heads, head_dim) and no weights, as transformers' attention functions do.
    """
    shapes = [(shape, len(list(run))) for shape, run in itertools.groupby(layout)]
    spans = [sum(shape) * count for shape, count in shapes]
    parts = []
    for (shape, count), *states in zip(shapes, *(states[0].split(spans, dim=1) for states in (query, key, value))):
        # (heads, count x length, head_dim) -> (count, heads, length, head_dim)
        states = (part.unflatten(1, (count, sum(shape))).transpose(0, 1) for part in states)
        parts.append(_tree_attention(*states, shape, scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def _tree_attention(query, key, value, shape, scaling):
    """The shared tokens see themselves; each branch sees the shared tokens and itself. Causal throughout."""
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    shared, *branches = shape
    if not shared and len(branches) == 1:
        return attend(query, key, value, is_causal=True)
    (q, k, v), *rest = zip(*(states.split(shape, dim=2) for states in (query, key, value)))
    parts = [attend(q, k, v, is_causal=True)] if shared else []
    for branch, (own_q, own_k, own_v) in zip(branches, rest):
        mask = _seen(shared, branch, query.device)
        parts.append(attend(own_q, torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2), attn_mask=mask))
    return torch.cat(parts, dim=2)


@functools.lru_cache(maxsize=512)       # the layers of one step ask for the same masks
def _seen(shared, branch, device):
    return torch.ones(branch, shared + branch, dtype=torch.bool, device=device).tril(shared)


AttentionInterface.register("document_attention", document_attention)


def prepare_packed(model):
    """Let `model` (Qwen3ForCausalLM) take the batches of utils.packing.collate and return the hidden states that count.

    Its forward then gives a (N, hidden) tensor: the final hidden states of the N positions that have a label. The LM head
    is left to the loss, which sees only those. Call it before an adapter is put on.
    """
    model.set_attn_implementation("document_attention")      # for which transformers builds no mask
    fuse_layers(model, document_attention)

    def forward(input_ids, position_ids, shift_labels, layout, **unset):      # PEFT adds arguments that are None
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if embedding is head and head.requires_grad and head.device.type == "cpu":
            given = {"inputs_embeds": _TiedEmbedding.apply(embedding, input_ids)}
        else:
            given = {"input_ids": input_ids}
        hidden = model.model(**given, position_ids=position_ids, layout=layout, use_cache=False).last_hidden_state
        return hidden[shift_labels != IGNORED]

    model.forward = forward
    return model


class _TiedEmbedding(torch.autograd.Function):
    """Embedding of ids (1, T) whose gradient names only the T rows of `weight` (V, H) that it touches.

    The LM head's gradient of the same weight is there first, and autograd adds these rows to it in place. The usual gradient
    is a second matrix of 0.6 GB, nearly all zeros, to be filled and added in every step.
    """

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, upstream):
        (ids,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(ids, upstream[0], ctx.shape, check_invariants=False), None


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
                        weight_gradient.addmm_(gradient.T.to(weight.dtype), states.to(weight.dtype), beta=int(part.start > 0))
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
