"""Attention within each document of a packed row, in the form that suits the device.

Three forms of the same computation. `by_document` loops over the groups and asks for no mask over the row: the cost is the sum
of the squared document lengths, not the square of their sum. It is the one for CPUs, and what the others are tested against.
`by_varlen` is one call of torch's variable-length kernel (FlashAttention) a layer, for CUDA in bfloat16: the loop would launch
thousands of small kernels there. `by_mask` is one masked call a layer over rows of one length, for CUDA in float32 and for
Apple GPUs, which compile a graph for every new shape.

Shapes: query (1, heads, T, head_dim), key and value (1, kv heads, T, head_dim), result (1, T, heads, head_dim).
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from utils.model.batching import GroupShape

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor
]  # (query, key, value, scaling)


def plan_attention(
    layout: list[GroupShape], row_length: int, device: torch.device, dtype: torch.dtype
) -> Attention:
    """The attention of one forward pass, for all its layers: what they all need is made here, once.

    `layout` and `row_length` are collate's, `dtype` is that of matrix products.
    """
    if row_length:
        return functools.partial(by_mask, mask=row_masks(layout, row_length, device))
    if device.type == "cuda" and dtype == torch.bfloat16:
        return functools.partial(by_varlen, sequences=VarlenSequences.of(layout, device))
    return functools.partial(by_document, layout=layout, masks={})


def by_document(query, key, value, scaling, layout, masks) -> torch.Tensor:
    """A call for each run of groups of one shape. `masks`: a dict that the layers of one pass share."""
    runs = [(shape, len(list(run))) for shape, run in itertools.groupby(layout)]
    spans = [sum(shape) * count for shape, count in runs]
    parts = []
    for (shape, count), *states in zip(
        runs, *(states[0].split(spans, dim=1) for states in (query, key, value))
    ):
        # (heads, count x length, head_dim) -> (count, heads, length, head_dim)
        states = (part.unflatten(1, (count, sum(shape))).transpose(0, 1) for part in states)
        parts.append(_group_attention(*states, shape, scaling, masks).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def _group_attention(query, key, value, shape, scaling, masks):
    """The shared tokens see themselves; each branch sees the shared tokens and itself. Causal throughout."""
    attend = functools.partial(
        F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    shared, *branches = shape
    if not shared and len(branches) == 1:
        return attend(query, key, value, is_causal=True)
    (q, k, v), *rest = zip(*(states.split(shape, dim=2) for states in (query, key, value)))
    parts = [attend(q, k, v, is_causal=True)] if shared else []
    for branch, (own_q, own_k, own_v) in zip(branches, rest):
        if (shared, branch) not in masks:
            ones = torch.ones(branch, shared + branch, dtype=torch.bool, device=query.device)
            masks[shared, branch] = ones.tril(shared)
        keys, values = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
        parts.append(attend(own_q, keys, values, attn_mask=masks[shared, branch]))
    return torch.cat(parts, dim=2)


class VarlenSequences(NamedTuple):
    """A packed row as FlashAttention's sequences of queries and of keys. The queries stand as they are in the row; a branch's keys
    are those of its prefix and its own, so that keys of a shared prefix are taken several times."""

    query_ends: torch.Tensor  # (S + 1,) int32, from 0
    key_ends: torch.Tensor  # (S + 1,) int32, from 0
    longest_query: int
    longest_key: int
    key_index: torch.Tensor | None  # (K,) int64, positions in the row; None where keys stand as they are

    @classmethod
    def of(cls, layout: list[GroupShape], device: torch.device) -> "VarlenSequences":
        queries: list[int] = []
        keys: list[int] = []
        index: list[int] = []
        start = 0
        for shared, *branches in layout:
            prefix = range(start, start + shared)
            if shared:
                queries.append(shared)
                keys.append(shared)
                index += prefix
            start += shared
            for branch in branches:
                queries.append(branch)
                keys.append(shared + branch)
                index += [*prefix, *range(start, start + branch)]
                start += branch
        query_ends, key_ends = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
            for lengths in (queries, keys)
        )
        key_index = torch.tensor(index).to(device, non_blocking=True) if len(index) > start else None
        return cls(query_ends, key_ends, max(queries), max(keys), key_index)


def by_varlen(query, key, value, scaling, sequences: VarlenSequences) -> torch.Tensor:
    """One call of torch's variable-length kernel. It aligns the causal mask at the ends of queries and keys, as FlashAttention
    2.1 does: the last query of a branch sees all its keys."""
    query, key, value = (states[0].transpose(0, 1).bfloat16() for states in (query, key, value))
    if sequences.key_index is not None:
        key, value = (states.index_select(0, sequences.key_index) for states in (key, value))
    result = varlen_attn(
        query,
        key,
        value,
        sequences.query_ends,
        sequences.key_ends,
        sequences.longest_query,
        sequences.longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result[None]


def row_masks(layout: list[GroupShape], row_length: int, device: torch.device) -> torch.Tensor:
    """Who sees whom in rows of `row_length` tokens: bool (rows, 1, row_length, row_length), query before key."""
    groups = [number for number, shape in enumerate(layout) for _ in range(sum(shape))]
    branches = [branch for shape in layout for branch, length in enumerate(shape) for _ in range(length)]
    group, branch = (
        torch.tensor(numbers, dtype=torch.int32).view(-1, row_length).to(device, non_blocking=True)
        for numbers in (groups, branches)
    )
    same_group = group[:, :, None] == group[:, None, :]
    prefix_or_own = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    causal = torch.ones(row_length, row_length, dtype=torch.bool, device=device).tril()
    return (same_group & prefix_or_own & causal)[:, None]


def by_mask(query, key, value, scaling, mask) -> torch.Tensor:
    """One masked call over all rows. Keys and values are repeated for the heads that share them: with `enable_gqa` and a mask,
    CUDA has the slow math kernel only."""
    rows, _, length, _ = mask.shape
    query, key, value = (
        states[0].unflatten(1, (rows, length)).transpose(0, 1) for states in (query, key, value)
    )
    heads = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(heads, dim=1) for states in (key, value))
    result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return result.transpose(1, 2).flatten(0, 1)[None]
