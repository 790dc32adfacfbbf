"""Qwen3's forward pass for answers, with its KV cache: what transformers computes, with fewer and larger operations.

It saves transformers' own Python in every layer and its copy of the whole cache for every token. bfloat16 is rounded where
transformers rounds it; utils/model/fused_layers.py, for training, rounds less often.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import Qwen3ForCausalLM

from utils.model.answer_weights import LayerWeights, answer_weights


class CachedModel:
    """`model` (Qwen3ForCausalLM) and the keys and values of the `length` tokens it has seen: of one conversation, or of several.

    `padding`: (rows,) how many tokens at the beginning of each conversation are none of it, so that all end together.
    """

    def __init__(self, model: Qwen3ForCausalLM, padding: torch.Tensor | None = None):
        self.model, self.weights, self.config = model, answer_weights(model), model.config
        self.padding, self.length = padding, 0
        # (2 x layers, rows, heads, capacity, head_dim): keys and values of each layer in turn
        self.cache: torch.Tensor | None = None

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        self.length = min(self.length, count)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Forget all conversations but these (indices)."""
        self.cache, self.padding = self.cache[:, rows], self.padding[rows]

    def feed(self, ids: list[int]) -> torch.Tensor:
        """The logits, float32 (vocabulary,) on the CPU, after one or more new tokens (list of ids) of one conversation."""
        return self.feed_rows(torch.tensor([ids], device=self.model.device))[0].float().cpu()

    @torch.inference_mode()
    def feed_rows(self, ids: torch.Tensor) -> torch.Tensor:
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
        turn = _turns(*model.rotary_emb(states, positions))
        seen = self.cache[..., :end, :].unbind()
        with _for_rows(rows * count):
            for number, layer in enumerate(self.weights.layers):
                keys, values = seen[2 * number], seen[2 * number + 1]
                normed = self._norm(states, layer.input_norm)
                states = states + self._attention(layer, normed, (rows, count), turn, keys, values, mask)
                gate, up = layer.gate_up(self._norm(states, layer.mlp_norm)).chunk(2, dim=-1)
                states = states + layer.down(F.silu(gate) * up)
        last = states.view(rows, count, -1)[:, -1]
        with _for_rows(rows):
            logits = self.weights.head(self._norm(last, model.norm.weight))
        self.length = end
        return logits

    def _attention(self, layer: LayerWeights, states, shape, turn, keys, values, mask):
        queries, kv = self.config.num_attention_heads, self.config.num_key_value_heads
        states = layer.qkv(states).view(*shape, queries + 2 * kv, -1)
        turned = _rotate(self._norm(states[:, :, :-kv], layer.qk_norm), *turn).transpose(1, 2)
        keys[:, :, self.length :] = turned[:, queries:]
        values[:, :, self.length :] = states[:, :, -kv:].transpose(1, 2)
        query = turned[:, :queries]
        if shape[1] == 1:  # heads that share a key, as queries of one head: a sixth of the time in bfloat16
            output = F.scaled_dot_product_attention(
                query.unflatten(1, (kv, -1))[:, :, :, 0], keys, values, mask
            )
            output = output.flatten(1, 2)
        else:
            causal = mask is None
            output = F.scaled_dot_product_attention(
                query, keys, values, mask, is_causal=causal, enable_gqa=True
            ).transpose(1, 2)
        return layer.output(output.reshape(shape[0] * shape[1], -1))

    def _mask(self, columns, count):
        """Which tokens (..., end) each new one (count, 1) sees; None where all before and itself, as is said in another way."""
        if self.padding is None and (count == 1 or not self.length):
            return None
        itself = columns[self.length :, None]
        if self.padding is None:
            return columns <= itself
        real = columns >= self.padding[:, None, None, None]
        # Padding sees itself, and nothing sees it. A row of the mask without any key would be NaN on some devices.
        return (real & (columns <= itself)) | (columns == itself)

    def _norm(self, states, weight):
        """RMSNorm, rounded to the dtype of `states` before the weight is multiplied, as Qwen3RMSNorm does."""
        return weight * F.rms_norm(states, weight.shape[-1:], None, self.config.rms_norm_eps)

    def _reserve(self, rows, end):
        """Room for `end` tokens and, so that this is rare, half as many more; 256 at least for one conversation, not for each of many,
        whose room is copied whenever one of them ends."""
        if self.cache is not None and end <= self.cache.shape[3]:
            return
        config, weight = self.config, self.model.model.norm.weight
        capacity = end + max(256 // rows, end // 2)
        shape = (2 * config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        grown = weight.new_empty(shape)
        if self.cache is not None:
            grown[..., : self.length, :] = self.cache[..., : self.length, :]
        self.cache = grown


def _turns(cos, sin):
    """Rotary cosines and sines (rows, count, head_dim) for _rotate: for every head, the sines of the first half negative."""
    first, second = sin.chunk(2, dim=-1)
    return cos[:, :, None], torch.cat((-first, second), dim=-1)[:, :, None]


def _rotate(states, cos, sin):
    """Rotary positions: states (rows, count, heads, head_dim), cos and sin of _turns."""
    return states * cos + states.roll(states.shape[-1] // 2, -1) * sin


@contextmanager
def _for_rows(rows: int) -> Iterator[None]:
    """Let one row of bfloat16 be multiplied by torch itself: it reads weights two times as fast as oneDNN, which is for many rows."""
    onednn = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = onednn and rows > 1
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = onednn
