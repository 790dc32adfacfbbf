"""The memory of a training step, counted before it runs, and the memory there is.

The peak is reached between the forward and the backward pass of an optimizer step's last batch: weights, gradients of the batches
before, the optimizer's two moments, what autograd keeps of this batch, and the LM head's scores. What autograd keeps is no
formula here but counted, on two forward passes of the real model with tensors that have shapes and no memory (torch's
FakeTensorMode): one part grows with the tokens, another does not (with bfloat16, the copies of the weights that the products were
computed with).
"""

import sys
from typing import NamedTuple

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from utils.device import Device, memory_for_process
from utils.model.lm_head import CHUNK
from utils.model.packing import ROUNDED, collate, model_inputs

PROBES = (
    2,
    6,
)  # documents of the two passes, as long as those of the data: attention takes the form that it has for them
FLOAT, HALF = 4, 2  # bytes
LIBRARIES = 510 << 20  # bytes of Python, torch, transformers and their threads in a training process
# Bytes of the kernels that oneDNN makes in bfloat16 for documents of one length, and of all that it keeps
# (utils.device.limit_kernels).
KERNELS, ALL_KERNELS = 4 << 20, 450 << 20
FRAGMENTS = 0.2  # of the activations: blocks of one batch that fit none of the next, as measured on CPUs


class StepPlan(NamedTuple):
    """How a process computes an optimizer step: `passes` batches of `rows_at_once` packed rows."""

    rows_at_once: int
    passes: int
    recompute: bool  # activations are computed again in the backward pass

    def __str__(self) -> str:
        rows = f"{self.rows_at_once} row{'s' if self.rows_at_once > 1 else ''} at once"
        again = ", activations recomputed (a third slower)" if self.recompute else ""
        return f"{rows}, {self.passes} pass{'es' if self.passes > 1 else ''} a step{again}"


def ways(rows: int) -> list[StepPlan]:
    """All ways to compute a step of `rows` rows, the one with the fewest passes first."""
    divisors = [count for count in range(rows, 0, -1) if rows % count == 0]
    return [StepPlan(count, rows // count, False) for count in divisors] + [StepPlan(1, rows, True)]


class Costs(NamedTuple):
    """What a model costs in training, in bytes; weights and trainable in numbers of parameters where said."""

    weights: int
    trainable: int  # parameters
    kept: int  # by autograd, whatever the tokens
    kept_per_token: float
    layers: int
    heads: int  # of attention
    hidden: int  # width of the residual stream
    head: torch.Size  # (vocabulary, hidden)
    head_trained: bool
    head_copied: bool  # to the number format of products
    bf16: bool


def measure_costs(model, device: Device, length: int) -> Costs:
    """Count the Costs of `model` as it will be trained: prepared for packed rows, adapters on, on its device.

    length: tokens of a usual document. Each document of a pass has another length, so that none is computed together with another.
    """
    probes = [[length + number for number in range(count)] for count in PROBES]
    for lengths in probes:
        lengths[-1] += -sum(lengths) % ROUNDED  # to which the forward pass rounds
    short, long = (_bytes_kept(model, lengths, device) for lengths in probes)
    tokens = [sum(lengths) for lengths in probes]
    per_token = (long - short) / (tokens[1] - tokens[0])
    parameters = list(model.parameters())
    head = model.get_output_embeddings().weight
    return Costs(
        weights=sum(weight.numel() * weight.element_size() for weight in parameters),
        trainable=sum(weight.numel() for weight in parameters if weight.requires_grad),
        kept=max(0, round(short - per_token * tokens[0])),
        kept_per_token=per_token,
        layers=model.config.num_hidden_layers,
        heads=model.config.num_attention_heads,
        hidden=model.config.hidden_size,
        head=head.shape,
        head_trained=head.requires_grad,
        head_copied=head.dtype is torch.float32 and device.format != "fp32",
        bf16=device.format != "fp32",
    )


def _bytes_kept(model, lengths: list[int], device: Device) -> int:
    """Bytes that autograd keeps between forward and backward pass of documents that are trained on whole, weights not counted."""
    mode, reduced = (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.float16 if device.fp16 else torch.bfloat16,
    )
    weights = [fake for weight in model.parameters() for fake in (weight, mode.from_tensor(weight))]
    weights = {weight.untyped_storage()._cdata: weight for weight in weights}
    seen = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage  # alive from now on, so that no address comes twice
        # The graph gets nothing: a tensor that a node saves of its own output would keep the whole graph alive for ever.

    row = [{"documents": [([0], [0] * length)]} for length in lengths]
    inputs = model_inputs(collate([row], device, sum(lengths)))
    with (
        mode,
        torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing),
        torch.autocast(model.device.type, reduced, enabled=device.format != "fp32"),
    ):
        inputs = {
            name: mode.from_tensor(value).to(model.device) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }
        hidden = model.train()(**inputs)
    kept = sum(storage.nbytes() for storage in seen.values())
    del hidden
    return kept


def memory_parts(
    costs: Costs,
    tokens: int,
    recompute: bool,
    device: Device,
    row_length: int = 0,
    passes: int = 2,
    lengths: int = 0,
) -> dict[str, int]:
    """{what: bytes} at the peak of a training step whose largest batch holds `tokens` packed tokens.

    `row_length`: tokens of a row where every token sees its whole row, in attention without a fused kernel; else 0. With one pass
    a step the layers' gradients come as their activations go, and find half of their memory. `lengths`: how many different ones
    the documents have.
    """
    # The weights of attention, kept by every layer.
    squares = costs.layers * costs.heads * tokens * row_length * FLOAT
    if recompute:  # the input of every layer, one layer as a whole, and the copies of all weights, which stay until the loss
        kept = (costs.layers * costs.hidden * FLOAT + costs.kept_per_token / costs.layers) * tokens
        kept += costs.kept + squares / costs.layers
    else:
        kept = costs.kept_per_token * tokens + costs.kept + squares
    gradients, head = costs.trainable * FLOAT, costs.head.numel()
    if passes == 1:
        first = head * FLOAT * costs.head_trained
        gradients = first + max(0, gradients - first - round(kept / 2))
    # The LM head: logits of a chunk in float32 (with bfloat16 a copy before and after), and its weight's gradient.
    logits = min(CHUNK, tokens) * costs.head[0] * (FLOAT + HALF * costs.bf16)
    cpu = device.name == "cpu"
    return {
        "weights": costs.weights,
        "gradients": gradients,
        "optimizer": 2 * costs.trainable * FLOAT,
        "activations": round(kept),
        "fragments": round(FRAGMENTS * kept) if passes > 1 and cpu else 0,
        "scores": logits + head * (HALF * costs.head_copied + FLOAT * costs.head_trained),
        "program": 0
        if device.name == "cuda"
        else LIBRARIES + min(ALL_KERNELS, KERNELS * lengths) * (costs.bf16 and cpu),
    }


def margin(device: Device) -> int:
    """Bytes of a GPU's memory that its allocator may lose to blocks that fit nothing, and that the libraries take."""
    return int(0.08 * free_memory(device) + 0.4 * 2**30) if device.name == "cuda" else 0


def free_memory(device: Device) -> int:
    """Bytes that this process has or could still get, on the device that will compute."""
    if device.name == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    free = memory_for_process()
    return min(free, torch.mps.recommended_max_memory()) if device.name == "mps" else free


def peak_memory(device: Device) -> int:
    """Peak bytes: of the GPU that computes, else of this process."""
    if device.name == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not there on Windows

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # bytes on macOS, KiB elsewhere
