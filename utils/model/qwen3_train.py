"""Qwen3's forward pass for training, over packed rows: from token ids to the hidden states of the trained positions.

`prepare_packed(model)` gives the modules of a loaded model the classes below, which compute the same function as transformers'
and keep less for the backward pass: a norm keeps its normalised states and not its input, SwiGLU keeps its two inputs, and the last
layer goes on after its attention with the trained positions only. Weights, their names and the saved files stay as they are.

Shapes: states (1, T, hidden) of one packed row of T tokens; heads (1, T, heads, head_dim).
"""

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3

from utils.device import Device
from utils.model import mixed
from utils.model.attention import Attention, plan_attention
from utils.model.lm_head import CHUNK
from utils.model.mixed import Linear, matmul_dtype, on_cuda, products, reduced_dtype, round_weights
from utils.model.packing import ROUNDED, GroupShape, PackedBatch, model_inputs, to_device

Turn = tuple[Tensor, Tensor]  # cosines and sines (1, T, head_dim) of the rotary angles


class RMSNorm(modeling_qwen3.Qwen3RMSNorm):
    """states / root mean square x weight. On CUDA in `dtype`, if given."""

    rounded: Tensor | None = None  # utils.model.mixed.round_weights

    def forward(self, states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not on_cuda(states):
            return _RMSNorm.apply(states, self.weight, self.variance_epsilon)
        copy = self.weight.detach() if self.weight.dtype == states.dtype else self.rounded
        given = self.weight, self.variance_epsilon, copy, dtype or states.dtype
        return _FusedRMSNorm.apply(states, *given)


class SelfAttention(modeling_qwen3.Qwen3Attention):
    """Projections, norms and rotation of queries and keys, and the `attention` that this pass has planned."""

    def forward(self, states: Tensor, turn: Turn, attention: Attention, wanted: Tensor | None) -> Tensor:
        heads = (*states.shape[:-1], -1, self.head_dim)
        query, key, value = products(states, self.q_proj, self.k_proj, self.v_proj)
        query = _Rotate.apply(self.q_norm(query.view(heads)), *turn, 1)
        key = _Rotate.apply(self.k_norm(key.view(heads)), *turn, 1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value.view(heads)))
        attended = attention(query, key, value, self.scaling).flatten(2)
        return self.o_proj(attended if wanted is None else attended.index_select(1, wanted))


class MLP(modeling_qwen3.Qwen3MLP):
    """SwiGLU between two projections up and one down."""

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(*products(states, self.gate_proj, self.up_proj)))


class Layer(modeling_qwen3.Qwen3DecoderLayer):
    """Attention, then MLP, each added to the residual stream. With `wanted` (N,), only these positions come out: (1, N, hidden)."""

    def forward(
        self, states: Tensor, turn: Turn, attention: Attention, wanted: Tensor | None = None
    ) -> Tensor:
        dtype = reduced_dtype(states)
        attended = self.self_attn(self.input_layernorm(states, dtype), turn, attention, wanted)
        states = attended + (states if wanted is None else states.index_select(1, wanted))
        return states + self.mlp(self.post_attention_layernorm(states, dtype))


class Model(modeling_qwen3.Qwen3Model):
    """The layers and the last norm. The last layer computes only the `wanted` positions: nothing else asks for the others."""

    def forward(self, states: Tensor, position_ids: Tensor, attention: Attention, wanted: Tensor) -> Tensor:
        turn = self.rotary_emb(states, position_ids)
        for layer in self.layers[:-1]:
            states = layer(states, turn, attention)
        return self.norm(self.layers[-1](states, turn, attention, wanted))


class Qwen3ForCausalLM(transformers.Qwen3ForCausalLM):
    """The whole model but its LM head, which is left to the loss. The name is the one that config.json keeps of the class."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        label_positions: Tensor,
        layout: list[GroupShape],
        row_length: int,
        **unset,  # PEFT adds arguments that are None
    ) -> Tensor:
        """The final hidden states (N, hidden) of the N positions that have a label, from utils.model.packing.model_inputs.

        On a device of few fixed sizes, rows without meaning follow, up to a multiple of CHUNK.
        """
        weight = self.model.embed_tokens.weight
        alone = weight.device.type == "cpu" or on_cuda(weight) and not torch.distributed.is_initialized()
        if alone and weight is self.lm_head.weight and weight.requires_grad:
            states = _TiedEmbedding.apply(weight, input_ids)
        else:  # in the dtype of the norms: float32 in training, also over a base held in bfloat16
            states = self.model.embed_tokens(input_ids).to(self.model.norm.weight.dtype)
        if dtype := reduced_dtype(states):
            round_weights(self.model, dtype)
        attention = plan_attention(layout, row_length, states, matmul_dtype(states))
        # The number of positions is rounded up, since every new shape costs time where kernels are made for it.
        labels, fixed = len(label_positions), states.device.type in mixed.FIXED_SIZES
        wanted = F.pad(label_positions, (0, -labels % (CHUNK if fixed else ROUNDED)))
        states = self.model(states, position_ids, attention, wanted)[0]
        return states if fixed else states[:labels]


OURS = (Linear, RMSNorm, SelfAttention, MLP, Layer, Model, Qwen3ForCausalLM)
CLASSES = {ours.__base__: ours for ours in OURS}  # each takes the place of the one that it extends


def prepare_packed(model: transformers.Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Let `model` compute as the classes of this module do, and return it. Call it before an adapter is put on."""
    for module in model.modules():
        if type(module) in CLASSES and getattr(module, "bias", None) is None:
            module.__class__ = CLASSES[type(module)]
    return model


def forward(model: torch.nn.Module, batch: PackedBatch, device: Device) -> tuple[Tensor, PackedBatch]:
    """(the final hidden states (N, hidden) of a batch's labels, the batch on the device), from a model that is there."""
    batch = to_device(batch, device)
    with device.autocast():
        return model(**model_inputs(batch)), batch


class _RMSNorm(torch.autograd.Function):
    """RMSNorm over the last dimension."""

    @staticmethod
    def forward(ctx, states, weight, epsilon):
        exact = states.to(torch.promote_types(states.dtype, torch.float32))
        factor = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
        normed = (exact * factor).to(states.dtype)
        ctx.save_for_backward(normed, factor, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, upstream):
        normed, factor, weight = ctx.saved_tensors
        both = (upstream * normed).flatten(0, -2)
        # Only the part of the gradient at right angles to `normed` counts: the norm cancels any change of length.
        along = (both @ weight / weight.shape[0]).view(factor.shape)
        gradient = (upstream * weight).addcmul_(normed, along, value=-1).mul_(factor)
        return gradient, both.sum(0) if ctx.needs_input_grad[1] else None, None


class _FusedRMSNorm(torch.autograd.Function):
    """The same by torch's kernel for CUDA, from a copy of the weight in the states' format to a result in `dtype`."""

    @staticmethod
    def forward(ctx, states, weight, epsilon, copy, dtype):
        normed, factor = torch.ops.aten._fused_rms_norm(states, copy.shape, copy, epsilon)
        ctx.save_for_backward(states, factor, copy)
        ctx.weight_dtype = weight.dtype
        return normed.to(dtype)

    @staticmethod
    def backward(ctx, upstream):
        states, factor, copy = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        d_states, d_weight = torch.ops.aten._fused_rms_norm_backward(
            upstream.to(states.dtype), states, copy.shape, factor, copy, wanted
        )
        return d_states, d_weight.to(ctx.weight_dtype) if wanted[1] else None, None, None, None


class _Rotate(torch.autograd.Function):
    """Heads (1, T, heads, head_dim) turned by the angles of their positions: `sign` 1, or back, as gradients are: -1."""

    @staticmethod
    def forward(ctx, heads, cos, sin, sign):
        ctx.save_for_backward(cos, sin)
        half = cos.shape[-1] // 2
        cos, sin = cos[:, :, None], sin[:, :, None, :half]  # both halves of the sines are the same
        turned = torch.mul(
            heads, cos, out=torch.empty_like(heads)
        )  # rounded once, to the format of the heads
        turned[..., :half].addcmul_(heads[..., half:], sin, value=-sign)
        turned[..., half:].addcmul_(heads[..., :half], sin, value=sign)
        return turned

    @staticmethod
    def backward(ctx, upstream):
        return _Rotate.apply(upstream, *ctx.saved_tensors, -1), None, None, None


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


class _TiedEmbedding(torch.autograd.Function):
    """Embedding of ids (1, T) whose gradient is T rows, not a second matrix of 0.6 GB, nearly all zeros: added to `weight.grad`, if
    the LM head's is there already (utils.model.lm_head), else sparse."""

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.weight = weight.shape, weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, upstream):
        (ids,) = ctx.saved_tensors
        if ctx.weight.grad is not None and not torch.distributed.is_initialized():
            ctx.weight.grad.index_add_(0, ids[0], upstream[0])
            return None, None
        return torch.sparse_coo_tensor(ids, upstream[0], ctx.shape, check_invariants=False), None
