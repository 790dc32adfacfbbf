"""The forward pass over packed rows: attention within each document, hidden states of the trained positions only.

`prepare_packed(model)` changes how a Qwen3 model computes while it trains; its weights and what it saves stay as they are.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Qwen3ForCausalLM

from utils.model.attention import plan_attention
from utils.model.fused_layers import fuse_layers
from utils.model.lm_head import matmul_dtype
from utils.model.packing import ROUNDED


def packed_attention(module, query, key, value, attention_mask, scaling, attention, **unset):
    """transformers' form of an attention function, for the `attention` that this forward pass has planned."""
    return attention(query, key, value, scaling), None


AttentionInterface.register("packed_attention", packed_attention)


def prepare_packed(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Let `model` take the inputs that utils.model.packing.collate makes, and return it.

    Its forward then gives the final hidden states (N, hidden) of the N positions that have a label. The LM head is left to
    the loss, which sees only those. Call it before an adapter is put on.
    """
    model.set_attn_implementation("packed_attention")  # for which transformers builds no mask
    fuse_layers(model)

    # `unset`: PEFT adds arguments that are None.
    def forward(input_ids, position_ids, label_positions, layout, row_length, **unset):
        embedded = _embed(model, input_ids)
        attention = plan_attention(layout, row_length, input_ids.device, matmul_dtype(embedded))
        labels = len(label_positions)
        # rounded up, since every new shape costs time where kernels are made for it
        wanted = F.pad(label_positions, (0, -labels % ROUNDED))
        states = model.model(
            inputs_embeds=embedded,
            position_ids=position_ids,
            attention=attention,
            wanted_positions=wanted,
            use_cache=False,
        ).last_hidden_state
        return states[0, :labels]

    model.forward = forward
    return model


def _embed(model, input_ids):
    """The residual stream begins in the dtype of the norms: float32 in training, also over a base held in bfloat16."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight and head.weight.requires_grad and head.weight.device.type == "cpu":
        return _TiedEmbedding.apply(embedding.weight, input_ids)
    return embedding(input_ids).to(model.model.norm.weight.dtype)


class _TiedEmbedding(torch.autograd.Function):
    """Embedding of ids (1, T) whose gradient is that of the T rows of `weight` (V, H) that it touches.

    The usual gradient is a second matrix of 0.6 GB, nearly all zeros, beside the LM head's gradient of the same weight. Where that
    has been added to `weight.grad` already (utils.model.lm_head), the rows are added there too; else they are named, sparsely.
    """

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
