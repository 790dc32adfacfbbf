"""Qwen3's forward pass for answers, with its KV cache: the results of transformers, with fewer and larger operations.

Every token reads every weight once, which on a CPU takes most of the time. So query, key and value of an attention layer are one
product here, and so are gate and up of an MLP; the cache grows in place. The weights are held in one of four forms:

    plain   as the model has them. Joined weights share the model's memory.
    fp16    float16, as are the states that they are multiplied with, for Apple GPUs. The residual stream and the norms stay float32,
            so that large activations do not overflow.
    half    float16, for x86 CPUs without bfloat16 instructions. Products and sums stay float32. A bfloat16 weight keeps its value
            (one below 8e-6 moves by 3e-8 at most); a float32 weight is rounded to 11 bits.
    int8    8 bits, with a scale for each row of a matrix. States are split into two 8-bit numbers each: the second holds what the
            first has rounded off, in a second row of the same product, which takes no longer.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import Qwen3ForCausalLM

from utils.device import release_memory
from utils.model.attention import as_numbers
from utils.model.mixed import on_cuda, on_gpu

Product = Callable[[torch.Tensor], torch.Tensor]  # states (rows, in features) -> (rows, out features)


class LayerWeights(NamedTuple):
    """The weights of one decoder layer. `qk_norm`: (query and key heads, head_dim), the weights of both norms."""

    input_norm: torch.Tensor
    qkv: Product
    qk_norm: torch.Tensor
    output: Product
    mlp_norm: torch.Tensor
    gate_up: Product
    down: Product


class CachedModel:
    """A model and the keys and values of the `length` tokens it has seen, of one conversation or of several.

    `padding`: (rows,) tokens that stand before the beginning of each conversation, so that all end together.
    """

    def __init__(self, model: Qwen3ForCausalLM, padding: torch.Tensor | None = None):
        if not hasattr(model, "answer_weights"):
            hold_weights(model, "plain")
        self.layers, self.head, self.dtype = model.answer_weights
        self.model, self.config, self.padding, self.length = model, model.config, padding, 0
        config = model.config
        nothing = torch.empty(1, config.num_key_value_heads, 0, config.head_dim, device=model.device)
        # Keys and values in turn: (rows, heads, capacity, head_dim) each.
        self.cache = [nothing] * (2 * config.num_hidden_layers)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        self.length = min(self.length, count)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Forget all conversations but these (indices)."""
        self.cache = [part[rows] for part in self.cache]
        self.padding = self.padding[rows]

    @torch.inference_mode()
    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits (rows, vocabulary) after new tokens (rows, count) of every conversation.

        `length` grows last, so that a pass which Ctrl-C stops leaves nothing behind.
        """
        (rows, count), end = ids.shape, self.length + ids.shape[1]
        self._reserve(rows, end)
        columns = torch.arange(end, device=ids.device)
        model, mask = self.model.model, self._mask(columns, count)
        states = model.embed_tokens(ids.flatten()).to(model.norm.weight.dtype)
        positions = columns[None, self.length :]
        if self.padding is not None:
            positions = (positions - self.padding[:, None]).clamp(min=0)
        cos, sin = (part[:, :, None] for part in model.rotary_emb(states, positions))
        first, second = sin.chunk(2, dim=-1)
        turn = cos, torch.cat((-first, second), dim=-1)
        seen = [part[:, :, :end] for part in self.cache]
        with _for_rows(rows * count):
            for number, layer in enumerate(self.layers):
                keys, values = seen[2 * number], seen[2 * number + 1]
                normed = self._norm(states, layer.input_norm)
                states = states + self._attention(layer, normed, (rows, count), turn, keys, values, mask)
                gate, up = layer.gate_up(self._norm(states, layer.mlp_norm)).chunk(2, dim=-1)
                states = states + layer.down(F.silu(gate) * up)
        last = states.view(rows, count, -1)[:, -1]
        with _for_rows(rows):
            logits = self.head(self._norm(last, model.norm.weight))
        self.length = end
        return logits

    def _attention(self, layer: LayerWeights, states, shape, turn, keys, values, mask):
        """states (rows x count, hidden) of `shape` (rows, count). Writes their keys and values into the cache's views of this layer."""
        queries, kv = self.config.num_attention_heads, self.config.num_key_value_heads
        states, cos, sin = layer.qkv(states).view(*shape, queries + 2 * kv, -1), *turn
        turned = self._norm(states[:, :, :-kv], layer.qk_norm)
        turned = (turned * cos + turned.roll(turned.shape[-1] // 2, -1) * sin).transpose(1, 2)
        keys[:, :, self.length :] = turned[:, queries:]
        values[:, :, self.length :] = states[:, :, -kv:].transpose(1, 2)
        query = turned[:, :queries].to(self.dtype)
        if shape[1] == 1:
            # the heads that share a key become the queries of one head: a sixth of the time in bfloat16
            query = query.unflatten(1, (kv, -1))[:, :, :, 0]
            output = F.scaled_dot_product_attention(query, keys, values, mask).flatten(1, 2)
        else:
            apart = on_gpu(query)  # with a mask, heads that share a key have only a slow kernel on CUDA
            if apart:
                keys, values = (part.repeat_interleave(queries // kv, dim=1) for part in (keys, values))
            how = {"is_causal": mask is None, "enable_gqa": not apart}
            output = F.scaled_dot_product_attention(query, keys, values, mask, **how).transpose(1, 2)
        return layer.output(output.reshape(shape[0] * shape[1], -1))

    def _mask(self, columns, count):
        """The tokens (..., end) that each new one (count, 1) sees; None if one sees all, or those of a first pass what is before."""
        if self.padding is None and (count == 1 or not self.length):
            return None
        itself = columns[self.length :, None]
        mask = columns <= itself
        if self.padding is not None:
            # Padding sees itself, and nothing sees it. A row of the mask without any key would be NaN on some devices.
            real = columns >= self.padding[:, None, None, None]
            mask = (real & mask) | (columns == itself)
        return as_numbers(mask, self.dtype) if on_gpu(mask) else mask

    def _norm(self, states, weight):
        """RMSNorm, rounded to the dtype of `states` before the weight is multiplied, as Qwen3RMSNorm does; on CUDA in one kernel."""
        if on_cuda(states):
            same = weight if weight.dim() == 1 else None  # for all heads
            shape, epsilon = weight.shape[-1:], self.config.rms_norm_eps
            normed, _ = torch.ops.aten._fused_rms_norm(states, shape, same, epsilon)
            return normed if same is not None else normed * weight
        return weight * F.rms_norm(states, weight.shape[-1:], None, self.config.rms_norm_eps)

    def _reserve(self, rows, end):
        """Make room for `end` tokens and half as many more, of one conversation for 256 more at least; layer by layer, so that the
        cache is never there twice."""
        if end > self.cache[-1].shape[2]:
            _, heads, _, size = self.cache[0].shape
            for place, part in enumerate(self.cache):
                capacity = end + max(256 // rows, end // 2)
                grown = torch.empty(rows, heads, capacity, size, dtype=self.dtype, device=part.device)
                grown[:, :, : self.length] = part[:, :, : self.length]
                self.cache[place] = grown


@contextmanager
def _for_rows(rows: int) -> Iterator[None]:
    """Let torch itself multiply one row of bfloat16: it reads weights twice as fast as oneDNN does."""
    onednn = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = onednn and rows > 1
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = onednn


@torch.no_grad()
def hold_weights(model: Qwen3ForCausalLM, form: str) -> None:
    """Hold the weights of `model` in a form: plain, fp16, half or int8. After all but plain the model is for answers only.

    A matrix that a form cannot hold, such as one of a diverged training (NaN), stays plain. Threads share the layers, since a matrix
    is packed on one core.
    """
    if form != "plain":
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.data = weight.data.float()
    with warnings.catch_warnings():
        # Quantized tensors are to leave a later torch. The one that is pinned here has no other product as fast for one row.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        with ThreadPoolExecutor(1 if form == "plain" else torch.get_num_threads()) as threads:
            head = threads.submit(_hold, form, model.lm_head)  # the largest comes first
            layers = list(threads.map(lambda layer: _layer_weights(form, layer), model.model.layers))
            # Of keys, values and attention.
            dtype = torch.float16 if form == "fp16" else model.model.norm.weight.dtype
            model.answer_weights = layers, head.result(), dtype


def _layer_weights(form, layer):
    attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
    query_norm = attention.q_norm.weight.detach().expand(config.num_attention_heads, -1)
    key_norm = attention.k_norm.weight.detach().expand(config.num_key_value_heads, -1)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        qkv=_hold(form, attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=torch.cat([query_norm, key_norm]),
        output=_hold(form, attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_hold(form, mlp.gate_proj, mlp.up_proj),
        down=_hold(form, mlp.down_proj),
    )


@torch.no_grad()  # torch keeps this setting in each thread by itself
def _hold(form, *layers):
    """The product with the weights of linear layers, one below the other. The layers lose weights that are held in another form."""
    weight = layers[0].weight
    if len(layers) > 1:
        weight = torch.cat([layer.weight for layer in layers])
        for layer, part in zip(layers, weight.split([layer.out_features for layer in layers])):
            layer.weight.data = part  # a part of the joined matrix from now on
    if form == "plain":
        return _product(form, weight)
    # FBGEMM would make 65504 of what is too large for float16, or NaN.
    limit = torch.finfo(torch.float32 if form == "int8" else torch.float16).max
    if not max(abs(end.item()) for end in torch.aminmax(weight)) <= limit:
        return _product("plain", weight.float())
    product = _product(form, weight)
    for layer in layers:
        del layer.weight
    del weight
    release_memory()
    return product


def _product(form, weight):
    """states -> states times a weight (out, in) that is held in a form.

    In int8, a row of the weight is scale x whole numbers of -127 to 127, and a state is size x (upper + lower / (2 x largest)),
    where upper and lower are whole numbers of -largest to largest: two rows of one product.
    """
    if form == "plain":
        return lambda states: F.linear(states.to(weight.dtype), weight)
    if form == "fp16":
        rounded = weight.half()
        return lambda states: F.linear(states.half(), rounded)
    exact = weight.float()
    if form == "half":
        packed = torch.ops.quantized.linear_prepack_fp16(exact, None)
        return lambda states: torch.ops.quantized.linear_dynamic_fp16(states, packed)
    scales = exact.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    whole = (exact / scales[:, None]).round().to(torch.int8)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    matrix = torch._make_per_channel_quantized_tensor(whole, scales.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(matrix, None)
    # Without VNNI instructions, pairs of products are added in 16 bits: 7-bit states keep them from overflowing.
    largest = 127 if torch.cpu._is_vnni_supported() else 63
    # Takes floats, rounds them to unsigned 8-bit numbers around the zero point, and gives floats.
    scale, zero_point = 1.0, largest + 1
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def product(states):
        size = torch.linalg.vector_norm(states, torch.inf, -1, keepdim=True).clamp_(min=1e-30) / largest
        exact = states / size
        upper = exact.round()
        lower = exact.sub_(upper).mul_(2 * largest)
        upper, lower = multiply(torch.cat([upper, lower]), scale, zero_point, packed).chunk(2)
        return upper.add_(lower, alpha=0.5 / largest).mul_(size)

    return product
