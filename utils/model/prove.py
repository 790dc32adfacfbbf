"""The forms in which a GPU trains, tried on a small packed row before a run: results and gradients against float32 on the CPU.

So a first run on an unknown card, driver or system cannot train wrongly. A form that fails, differs or hangs is left for the next one.
"""

import dataclasses
import threading
from collections.abc import Iterator

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from utils.device import Device
from utils.errors import RunError
from utils.model import mixed
from utils.model.lm_head import cross_entropy_sum
from utils.model.packing import collate, padding_for
from utils.model.qwen3_train import forward, prepare_packed
from utils.text import shorten

SECONDS = 60  # that a form may take; the first kernels of a process take some
# Largest relative error of a gradient. Formats with 8 or 11 bits are off by 0.01 to 0.03; a wrong mask is off by 1.
TOLERANCE = {"fp32": 0.01, "bf16": 0.1, "fp16": 0.1}


def prove(device: Device) -> Device:
    """`device` with the first of its forms that computes rightly; one line is printed for each that does not. A CPU needs no proof.

    RunError if none does. Takes about a second.
    """
    if device.name == "cpu":
        return device
    true, problem = _results(Device("cpu", False, "reference")), ""
    for fused, tried, words in _forms(device):
        if problem:
            print(f"{problem}; {words} is tried", flush=True)
        mixed.DEVICES = ("cuda",) if fused else ()
        problem = _problem(tried, true)
        if not problem:
            return tried
        problem = f"{tried.name}, {tried.format}: {words} {problem}"
    raise RunError(f"{problem}; train with --device cpu, or with another --precision")


def _forms(device: Device) -> Iterator[tuple[bool, Device, str]]:
    """(forms for CUDA, the device that computes so, in words)"""
    masked = dataclasses.replace(device, equal_rows=True)
    if not device.equal_rows:
        yield True, device, "attention by the kernel for variable lengths"
    if device.name == "cuda":
        yield True, masked, "attention by one mask"
    yield False, masked, "torch's own operations with one mask"
    yield False, dataclasses.replace(device, equal_rows=False), "attention by document"


def _problem(device: Device, true: dict[str, torch.Tensor]) -> str:
    """How a form fails, in words; "" if it does not."""
    found: list[dict[str, torch.Tensor] | Exception] = []

    def compute():
        try:
            found.append(_results(device))
        except Exception as error:  # of any kind: a kernel, a driver or a missing operator
            found.append(error)

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not found:
        return f"does not end within {SECONDS} s here"
    if isinstance(found[0], Exception):
        return f"fails here ({shorten(str(found[0]) or type(found[0]).__name__, 150)})"
    errors = {name: ((found[0][name] - one).norm() / one.norm()).item() for name, one in true.items()}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if errors[worst] < TOLERANCE[device.format]:
        return ""
    return f"differs from float32 by {errors[worst]:.0%} here ({worst})"


def _results(device: Device) -> dict[str, torch.Tensor]:
    """{name: tensor} of loss and gradients, on the CPU, of a small model with Qwen3's head size over a packed row."""
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = prepare_packed(Qwen3ForCausalLM(config)).to(device.name).train()
        ids = torch.randint(1024, (4, 300)).tolist()
    # Documents shorter and longer than a block of a kernel, and two answers to one prompt.
    items = [{"documents": [(ids[0][:20], ids[0][20:25])]}, {"documents": [(ids[1][:90], ids[1][90:260])]}]
    items.append({"documents": [(ids[2][:40], ids[2][40:70]), (ids[2][:40], ids[3][:50])]})
    hidden, batch = forward(model, collate([items], padding_for(device, 512)), device)
    with device.autocast():
        weights = torch.full((len(batch["targets"]),), 8.0, device=device.name)
        loss = cross_entropy_sum(hidden, model.lm_head.weight, batch["targets"], weights)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {name: part.detach().float().cpu() for name, part in {"loss": loss, **gradients}.items()}
