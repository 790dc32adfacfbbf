"""Qwen3's forward pass for one conversation, with its KV cache: what transformers computes, operation for operation.

It saves transformers' own Python in every layer and its copy of the whole cache for every token: 10 to 15 ms a token, with 28
layers on 2 CPU cores. bfloat16 is rounded where transformers rounds it, so that greedy answers are those of its `generate`;
utils/model/fused_layers.py, for training, rounds less often.
"""

import torch
import torch.nn.functional as F
from transformers import Qwen3ForCausalLM


class CachedModel:
    """`model` (Qwen3ForCausalLM) and the keys and values of the `length` tokens it has seen."""

    def __init__(self, model: Qwen3ForCausalLM):
        self.model, self.length = model, 0
        self.cache = []  # (keys, values) a layer, each (1, heads, capacity, head_dim)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        self.length = min(self.length, count)

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> torch.Tensor:
        """The logits, float32 (vocabulary,) on the CPU, after one or more new tokens (list of ids).

        `length` grows last, so that a pass which Ctrl-C stops leaves nothing behind.
        """
        model, end = self.model.model, self.length + len(ids)
        self._reserve(end)
        states = model.embed_tokens(torch.tensor([ids], device=self.model.device))
        turn = model.rotary_emb(states, torch.arange(self.length, end, device=states.device)[None])
        mask = None
        if self.length and len(ids) > 1:  # new tokens see the old ones and, causally, themselves
            mask = torch.ones(len(ids), end, dtype=torch.bool, device=states.device).tril(self.length)
        for layer, cache in zip(model.layers, self.cache):
            states = states + self._attention(
                layer.self_attn, _norm(layer.input_layernorm, states), turn, cache, end, mask
            )
            normed, mlp = _norm(layer.post_attention_layernorm, states), layer.mlp
            states = states + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        logits = self.model.lm_head(_norm(model.norm, states[0, -1:]))[0].float().cpu()
        self.length = end
        return logits

    def _attention(self, layer, states, turn, cache, end, mask):
        heads = (*states.shape[:-1], -1, layer.head_dim)
        query, key = (
            _rotate(_norm(norm, project(states).view(heads)).transpose(1, 2), *turn)
            for norm, project in ((layer.q_norm, layer.q_proj), (layer.k_norm, layer.k_proj))
        )
        keys, values = (states[:, :, :end] for states in cache)
        keys[:, :, self.length :] = key
        values[:, :, self.length :] = layer.v_proj(states).view(heads).transpose(1, 2)
        output = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=self.length == 0 and end > 1,
            scale=layer.scaling,
            enable_gqa=True,
        )
        return layer.o_proj(output.transpose(1, 2).flatten(2))

    def _reserve(self, end):
        """Room for `end` tokens and, so that this is rare, half as many more."""
        if self.cache and end <= self.cache[0][0].shape[2]:
            return
        config, weight = self.model.config, self.model.model.norm.weight
        shape = (1, config.num_key_value_heads, end + max(256, end // 2), config.head_dim)
        grown = []
        for number in range(config.num_hidden_layers):
            grown.append(tuple(weight.new_empty(shape) for _ in range(2)))
            for new, old in zip(grown[-1], self.cache[number] if self.cache else ()):
                new[:, :, : self.length] = old[:, :, : self.length]
        self.cache = grown


def _norm(norm, states):
    """RMSNorm, rounded to the dtype of `states` before the weight is multiplied, as Qwen3RMSNorm does."""
    return norm.weight * F.rms_norm(states, norm.weight.shape, None, norm.variance_epsilon)


def _rotate(states, cos, sin):
    """Rotary positions: states (1, heads, T, head_dim), cos and sin (1, T, head_dim)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
