"""Attention within each document of a packed row, in the form that suits the device.

`by_document` loops over the groups, so that the cost is the sum of the squared document lengths: for CPUs, and what the others are
tested against. `by_varlen` is one call of torch's variable-length kernel (FlashAttention) a layer, for CUDA in bfloat16 and float16.
`by_mask` is one masked call a layer over rows of one length, for other CUDA devices and for Apple GPUs, which compile a graph for
every new shape.

Shapes: query (1, heads, T, head_dim), key and value (1, kv heads, T, head_dim), result (1, T, heads, head_dim).
"""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from utils.model.mixed import REDUCED, on_cuda, on_gpu
from utils.model.packing import GroupShape

BLOCK = 256  # queries at a time in plain products: keys after them are left out, quadratic tensors stay small
# Multiplications of queries with keys in one call, up to which the fused kernel in float32 is faster than plain products in bfloat16,
# which take 0.7 ms at least: one document of 90 tokens in Qwen3-0.6B.
FEW = 2**24

# Of query, key, value and scaling.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def plan_attention(
    layout: list[GroupShape], row_length: int, states: torch.Tensor, dtype: torch.dtype
) -> Attention:
    """The attention of one forward pass, for all its layers. `layout` and `row_length` are collate's, `dtype` is that of products."""
    if row_length:
        mask = row_masks(layout, row_length, states.device)
        return functools.partial(by_mask, mask=as_numbers(mask, dtype) if on_gpu(states) else mask)
    if on_cuda(states) and dtype in REDUCED:
        key_index, sequences = varlen_sequences(layout, states.device)
        return functools.partial(by_varlen, key_index=key_index, sequences=sequences)
    reduced = states.device.type == "cpu" and dtype == torch.bfloat16
    attend = attend_in_bfloat16 if reduced else fused_attend
    return functools.partial(by_document, layout=layout, masks={}, attend=attend)


def fused_attend(query, key, value, scaling, masks) -> torch.Tensor:
    """Causal attention (count, heads, L, head_dim) to the keys (count, kv heads, K, head_dim), of which the last L are the queries'
    own. `masks`: a dict that the calls of one pass share."""
    queries, keys = query.shape[2], key.shape[2]
    shared = query.shape[1] != key.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=shared)
    if queries == keys:
        return attend(query, key, value, is_causal=True)
    if (queries, keys) not in masks:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        masks[queries, keys] = ones.tril(keys - queries)
    return attend(query, key, value, attn_mask=masks[queries, keys])


def attend_in_bfloat16(query, key, value, scaling, masks) -> torch.Tensor:
    """Plain products in bfloat16, since torch's fused kernel for CPUs is slow in it; of few, that kernel in float32."""
    if query.numel() * key.shape[2] > FEW:
        return PlainAttention.apply(query, key, value, scaling, masks, torch.bfloat16)
    with torch.autocast("cpu", enabled=False):  # which would cast to bfloat16
        # Copies: what autograd keeps of a few tokens would otherwise hold the queries and keys of the whole row.
        parts = (part.to(torch.float32, copy=True) for part in (query, key, value))
        return fused_attend(*parts, scaling, masks)


class PlainAttention(torch.autograd.Function):
    """fused_attend in products of `dtype`: softmax(q k^T) v, BLOCK queries at a time. Heads that share a key are one product.

    Shapes: queries (count, kv heads, sharing heads, L, width), keys and values (count, kv heads, K, width); weights and scores of a
    block, which sees the first k keys (count, kv heads, sharing heads x block, k). The weights, which grow with the square of the
    length, are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, masks, dtype):
        count, heads, length, width = query.shape
        ctx.scaling, ctx.masks, ctx.dtypes = scaling, masks, (query.dtype, key.dtype, value.dtype)
        # Scaled before it is rounded.
        query = (query * scaling).to(dtype, memory_format=torch.contiguous_format)
        query, key, value = query.unflatten(1, (key.shape[1], -1)), key.to(dtype), value.to(dtype)
        ctx.save_for_backward(query, key, value)
        result = query.new_empty(count, length, heads, width).transpose(1, 2)
        for block, seen, weights in _blocks(query, key, masks):
            result[:, :, block] = (weights @ value[:, :, :seen]).view(count, heads, -1, width)
        return result

    @staticmethod
    def backward(ctx, d_result):
        query, key, value = ctx.saved_tensors
        d_result = d_result.to(query.dtype).unflatten(1, query.shape[1:3])
        exact = torch.promote_types(query.dtype, torch.float32)
        d_query = torch.empty_like(query, dtype=exact)
        d_key, d_value = (torch.zeros_like(states, dtype=exact) for states in (key, value))
        for block, seen, weights in _blocks(query, key, ctx.masks):
            own, d_own = (states[..., block, :].flatten(2, 3) for states in (query, d_result))
            d_value[:, :, :seen] += weights.transpose(2, 3) @ d_own
            d_weights = d_own @ value[:, :, :seen].transpose(2, 3)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_key[:, :, :seen] += d_scores.transpose(2, 3) @ own
            d_query[..., block, :] = (d_scores @ key[:, :, :seen]).view_as(query[..., block, :])
        gradients = d_query.mul_(ctx.scaling).flatten(1, 2), d_key, d_value
        return *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes)), None, None, None


def _blocks(query, key, masks):
    """(queries of a block, number of keys that its last one sees, the attention weights between them)."""
    for start in range(0, query.shape[3], BLOCK):
        block = query[..., start : start + BLOCK, :]
        own = block.shape[3]
        seen = key.shape[2] - query.shape[3] + start + own
        if own not in masks:
            masks[own] = query.new_full((own, own), -torch.inf).triu_(1)
        weights = block.flatten(2, 3) @ key[:, :, :seen].transpose(2, 3)
        weights.unflatten(2, block.shape[2:4])[..., -own:] += masks[own]
        weights = weights.softmax(dim=-1)
        yield slice(start, start + own), seen, weights


def by_document(query, key, value, scaling, layout, masks, attend=fused_attend) -> torch.Tensor:
    """A call of `attend` for each run of groups of one shape. `masks`: a dict that the layers of one pass share."""
    runs = [(shape, len(list(run))) for shape, run in itertools.groupby(layout)]
    spans = [sum(shape) * count for shape, count in runs]
    of_runs = (states[0].split(spans, dim=1) for states in (query, key, value))
    parts = []
    for (shape, count), *states in zip(runs, *of_runs):
        # (heads, count x length, head_dim) -> (count, heads, length, head_dim)
        states = (part.unflatten(1, (count, sum(shape))).transpose(0, 1) for part in states)
        result = _group_attention(*states, shape, lambda *states: attend(*states, scaling, masks))
        parts.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def _group_attention(query, key, value, shape, attend):
    """The shared tokens see themselves; each branch sees the shared tokens and itself. Causal throughout."""
    shared, *branches = shape
    if not shared and len(branches) == 1:
        return attend(query, key, value)
    (q, k, v), *rest = zip(*(states.split(shape, dim=2) for states in (query, key, value)))
    parts = [attend(q, k, v)] if shared else []
    for own_q, own_k, own_v in rest:
        parts.append(attend(own_q, torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)))
    return torch.cat(parts, dim=2)


def varlen_sequences(layout: list[GroupShape], device: torch.device) -> tuple[torch.Tensor | None, tuple]:
    """A packed row as FlashAttention's sequences: (key index, what varlen_attn takes of their ends and lengths).

    A branch's keys are those of its prefix and its own: `key index` holds their positions, None if keys stand as they are.
    """
    queries, keys, index, start = [], [], [], 0
    for shared, *branches in layout:
        prefix = range(start, start + shared)
        for branch, before in ((shared, ()), *((branch, prefix) for branch in branches)):
            if branch:
                queries.append(branch)
                keys.append(len(before) + branch)
                index += [*before, *range(start, start + branch)]
                start += branch
    ends = [torch.tensor([0, *itertools.accumulate(one)], dtype=torch.int32) for one in (queries, keys)]
    key_index = torch.tensor(index).to(device) if len(index) > start else None
    return key_index, (*(part.to(device) for part in ends), max(queries), max(keys))


def by_varlen(query, key, value, scaling, key_index, sequences) -> torch.Tensor:
    """One call of torch's variable-length kernel over varlen_sequences. The last query of a branch sees all its keys: the kernel
    aligns the causal mask at the ends, as FlashAttention 2.1 does."""
    dtype = query.dtype if query.dtype in REDUCED else torch.bfloat16
    query, key, value = (states.squeeze(0).transpose(0, 1).to(dtype) for states in (query, key, value))
    if key_index is not None:
        key, value = (states.index_select(0, key_index) for states in (key, value))
    options = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": query.shape[1] != key.shape[1]}
    return varlen_attn(query, key, value, *sequences, **options)[None]


def row_masks(layout: list[GroupShape], row_length: int, device: torch.device) -> torch.Tensor:
    """The mask of rows of `row_length` tokens: bool (rows, 1, row_length, row_length), True where a query (first) sees a key."""
    groups = [number for number, shape in enumerate(layout) for _ in range(sum(shape))]
    branches = [branch for shape in layout for branch, length in enumerate(shape) for _ in range(length)]
    numbers = torch.tensor([groups, branches], dtype=torch.int32)
    group, branch = numbers.view(2, -1, row_length).to(device)
    same_group = group[:, :, None] == group[:, None, :]
    prefix_or_own = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    causal = torch.ones(row_length, row_length, dtype=torch.bool, device=device).tril()
    return (same_group & prefix_or_own & causal)[:, None]


def as_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what is added to the scores, which a GPU's kernels would make of it in every layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def by_mask(query, key, value, scaling, mask) -> torch.Tensor:
    """One masked call over all rows. Keys and values are repeated for the heads that share them: with `enable_gqa` and a mask,
    CUDA has only the slow math kernel."""
    rows, _, length, _ = mask.shape
    query, key, value = (
        states.squeeze(0).unflatten(1, (rows, length)).transpose(0, 1) for states in (query, key, value)
    )
    heads = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(heads, dim=1) for states in (key, value))
    result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return result.transpose(1, 2).flatten(0, 1)[None]
