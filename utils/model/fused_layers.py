"""Qwen3's layers with the same results, fewer tensors kept for the backward pass and fewer passes over memory.

A norm keeps what it has normalised and not what came in. SwiGLU keeps its two inputs and computes its inner steps again. Activations
shrink by a quarter, which decides how long a row fits into memory. After the attention of the last layer only the trained positions
are computed: nothing else asks for the others. Plain PyTorch, for any device. Formulas: RMSNorm, Zhang and
Sennrich 2019 (arXiv:1910.07467); rotary positions, Su et al. 2021 (arXiv:2104.09864); SwiGLU, Shazeer 2020 (arXiv:2002.05202).
"""

import functools

import torch
import torch.nn.functional as F


def fuse_layers(model) -> None:
    """Let the layers of `model` (Qwen3ForCausalLM) compute this way.

    Its forward then needs `attention` (utils.model.attention.Attention) and `wanted_positions` (N,) among the keyword arguments for the
    layers, and gives the final hidden states (1, N, hidden) of these positions of its one row.
    """
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = functools.partial(_rms_norm, norm)
        layer.self_attn.forward = functools.partial(_self_attention, layer.self_attn)
        layer.mlp.forward = functools.partial(_mlp, layer.mlp)
    last = model.model.layers[-1]
    last.forward = functools.partial(_last_layer, last)
    model.model.norm.forward = functools.partial(_rms_norm, model.model.norm)


def _rms_norm(norm, states):
    return _RMSNorm.apply(states, norm.weight, norm.variance_epsilon, None, None)


def _last_layer(layer, hidden_states, wanted_positions, **given):
    attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), only=wanted_positions, **given)
    states = hidden_states.index_select(1, wanted_positions) + attended
    return states + layer.mlp(layer.post_attention_layernorm(states))


def _self_attention(layer, hidden_states, position_embeddings, attention, only=None, **unused):
    heads = (*hidden_states.shape[:-1], -1, layer.head_dim)
    query, key, value = (
        project(hidden_states).view(heads) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    query = _RMSNorm.apply(query, layer.q_norm.weight, layer.q_norm.variance_epsilon, *position_embeddings)
    key = _RMSNorm.apply(key, layer.k_norm.weight, layer.k_norm.variance_epsilon, *position_embeddings)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    attended = attention(query, key, value, layer.scaling).flatten(2)
    if only is not None:
        attended = attended.index_select(1, only)
    return layer.o_proj(attended), None


def _mlp(mlp, states):
    return mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(states), mlp.up_proj(states)))


class _RMSNorm(torch.autograd.Function):
    """RMSNorm over the last dimension; with cos, sin (1, T, head_dim) of states (1, T, heads, head_dim), rotated after it."""

    @staticmethod
    def forward(ctx, states, weight, epsilon, cos, sin):
        exact = states.to(torch.promote_types(states.dtype, torch.float32))
        factor = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
        normed = (exact * factor).to(states.dtype)
        ctx.save_for_backward(normed, factor, weight, cos, sin)
        scaled = normed * weight
        return scaled if cos is None else _rotate(scaled, cos, sin)

    @staticmethod
    def backward(ctx, upstream):
        normed, factor, weight, cos, sin = ctx.saved_tensors
        if cos is not None:
            upstream = _rotate(upstream, cos, -sin)  # back again
        both = (upstream * normed).flatten(0, -2)
        # Only the part of the gradient at right angles to `normed` counts: the norm cancels any change of length.
        along = (both @ weight / weight.shape[0]).view(factor.shape)
        gradient = (upstream * weight).addcmul_(normed, along, value=-1).mul_(factor)
        return gradient, both.sum(0) if ctx.needs_input_grad[1] else None, None, None, None


def _rotate(states, cos, sin):
    """(1, T, heads, head_dim) turned by the angles of (1, T, head_dim) cosines and sines, whose two halves are the same."""
    cos, sin, half = cos[:, :, None], sin[:, :, None, : cos.shape[-1] // 2], cos.shape[-1] // 2
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin)
    return turned


class _SwiGLU(torch.autograd.Function):
    """silu(gate) x up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, upstream):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(upstream * up, gate), F.silu(gate).mul_(upstream)
