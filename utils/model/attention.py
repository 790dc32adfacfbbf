"""Attention within each document of a packed row."""

import functools
import itertools

import torch
import torch.nn.functional as F


def document_attention(module, query, key, value, attention_mask, scaling, layout=None, **kwargs):
    """Causal attention inside each document of a packed row. query: (1, heads, T, head_dim); key, value: (1, kv, T, head_dim).

    `layout` is collate's. Trees of one shape that stand next to one another are computed together. The cost is the sum of
    the squared document lengths, not the square of their sum, and no mask over the row is ever built.
    Returns (1, T, heads, head_dim) and no weights, as transformers' attention functions do.
    """
    shapes = [(shape, len(list(run))) for shape, run in itertools.groupby(layout)]
    spans = [sum(shape) * count for shape, count in shapes]
    parts = []
    for (shape, count), *states in zip(
        shapes, *(states[0].split(spans, dim=1) for states in (query, key, value))
    ):
        # (heads, count x length, head_dim) -> (count, heads, length, head_dim)
        states = (part.unflatten(1, (count, sum(shape))).transpose(0, 1) for part in states)
        parts.append(_group_attention(*states, shape, scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def _group_attention(query, key, value, shape, scaling):
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
        mask = _seen(shared, branch, query.device)
        parts.append(
            attend(own_q, torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2), attn_mask=mask)
        )
    return torch.cat(parts, dim=2)


@functools.lru_cache(maxsize=512)  # the layers of one step ask for the same masks
def _seen(shared, branch, device):
    return torch.ones(branch, shared + branch, dtype=torch.bool, device=device).tril(shared)
