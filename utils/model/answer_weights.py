"""The weights of a model in the form from which answers are computed quickest, and the products with them.

Every token reads every weight once, and on a CPU reading is what takes the time. So an attention layer's query, key and value are
one product here, and so are the gate and up of its MLP. The weights are held in one of three forms:

    plain   as the model has them. What is joined shares the model's memory.
    half    float16, for x86 CPUs without bfloat16 instructions. Products and sums stay float32. A bfloat16 weight, as Qwen3 is
            published, keeps its value; only one below 8e-6 moves, by 3e-8 at most. A float32 weight of a finished training is
            rounded to 11 bits, where bfloat16 would keep 8.
    int8    8 bits, with a scale for each row of a matrix, multiplied as integers. States are split into two 8-bit numbers each, one
            for what the other has rounded off, so that next to nothing is lost of them: the second row of a product costs no time.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3ForCausalLM

from utils.device import release_memory

LARGEST_HALF = torch.finfo(torch.float16).max
Product = Callable[[torch.Tensor], torch.Tensor]  # states (rows, in features) -> (rows, out features)


class LayerWeights(NamedTuple):
    """What a decoder layer computes with. `qk_norm`: (query and key heads, head_dim), the weights of both norms."""

    input_norm: torch.Tensor
    qkv: Product
    qk_norm: torch.Tensor
    output: Product
    mlp_norm: torch.Tensor
    gate_up: Product
    down: Product


class AnswerWeights(NamedTuple):
    """What answers are computed with; `head` makes the logits."""

    layers: list[LayerWeights]
    head: Product


def answer_weights(model: Qwen3ForCausalLM) -> AnswerWeights:
    """The form that hold_weights has given `model`; plain, from the first call on, if none."""
    if not hasattr(model, "answer_weights"):
        hold_weights(model, "plain")
    return model.answer_weights


@torch.no_grad()
def hold_weights(model: Qwen3ForCausalLM, form: str) -> None:
    """Hold the weights of `model` in a form: plain, half or int8. After half and int8, on x86 CPUs, the model is for answers only.

    A matrix that a form cannot hold, such as one of a diverged training (NaN), stays plain. Half and int8 take seconds for 0.6 B
    parameters: a matrix is packed on one core, so threads share the layers.
    """
    hold = FORMS[form]
    if form != "plain":
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.data = weight.data.float()
    with warnings.catch_warnings():
        # Quantized tensors are to leave a later torch. The one that is pinned here has no other product as fast for one row.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        with ThreadPoolExecutor(1 if form == "plain" else torch.get_num_threads()) as threads:
            head = threads.submit(_hold, hold, model.lm_head)  # the largest comes first
            layers = threads.map(lambda layer: _layer_weights(hold, layer), model.model.layers)
            model.answer_weights = AnswerWeights(list(layers), head.result())


@torch.no_grad()  # as for anything of torch's, in each thread by itself
def _layer_weights(hold, layer):
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    norms = [
        norm.weight.expand(heads, -1)
        for norm, heads in (
            (attention.q_norm, config.num_attention_heads),
            (attention.k_norm, config.num_key_value_heads),
        )
    ]
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        qkv=_hold(hold, attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=torch.cat(norms),
        output=_hold(hold, attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_hold(hold, mlp.gate_proj, mlp.up_proj),
        down=_hold(hold, mlp.down_proj),
    )


@torch.no_grad()
def _hold(hold, *layers):
    """The product with the weights of linear layers, one below the other. What is held in another form, the layers lose."""
    weight = _joined(layers)
    product = hold(weight)
    if product is None:
        return _plain(weight.float())
    if hold is not _plain:
        for layer in layers:
            del layer.weight
        del weight
        release_memory()
    return product


def _joined(layers: Sequence[nn.Linear]):
    """The weights of linear layers as one matrix, whose parts they are from now on."""
    if len(layers) == 1:
        return layers[0].weight
    joined = torch.cat([layer.weight for layer in layers])
    for layer, part in zip(layers, joined.split([layer.out_features for layer in layers])):
        layer.weight.data = part
    return joined


def _plain(weight):
    return lambda states: F.linear(states, weight)


def _half(weight):
    fits = max(abs(end) for end in torch.aminmax(weight)) <= LARGEST_HALF  # False for NaN
    if not fits:  # FBGEMM would make 65504 of it
        return None
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    return lambda states: torch.ops.quantized.linear_dynamic_fp16(states, packed)


def _int8(weight):
    weight = weight.float()
    scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    if not torch.isfinite(scales).all():
        return None
    whole = (weight / scales[:, None]).round().to(torch.int8)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    matrix = torch._make_per_channel_quantized_tensor(whole, scales.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(matrix, None)
    # Without VNNI instructions, pairs of products are added in 16 bits: 7-bit states keep them from overflowing.
    largest = 127 if torch.cpu._is_vnni_supported() else 63
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def product(states):
        size = torch.linalg.vector_norm(states, torch.inf, -1, keepdim=True).clamp_(min=1e-30) / largest
        exact = states / size
        whole = exact.round()
        rest = exact.sub_(whole).mul_(2 * largest)
        upper, lower = multiply(torch.cat([whole, rest]), 1.0, largest + 1, packed).chunk(2)
        return upper.add_(lower, alpha=0.5 / largest).mul_(size)

    return product


FORMS = {"plain": _plain, "half": _half, "int8": _int8}
