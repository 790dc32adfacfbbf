"""Forms that fail, differ or hang are left for the next one before a run, in one line; forms that compute rightly are taken."""

import threading

import pytest
import torch
from cuda_on_cpu import cuda_forms

from utils.device import Device
from utils.errors import RunError
from utils.model import attention, mixed, prove


class Fake(Device):
    """A GPU by name, whose tensors are the CPU's."""

    def autocast(self):
        return torch.autocast(
            "cpu", torch.float16 if self.fp16 else torch.bfloat16, enabled=self.bf16 or self.fp16
        )


@pytest.fixture
def gpu(monkeypatch):
    """gpu(...) -> Device; what it computes, a CPU does in the forms for CUDA."""
    results = prove._results
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr("utils.model.qwen3_train.to_device", lambda batch, device: batch)
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *given, device=None, **named: full(*given, **named))

    def on_cpu(device):
        if mixed.DEVICES != ("cuda",) or device.name == "cpu":
            return results(device)
        with cuda_forms():
            return results(device)

    monkeypatch.setattr(prove, "_results", on_cpu)
    monkeypatch.setattr(mixed, "DEVICES", ("cuda",))
    return lambda *given, **named: Fake("cuda", *given, **named)


@pytest.mark.parametrize(
    "bf16, fp16, equal_rows",
    [(True, False, False), (False, True, False), (False, False, True), (True, False, True)],
)
def test_forms_that_compute_rightly_are_taken(gpu, capsys, bf16, fp16, equal_rows):
    device = gpu(bf16, "test", fp16=fp16, equal_rows=equal_rows)
    assert prove.prove(device) == device and capsys.readouterr().out == "" and mixed.DEVICES == ("cuda",)


def test_a_cpu_needs_no_proof(monkeypatch):
    monkeypatch.setattr(prove, "_results", pytest.fail)
    assert prove.prove(Device("cpu", True, "test")).name == "cpu"


def fails(*given, **named):
    raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build")


def differs(query, key, value, *given, **named):
    key, value = (
        part.repeat_interleave(query.shape[1] // part.shape[1], 1)[: len(query)] for part in (key, value)
    )
    return (query + key) * 0 + value


def hangs(*given, **named):
    threading.Event().wait(1.5)


@pytest.mark.parametrize(
    "form, words",
    [
        (fails, "fails here (USE_FLASH"),
        (differs, "differs from float32 by "),
        (hangs, "does not end within 1 s"),
    ],
)
def test_the_next_form_is_taken_and_told(gpu, monkeypatch, capsys, form, words):
    monkeypatch.setattr("cuda_on_cpu.varlen_as_documented", form)
    monkeypatch.setattr(prove, "SECONDS", 1 if form is hangs else 60)
    device = gpu(True, "test")
    assert not device.equal_rows and prove.prove(device).equal_rows and mixed.DEVICES == ("cuda",)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and words in told and "attention by one mask is tried" in told


def test_fused_forms_that_fail_are_left_too(gpu, monkeypatch, capsys):
    monkeypatch.setattr(mixed.FusedRMSNorm, "forward", fails)
    assert prove.prove(gpu(True, "test")).equal_rows and mixed.DEVICES == ()
    assert "torch's own operations with one mask is tried" in capsys.readouterr().out
    monkeypatch.setattr(attention, "by_document", fails)
    monkeypatch.setattr(attention, "by_mask", fails)
    prove_results = prove._results
    monkeypatch.setattr(
        prove,
        "_results",
        lambda device: {"loss": torch.ones(())} if device.name == "cpu" else prove_results(device),
    )
    with pytest.raises(RunError, match="train with --device cpu"):
        prove.prove(gpu(True, "test"))
