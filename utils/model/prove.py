"""The forms in which a GPU computes, tried on a small model first: losses, gradients and answers against float32 on the CPU.

So a first run on an unknown card or driver cannot compute wrongly. A form that fails, differs or hangs is left for the next one.
"""

import functools
import sys
import threading
from dataclasses import replace

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from utils.device import Device
from utils.errors import RunError
from utils.model import mixed
from utils.model.lm_head import cross_entropy_sum
from utils.model.packing import collate
from utils.model.qwen3_answer import CachedModel, hold_weights
from utils.model.qwen3_train import forward, prepare_packed
from utils.text import shorten

SECONDS = 60  # that a form may take; the first kernels of a process take some
# Largest relative error. Formats with 8 or 11 bits are off by 0.01 to 0.03; a wrong mask is off by 1.
EXACT, REDUCED = 0.01, 0.1
CPU = Device("cpu", False, "reference")


def prove(device: Device, lora=None) -> Device:
    """`device` with the first form of training that computes rightly; one line is printed for each that does not.

    lora: the settings of adapters, if they are trained. A CPU needs no proof. RunError if no form is right.
    """
    masked = replace(device, equal_rows=True)
    forms = [
        ("attention by the kernel for variable lengths", device, True),
        ("attention by one mask", masked, True),
        ("torch's own operations with one mask", masked, False),
        ("attention by document", replace(device, equal_rows=False), False),
    ]
    return _first_right(device, forms[device.equal_rows :], "format", functools.partial(training, lora=lora))


def prove_answers(device: Device) -> Device:
    """`device` with the first form of answers that computes rightly, as for `prove`."""
    exact = replace(device, bf16=False, fp16=False, weights="plain")
    forms = [
        ("answers with the fused norm", device, True),
        ("torch's own operations", device, False),
        ("torch's own operations in fp32", exact, False),
    ]
    return _first_right(device, forms, "answers", answers)


def _first_right(device, forms, number_format, compute):
    """forms: [(in words, the device that computes so, if it takes the forms for CUDA)]; number_format: Device's name of it."""
    if device.name == "cpu":
        return device
    true, problem = compute(CPU), ""
    allowed = mixed.DEVICES if device.name == "cuda" else ()  # nothing that an earlier proof has left
    for words, tried, fused in forms:
        if fused and not allowed:
            continue
        if problem:
            print(f"{problem}; {words} is tried", file=sys.stderr, flush=True)
        mixed.DEVICES, precision = allowed if fused else (), getattr(tried, number_format)
        problem = _problem(tried, true, compute, EXACT if precision == "fp32" else REDUCED)
        if not problem:
            return tried
        problem = f"{tried.name}, {precision}: {words} {problem}"
    raise RunError(f"{problem}; take --device cpu, or another --precision")


def _problem(device, true, compute, tolerance) -> str:
    """How a form fails, in words; "" if it does not."""
    found = []

    def try_it():
        try:
            found.append(compute(device))
        except Exception as error:  # of any kind: a kernel, a driver or a missing operator
            found.append(error)

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not found:
        return f"does not end within {SECONDS} s here"
    if isinstance(found[0], Exception):
        return f"fails here ({shorten(str(found[0]) or type(found[0]).__name__, 150)})"
    for name, right in true.items():
        error = (found[0][name].float().cpu() - right).norm() / right.norm()
        if not error < tolerance:  # which NaN is not either
            return f"differs from float32 by {error:.0%} here ({name})"
    return ""


def training(device: Device, lora=None) -> dict[str, torch.Tensor]:
    """Loss and gradients of a packed row. Its documents are shorter and longer than a block of a kernel, and two answer one prompt."""
    with torch.random.fork_rng(devices=[]):
        model = prepare_packed(_small_model())
        ids = torch.randint(1024, (4, 300)).tolist()
        if lora:
            from utils.model.lora import add_lora  # brings peft

            model = add_lora(model.requires_grad_(False), lora)
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # which begins with zeros
                    torch.nn.init.normal_(weight, std=0.1)
    model = model.to(device.name).train()
    items = [{"documents": [(ids[0][:20], ids[0][20:25])]}, {"documents": [(ids[1][:90], ids[1][90:260])]}]
    items.append({"documents": [(ids[2][:40], ids[2][40:70]), (ids[2][:40], ids[3][:50])]})
    hidden, batch = forward(model, collate([items], device, 512), device)
    with device.autocast():
        weights = torch.full((len(batch["targets"]),), 8.0, device=device.name)
        loss = cross_entropy_sum(hidden, model.get_output_embeddings().weight, batch["targets"], weights)
    loss.backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"loss": loss.detach(), **trained}


def answers(device: Device) -> dict[str, torch.Tensor]:
    """Logits of a first turn, of its next token and of a second turn, of one conversation and of two at once."""
    with torch.random.fork_rng(devices=[]):
        model = _small_model().eval()
        ids = torch.randint(1024, (2, 100)).to(device.name)
    dtype = device.dtype if device.weights == "plain" else torch.float32
    for weight in model.parameters():  # not .to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(device.name, dtype)
    hold_weights(model.to(device.name), device.weights)
    alone, both = CachedModel(model), CachedModel(model, torch.tensor([0, 7]).to(device.name))
    found = {}
    for name, start, end in ("first turn", 0, 60), ("next token", 60, 61), ("second turn", 61, 100):
        found[name] = alone.feed(ids[:1, start:end])
        found[f"{name} of two"] = both.feed(ids[:, start:end])
    return found


def _small_model() -> Qwen3ForCausalLM:
    """A model with Qwen3's head size and random weights, the same every time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
