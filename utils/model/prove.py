"""The forms in which a GPU computes, tried on a small model first: losses, gradients and answers against float32 on the CPU.

So a first run on an unknown card, driver or system cannot compute wrongly. A form that fails, differs or hangs is left for the next one.
"""

import sys
import threading
from collections.abc import Callable
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

Results = dict[str, torch.Tensor]
Form = tuple[bool, Device, str]  # with the forms for CUDA, the device that computes so, in words


def prove(device: Device, lora=None) -> Device:
    """`device` with the first form of training that computes rightly; one line is printed for each that does not.

    lora: the settings of adapters, if they are trained. A CPU needs no proof. RunError if no form is right. Takes about a second.
    """
    masked = replace(device, equal_rows=True)
    forms = [
        (True, device, "attention by the kernel for variable lengths"),
        (True, masked, "attention by one mask"),
        (False, masked, "torch's own operations with one mask"),
        (False, replace(device, equal_rows=False), "attention by document"),
    ]
    first = 2 if device.name != "cuda" else 1 if device.equal_rows else 0
    return _first_right(device, forms[first:], lambda tried: training(tried, lora), "format")


def prove_answers(device: Device) -> Device:
    """`device` with the first form of answers that computes rightly, as for `prove`."""
    exact = replace(device, bf16=False, fp16=False, weights="plain")
    forms = [
        (True, device, "answers with the fused norm"),
        (False, device, "torch's own operations"),
        (False, exact, "torch's own operations in fp32"),
    ]
    return _first_right(device, forms if device.name == "cuda" else forms[1:], answers, "answers")


def _first_right(
    device: Device, forms: list[Form], compute: Callable[[Device], Results], precision: str
) -> Device:
    """precision: the attribute of a Device that names the number format of what is computed."""
    if device.name == "cpu":
        return device
    true, allowed, problem = compute(CPU), mixed.DEVICES, ""
    for fused, tried, words in forms:
        if fused and not allowed:  # by an earlier proof
            continue
        if problem:
            print(f"{problem}; {words} is tried", file=sys.stderr, flush=True)
        mixed.DEVICES = allowed if fused else ()
        number_format = getattr(tried, precision)
        problem = _problem(tried, true, compute, EXACT if number_format == "fp32" else REDUCED)
        if not problem:
            return tried
        problem = f"{tried.name}, {number_format}: {words} {problem}"
    raise RunError(f"{problem}; take --device cpu, or another --precision")


def _problem(device: Device, true: Results, compute: Callable[[Device], Results], tolerance: float) -> str:
    """How a form fails, in words; "" if it does not."""
    found: list[Results | Exception] = []

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
        error = ((found[0][name] - right).norm() / right.norm()).item()
        if not error < tolerance:  # which NaN is not either
            return f"differs from float32 by {error:.0%} here ({name})"
    return ""


def training(device: Device, lora=None) -> Results:
    """Loss and gradients of a packed row. Its documents are shorter and longer than a block of a kernel, and two answer one prompt."""
    with torch.random.fork_rng(devices=[]):
        model = prepare_packed(_small_model())
        if lora:
            from utils.model.lora import add_lora  # brings peft

            model = add_lora(model.requires_grad_(False), lora)
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # which begins with zeros
                    torch.nn.init.normal_(weight, std=0.1)
        ids = torch.randint(1024, (4, 300)).tolist()
    model = model.to(device.name).train()
    items = [{"documents": [(ids[0][:20], ids[0][20:25])]}, {"documents": [(ids[1][:90], ids[1][90:260])]}]
    items.append({"documents": [(ids[2][:40], ids[2][40:70]), (ids[2][:40], ids[3][:50])]})
    hidden, batch = forward(model, collate([items], device, 512), device)
    with device.autocast():
        weights = torch.full((len(batch["targets"]),), 8.0, device=device.name)
        loss = cross_entropy_sum(hidden, model.get_output_embeddings().weight, batch["targets"], weights)
    loss.backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return _on_cpu({"loss": loss, **trained})


def answers(device: Device) -> Results:
    """Logits of a first turn, of its next token and of a second turn, and of two conversations of different lengths at once."""
    with torch.random.fork_rng(devices=[]):
        model = _small_model().eval()
        ids = torch.randint(1024, (2, 100))
    plain = device.weights == "plain"
    for weight in model.parameters():  # not .to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(device.name, device.dtype if plain else torch.float32)
    hold_weights(model.to(device.name), device.weights)
    ids, padding = ids.to(device.name), torch.tensor([0, 7]).to(device.name)
    alone, both = CachedModel(model), CachedModel(model, padding)
    found = {}
    for name, start, end in (
        ("the first turn", 0, 60),
        ("the next token", 60, 61),
        ("the second turn", 61, 100),
    ):
        found[name] = alone.feed_rows(ids[:1, start:end])
        found[f"{name}, two conversations"] = both.feed_rows(ids[:, start:end])
    return _on_cpu(found)


def _small_model() -> Qwen3ForCausalLM:
    """A model with Qwen3's head size and random weights, the same every time."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            tie_word_embeddings=True,
        )
    )


def _on_cpu(found: Results) -> Results:
    return {name: part.detach().float().cpu() for name, part in found.items()}
