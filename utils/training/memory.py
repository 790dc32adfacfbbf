"""The memory of a training step, counted before it runs, and the memory there is.

The peak is reached between the forward and the backward pass of an optimizer step's last batch: weights, gradients of the batches
before, the optimizer's two moments, what autograd keeps of this batch, and the LM head's scores. What autograd keeps is counted on
two forward passes of the real model with tensors that have shapes and no memory (torch's FakeTensorMode): one part grows with the
tokens, another, such as bfloat16 copies of the weights, does not.
"""

import sys
from typing import NamedTuple

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from utils.device import Device, memory_for_process
from utils.model.lm_head import CHUNK
from utils.model.packing import ROUNDED, Item, collate, item_length, model_inputs

PROBES = (
    2,
    6,
)  # items of the two passes; attention takes other forms for short ones, so they are as long as those of the data
FLOAT, HALF = 4, 2  # bytes
LIBRARIES = 510 << 20  # bytes of Python, torch, transformers and their threads in a training process
KERNELS = 450 << 20  # bytes of those that oneDNN keeps for bfloat16 (utils.device.pick_device)
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
    """What a model costs in training, in bytes."""

    weights: int
    gradients: int  # of all that is trained; each of the optimizer's two moments takes as much
    kept: int  # by autograd, whatever the tokens
    kept_per_token: float
    head: torch.nn.Parameter  # of the LM head: (vocabulary, hidden)
    layers: int
    heads: int  # of attention


def measure_costs(model, device: Device, length: int, shared: int = 0) -> Costs:
    """Count the Costs of `model` as it will be trained: prepared for packed rows, adapters on, on its device.

    length: tokens of a usual item; shared: those of a prompt that it has two answers to, 0: it is one document.
    """
    probes = [_probe(count, length, shared) for count in PROBES]
    tokens = [sum(map(item_length, row)) for row in probes]
    kept = [_bytes_kept(model, row, device) for row in probes]
    per_token = (kept[1] - kept[0]) / (tokens[1] - tokens[0])
    parameters = list(model.parameters())
    return Costs(
        weights=sum(weight.nbytes for weight in parameters),
        gradients=FLOAT * sum(weight.numel() for weight in parameters if weight.requires_grad),
        kept=max(0, round(kept[0] - per_token * tokens[0])),
        kept_per_token=per_token,
        head=model.get_output_embeddings().weight,
        layers=model.config.num_hidden_layers,
        heads=model.config.num_attention_heads,
    )


def _probe(count: int, length: int, shared: int) -> list[Item]:
    """A packed row of `count` items, trained on as a whole but for their prompts. None is as long as another, with which it would be
    computed together, and the row is as long as the forward pass rounds it to."""
    row: list[Item] = []
    for number in range(count):
        tokens = length + number
        if number == count - 1:
            tokens += -(sum(map(item_length, row)) + tokens) % ROUNDED
        prompt, answers = [0] * max(1, shared), [tokens]
        if shared:
            both = tokens + 1 - shared
            answers = [both // 2, both - both // 2]
        row.append({"documents": [(prompt, [0] * answer) for answer in answers]})
    return row


def _bytes_kept(model, row: list[Item], device: Device) -> int:
    """Bytes that autograd keeps between forward and backward pass of a packed row, weights not counted."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = [fake for weight in model.parameters() for fake in (weight, mode.from_tensor(weight))]
    weights = {weight.untyped_storage()._cdata: weight for weight in weights}
    seen = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage  # alive from now on, so that no address comes twice
        # The graph gets nothing: a tensor that a node saves of its own output would keep the whole graph alive for ever.

    inputs = model_inputs(collate([row], device, sum(map(item_length, row))))
    with (
        mode,
        torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing),
        torch.autocast(model.device.type, device.dtype, enabled=device.format != "fp32"),
    ):
        for name, value in inputs.items():
            if torch.is_tensor(value):
                inputs[name] = mode.from_tensor(value).to(model.device)
        hidden = model.train()(**inputs)
    kept = sum(storage.nbytes() for storage in seen.values())
    del hidden
    return kept


def memory_parts(
    costs: Costs, tokens: int, recompute: bool, device: Device, row_length: int = 0, passes: int = 2
) -> dict[str, int]:
    """{what: bytes} at the peak of a training step whose largest batch holds `tokens` packed tokens.

    `row_length`: tokens of a row where every token sees its whole row, in attention without a fused kernel; else 0. With one pass
    a step the layers' gradients come as their activations go, and find half of their memory.
    """
    cpu, cuda, reduced = device.name == "cpu", device.name == "cuda", device.format != "fp32"
    vocabulary, hidden = costs.head.shape
    states, head = tokens * hidden * FLOAT, costs.head.numel() * FLOAT * costs.head.requires_grad
    # A chunk's scores in float32, on CUDA twice, else also in the format of the products; the head's states and their gradients.
    scores = min(CHUNK, tokens) * vocabulary * (FLOAT + (FLOAT if cuda else HALF) * reduced) + 2 * states
    if reduced and costs.head.dtype is torch.float32:  # is copied
        scores += costs.head.numel() * HALF
    # The head's gradient is formed beside the sum of it. On one CPU it is not, but peaks were measured that came as near.
    if not cuda or torch.distributed.is_initialized():
        scores += head
    kept = costs.kept_per_token * tokens
    kept += costs.layers * costs.heads * tokens * row_length * FLOAT  # every layer's weights of attention
    if recompute:  # the inputs of all layers and of the last norm, and one layer, which has room on a GPU where the scores were
        layer = kept / costs.layers
        kept = (costs.layers + 1) * states + (layer if cpu else max(0, layer - scores))
    kept += costs.kept  # recomputed or not, as the copies of all weights stay until the loss
    gradients = costs.gradients
    if passes == 1:
        gradients = head + max(0, gradients - head - round(kept / 2))
    return {
        "weights": costs.weights,
        "gradients": gradients,
        "optimizer": 2 * costs.gradients,
        "activations": round(kept),
        "fragments": round(FRAGMENTS * kept) if passes > 1 and cpu else 0,
        "scores": scores,
        "program": 0 if cuda else LIBRARIES + KERNELS * (cpu and reduced),
    }


def free_memory(device: Device) -> int:
    """Bytes that this process has or could still get, on the device that will compute.

    Of an NVIDIA GPU without what its allocator may lose to blocks that fit nothing, and what the libraries take.
    """
    if device.name == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(0.92 * (free + torch.cuda.memory_reserved()) - 0.4 * 2**30)
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
