"""The memory of a training step, counted before it runs, and the memory there is.

The peak is reached between the forward and the backward pass of an optimizer step's last batch: weights, gradients of the batches
before, the optimizer's two moments, what autograd keeps of this batch, and the LM head's scores. What autograd keeps is counted in
forward passes of one and of two of the rows with tensors that have shapes and no memory (torch's FakeTensorMode): one part grows
with the tokens, another, such as bfloat16 copies of the weights, does not.
"""

import math
import sys
from typing import NamedTuple

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from utils.device import Device, memory_for_process
from utils.model.lm_head import CHUNK
from utils.model.packing import ROUNDED, PackedBatch, PackedRows, collate, model_inputs
from utils.model.qwen3_train import Model

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


class MemoryForecast:
    """The memory of a training step of `model`: prepared for packed `rows`, adapters on, on the device that will compute."""

    def __init__(self, model, device: Device, rows: PackedRows):
        self.device, self.rows, self.head = device, rows, model.get_output_embeddings().weight
        self.layers, self.heads = model.config.num_hidden_layers, model.config.num_attention_heads
        parameters = list(model.parameters())
        self.weights = sum(weight.nbytes for weight in parameters)
        # Of all that is trained. Each of the optimizer's two moments takes as much.
        self.gradients = FLOAT * sum(weight.numel() for weight in parameters if weight.requires_grad)
        few = [rows[0], rows[min(1, len(rows) - 1)]]
        batches = [collate(few[:count], device, rows.max_length) for count in (1, 2)]
        kept = [bytes_kept(model, batch, device) for batch in batches]
        tokens = [batch["input_ids"].shape[1] for batch in batches]
        self.kept_per_token = (kept[1] - kept[0]) / (tokens[1] - tokens[0])
        self.kept = max(0, round(kept[0] - self.kept_per_token * tokens[0]))  # whatever the tokens

    def parts(self, way: StepPlan) -> dict[str, int]:
        """{what: bytes} at the peak of a step that is computed in this way."""
        device, row_length = self.device, self.rows.max_length
        tokens = way.rows_at_once * row_length  # of the largest batch
        if not device.equal_rows:
            tokens = math.ceil(self.rows.fullest(way.rows_at_once) / ROUNDED) * ROUNDED
        cpu, cuda, reduced = device.name == "cpu", device.name == "cuda", device.format != "fp32"
        vocabulary, hidden = self.head.shape
        states = tokens * hidden * FLOAT
        head = self.head.numel() * FLOAT * self.head.requires_grad
        # A chunk's scores in float32, on CUDA twice, else also in the format of the products; the head's states and their gradients.
        each = FLOAT + (FLOAT if cuda else HALF) * reduced
        scores = min(CHUNK, tokens) * vocabulary * each + 2 * states
        if reduced and self.head.dtype is torch.float32:  # is copied
            scores += self.head.numel() * HALF
        # The head's gradient is formed beside the sum of it. On one CPU it is not, but peaks were measured that came as near.
        if not cuda or torch.distributed.is_initialized():
            scores += head
        kept = self.kept_per_token * tokens
        if device.name == "mps":  # has no fused kernel for training: every layer's weights of attention
            kept += self.layers * self.heads * tokens * row_length * FLOAT
        if way.recompute:
            # The inputs of all layers and of the last norm, and one layer, on a GPU in the room of the scores.
            layer = kept / self.layers
            kept = (self.layers + 1) * states + (layer if cpu else max(0, layer - scores))
        kept += self.kept  # recomputed or not, as the copies of all weights stay until the loss
        gradients = self.gradients
        if way.passes == 1:
            # The layers' gradients come as their activations go, and find half of their memory.
            gradients = head + max(0, gradients - head - round(kept / 2))
        return {
            "weights": self.weights,
            "gradients": gradients,
            "optimizer": 2 * self.gradients,
            "activations": round(kept),
            "fragments": round(FRAGMENTS * kept) if way.passes > 1 and cpu else 0,
            "scores": scores,
            "program": 0 if cuda else LIBRARIES + KERNELS * (cpu and reduced),
        }


def bytes_kept(model, batch: PackedBatch, device: Device) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of a batch, weights not counted.

    The first two layers and the last one are computed: those between are like the second. The first also keeps what all share.
    """
    decoder = next(part for part in model.modules() if isinstance(part, Model))
    layers, seen, marks = decoder.layers, {}, []
    decoder.layers = layers[:2] + layers[2:][-1:]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = [fake for weight in model.parameters() for fake in (weight, mode.from_tensor(weight))]
    weights = {weight.untyped_storage()._cdata: weight for weight in weights}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage  # alive from now on, so that no address comes twice
        # The graph gets nothing: a tensor that a node saves of its own output would keep the whole graph alive for ever.

    def total(*_):
        marks.append(sum(storage.nbytes() for storage in seen.values()))

    second = layers[min(1, len(layers) - 1)]
    hooks = [second.register_forward_pre_hook(total), second.register_forward_hook(total)]
    inputs = model_inputs(batch)
    try:
        with (
            mode,
            torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing),
            torch.autocast(model.device.type, device.dtype, enabled=device.format != "fp32"),
        ):
            for name, value in inputs.items():
                if torch.is_tensor(value):
                    inputs[name] = mode.from_tensor(value).to(model.device)
            hidden = model.train()(**inputs)
    finally:
        decoder.layers = layers
        for hook in hooks:
            hook.remove()
    total()
    del hidden
    before, after, kept = marks
    return kept + max(0, len(layers) - 3) * (after - before)


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
