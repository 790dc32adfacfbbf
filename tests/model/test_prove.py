"""Forms that fail, differ or hang are left for the next one before a run, in one line; forms that compute rightly are taken."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import cuda_forms

from utils.device import Device, pick_device
from utils.errors import RunError
from utils.model import mixed, prove, qwen3_answer, qwen3_train

ENDED = threading.Event()  # the test is over
LORA = SimpleNamespace(RANK=16, ALPHA=48, as_dict=lambda: {"MODEL": "base"})


class Fake(Device):
    """A GPU by name, whose tensors are the CPU's."""

    def autocast(self):
        dtype = torch.float16 if self.fp16 else torch.bfloat16
        return torch.autocast("cpu", dtype, enabled=self.bf16 or self.fp16)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(...) -> Device; what it computes, a CPU does in the forms for CUDA. In the end no form computes any more."""
    before = set(threading.enumerate())
    ENDED.clear()
    to, full = torch.Tensor.to, torch.full
    monkeypatch.setattr("utils.model.qwen3_train.to_device", lambda batch, device: batch)
    monkeypatch.setattr(torch, "full", lambda *given, device=None, **named: full(*given, **named))

    def on_cpu(tensor, *given, **named):
        return to(tensor, *("cpu" if str(part) == "cuda" else part for part in given), **named)

    def in_forms(compute):
        def computed(device, **lora):
            fused = mixed.DEVICES == ("cuda",) and device.name == "cuda"
            with cuda_forms() if fused else contextlib.nullcontext():
                return compute(device, **lora)

        return computed

    monkeypatch.setattr(torch.Tensor, "to", on_cpu)
    for name in ("training", "answers"):
        monkeypatch.setattr(prove, name, in_forms(getattr(prove, name)))
    monkeypatch.setattr(mixed, "DEVICES", ("cuda",))
    yield lambda bf16, **named: Fake("cuda", bf16, "test", **named)
    ENDED.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()


@pytest.mark.parametrize(
    "form, equal_rows, lora",
    [("bf16", False, LORA), ("fp16", False, None), ("fp16", True, LORA), ("fp32", True, None)],
)
def test_forms_of_training_that_compute_rightly_are_taken(gpu, capsys, form, equal_rows, lora):
    device = gpu(form == "bf16", fp16=form == "fp16", equal_rows=equal_rows)
    assert prove.prove(device, lora) == device
    assert capsys.readouterr().err == "" and mixed.DEVICES == ("cuda",)


@pytest.mark.parametrize("bf16, weights", [(True, "plain"), (False, "fp16"), (False, "plain")])
def test_forms_of_answers_that_compute_rightly_are_taken(gpu, capsys, bf16, weights):
    device = gpu(bf16, fp16=weights == "fp16", weights=weights)
    assert prove.prove_answers(device) == device
    assert capsys.readouterr().err == "" and mixed.DEVICES == ("cuda",)


def test_a_cpu_needs_no_proof(monkeypatch):
    monkeypatch.setattr(prove, "_problem", pytest.fail)
    device = Device("cpu", True, "test")
    assert prove.prove(device) == prove.prove_answers(device) == device


def fails(*given, **named):
    raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build")


def differs(query, key, value, *given, **named):
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    return (query + key[: len(query)]) * 0 + value[: len(query)]


def hangs(*given, **named):
    prove.SECONDS = 60  # for the next form
    ENDED.wait(60)


FORMS = [(fails, "fails here (USE_F"), (differs, "differs from float32 by "), (hangs, "does not end within ")]


@pytest.mark.parametrize("form, words", FORMS)
def test_the_next_form_is_taken_and_told(gpu, monkeypatch, capsys, form, words):
    monkeypatch.setattr("cuda_on_cpu.varlen_as_documented", form)
    monkeypatch.setattr(prove, "SECONDS", 1 if form is hangs else 60)
    device = gpu(True)
    assert not device.equal_rows and prove.prove(device).equal_rows and mixed.DEVICES == ("cuda",)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and words in told and "attention by one mask is tried" in told


def test_fused_forms_that_fail_are_left_too_and_not_tried_again(gpu, monkeypatch, capsys):
    monkeypatch.setattr(qwen3_train._FusedRMSNorm, "forward", fails)
    assert prove.prove(gpu(True)).equal_rows and mixed.DEVICES == ()
    assert "torch's own operations with one mask is tried" in capsys.readouterr().err
    assert prove.prove_answers(gpu(True)).bf16 and mixed.DEVICES == () and not capsys.readouterr().err
    monkeypatch.setattr(prove, "_problem", lambda *_: "fails here")
    with pytest.raises(RunError, match="take --device cpu"):
        prove.prove(gpu(True))


def test_answers_in_a_format_that_fails_are_computed_in_float32(gpu, monkeypatch, capsys):
    product = qwen3_answer._product
    monkeypatch.setattr(
        qwen3_answer, "_product", lambda form, weight: (fails if form == "fp16" else product)(form, weight)
    )
    device = prove.prove_answers(gpu(False, fp16=True, weights="fp16"))
    assert device.answers == "fp32" and capsys.readouterr().err.count("\n") == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: its kernels cannot be run")
def test_the_kernels_of_this_gpu_compute_rightly():
    device = pick_device()
    assert prove.prove(device) == prove.prove(device, LORA) == prove.prove_answers(device) == device
