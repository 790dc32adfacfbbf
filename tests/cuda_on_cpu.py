"""The forms of computation for CUDA, taken on a CPU: kernels that torch has for CUDA only are made of others here.

with cuda_forms(): ...      # computes as on a GPU, for comparing results
with cuda_counts() as counts: ...   # computes nothing under FakeTensorMode, for counting launches and bytes
"""

import contextlib
import functools
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import Qwen3Config, Qwen3ForCausalLM

from utils.device import Device
from utils.model import attention, mixed
from utils.model.packing import Item, PackedBatch, collate, item_length
from utils.model.qwen3_train import prepare_packed
from utils.training.losses import dpo_batch_loss, sft_loss


def varlen_as_documented(query, key, value, query_ends, key_ends, longest_query, longest_key, **options):
    """torch.nn.attention.varlen.varlen_attn by its documentation: (T, heads, width), causal from the ends of each sequence."""
    assert options["window_size"] == (-1, 0) and options["enable_gqa"]
    assert query_ends.dtype == key_ends.dtype == torch.int32
    bounds = zip(query_ends[:-1], query_ends[1:], key_ends[:-1], key_ends[1:])
    parts = []
    for q_start, q_end, k_start, k_end in bounds:
        q, k, v = query[q_start:q_end], key[k_start:k_end], value[k_start:k_end]
        assert 0 < len(q) <= longest_query and len(q) <= len(k) <= longest_key
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        one = (states.transpose(0, 1)[None].double() for states in (q, k, v))
        out = F.scaled_dot_product_attention(*one, attn_mask=mask, scale=options["scale"], enable_gqa=True)
        parts.append(out[0].transpose(0, 1).to(query.dtype))
    return torch.cat(parts)


def _mm(left, right, out_dtype):
    return left.to(out_dtype) @ right.to(out_dtype)


def _addmm_out(added, left, right, out_dtype, beta=1, alpha=1, *, out):
    return out.copy_(beta * added + alpha * (left.to(out_dtype) @ right.to(out_dtype)))


def _rms_norm_backward(upstream, states, shape, factor, weight, mask):
    normed, upstream = states.float() * factor, upstream.float()
    towards = upstream * weight.float()
    d_states = factor * (towards - normed * (towards * normed).mean(-1, keepdim=True))
    d_weight = (upstream * normed).flatten(0, -2).sum(0)
    return d_states.to(states.dtype), d_weight.to(weight.dtype)


@contextlib.contextmanager
def cuda_forms():
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", _mm, "CPU")
    library.impl("addmm.dtype_out", _addmm_out, "CPU")
    library.impl("_fused_rms_norm_backward", _rms_norm_backward, "CPU")
    with (
        mock.patch.object(mixed, "DEVICES", ("cpu",)),
        mock.patch.object(attention, "varlen_attn", varlen_as_documented),
    ):
        yield
    library._destroy()


# ---- Counting

# Operations that launch no kernel: memory without content, and other names for a tensor.
NO_KERNEL = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "_unsafe_view"),
    *("_reshape_alias", "lift_fresh", "is_same_size", "alias", "device"),
}
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "is_nonzero"}
WRITES_ONLY = {"zeros", "ones", "full", "zeros_like", "full_like", "ones_like", "fill_", "zero_", "arange"}
READS_ROWS = {"index_select", "embedding", "gather"}  # as much as they write


class Counts(TorchDispatchMode):
    """Counts operations: `launches`, `traffic` (bytes read and written by all but matrix products and attention) and `syncs`."""

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.launches, self.traffic, self.syncs = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        name = func._schema.name.split("::")[1]
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        made = [part for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
        if name in SYNCS:
            self.syncs.append(name)
        if (given or made) and not func.is_view and name not in NO_KERNEL:
            self.launches += 1
            if func.overloadpacket not in flop_registry and "attn" not in name:
                self.traffic += self._moved(name, given, made, args)
        return result

    def _moved(self, name, given, made, args):
        written = sum(tensor.nbytes for tensor in made)
        if name in WRITES_ONLY:
            return written
        if name in READS_ROWS:
            return 2 * written
        if name in ("index_add_", "scatter_", "scatter_add_"):
            return 3 * args[3].nbytes
        if name == "_fused_adamw_":  # reads weights, gradients and both moments; writes all but the gradients
            return 7 * sum(tensor.nbytes for tensor in args[0])
        read = sum(tensor.nbytes for tensor in given)
        return read if name == "_foreach_copy_" else read + written


@torch.library.custom_op("counts::fused_rms_norm", mutates_args=())
def _counted_rms_norm(
    states: torch.Tensor, shape: list[int], weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One operation, as on CUDA: on a CPU the original is counted as the many that it is made of."""
    raise NotImplementedError


@_counted_rms_norm.register_fake
def _(states, shape, weight, epsilon):
    return torch.empty_like(states), states.new_empty((*states.shape[:-1], 1), dtype=torch.float32)


@contextlib.contextmanager
def cuda_shapes():
    """The operations are those for CUDA, of which only shapes and formats are right: for tensors without content."""
    with (
        mock.patch.object(mixed, "DEVICES", ("cpu",)),
        mock.patch.object(torch.ops.aten, "_fused_rms_norm", _counted_rms_norm),
    ):
        yield


@contextlib.contextmanager
def cuda_counts():
    """Yield Counts of operations on tensors without content, in the forms for CUDA. Enter its result to count."""
    with cuda_shapes(), FakeTensorMode(allow_non_fake_inputs=True):
        yield Counts()


def qwen3(layers: int, lora: bool = False) -> Qwen3ForCausalLM:
    """Qwen3-0.6B with so many layers, its memory never touched; prepared for training, or frozen in bfloat16 under an adapter."""
    from utils.model.lora import add_lora  # brings peft

    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    assert (config.vocab_size, config.head_dim) == (151_936, 128)
    with torch.device("meta"):
        model = prepare_packed(Qwen3ForCausalLM(config))
    if lora:
        for name, weight in model.requires_grad_(False).named_parameters():
            weight.data = weight.data.to(torch.float32 if "norm" in name else torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    settings = SimpleNamespace(RANK=16, ALPHA=32, as_dict=lambda: {"MODEL": "base"})
    return add_lora(model, settings) if lora else model


def without_content(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Let the weights of `model` be tensors without content, under FakeTensorMode; those that are trained."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(torch.empty_like(weight), weight.requires_grad)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return [weight for weight in model.parameters() if weight.requires_grad]


LOSSES = {"sft": sft_loss, "lora": sft_loss}
LOSSES["dpo"] = functools.partial(dpo_batch_loss, beta=0.1, sft_weight=0.2)


def batch_for(method: str, tokens: int) -> PackedBatch:
    """At most so many tokens, half of them trained, in documents of 158 to 164; for DPO, two answers to one prompt."""
    items: list[Item] = []
    while sum(map(item_length, items)) <= tokens - (244 if method == "dpo" else 163):
        prompt, answer = [0] * 80, [0] * (84 - len(items) % 7)
        items.append({"documents": [(prompt, answer)]})
        if method == "dpo":
            items[-1] |= {"documents": [(prompt, answer), (prompt, answer[3:])]}
            items[-1] |= {"reference_chosen": 0.0, "reference_rejected": 0.0}
    return collate([items], Device("cuda", True, "test"))
