"""What makes packed training exact and cheap: attention within each document, and an LM head on trained positions only.

`prepare_packed(model)` changes how a Qwen3 model computes while it trains; its weights and what it saves stay as they are.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from utils.model.attention import document_attention
from utils.model.fused_layers import fuse_layers
from utils.model.packing import IGNORED

AttentionInterface.register("document_attention", document_attention)


def prepare_packed(model):
    """Let `model` (Qwen3ForCausalLM) take the batches of utils.packing.collate and return the hidden states that count.

    Its forward then gives a (N, hidden) tensor: the final hidden states of the N positions that have a label. The LM head
    is left to the loss, which sees only those. Call it before an adapter is put on.
    """
    model.set_attn_implementation("document_attention")  # for which transformers builds no mask
    fuse_layers(model, document_attention)

    def forward(input_ids, position_ids, shift_labels, layout, **unset):  # PEFT adds arguments that are None
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if embedding is head and head.requires_grad and head.device.type == "cpu":
            given = {"inputs_embeds": _TiedEmbedding.apply(embedding, input_ids)}
        else:
            given = {"input_ids": input_ids}
        hidden = model.model(
            **given, position_ids=position_ids, layout=layout, use_cache=False
        ).last_hidden_state
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
