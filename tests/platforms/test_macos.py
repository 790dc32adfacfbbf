"""macOS and Apple GPUs, faked where they differ: memory, float64, wide products, workers, fonts."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils import device
from utils.training import memory


def test_memory_is_left_alone_where_there_is_no_glibc(monkeypatch):
    for absent in ("darwin", "win32"):
        monkeypatch.setattr(device.sys, "platform", absent)
        monkeypatch.setattr(device.ctypes, "CDLL", lambda name: pytest.fail("asked for a C library"))
        device.hold_memory()
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace())  # musl: no mallopt
    device.hold_memory()


def test_peak_memory_is_in_bytes_everywhere(monkeypatch):
    """Linux counts KiB, macOS bytes; Windows has no resource module."""
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5))
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(memory, "psutil", SimpleNamespace(Process=lambda: process))
    for platform, peak in (("linux", 3 * 2**30), ("darwin", 3 * 2**20), ("win32", 5)):
        if platform == "win32":
            monkeypatch.setitem(sys.modules, "resource", None)
        monkeypatch.setattr(memory.sys, "platform", platform)
        assert memory.peak_memory(device.Device("cpu", False, "test")) == peak


class AppleGPU(TorchDispatchMode):
    """Refuses what an Apple GPU refuses (float64) or gets wrong (products as wide as the vocabulary, for many rows at once)."""

    def __init__(self, vocabulary, rows):
        super().__init__()
        self.vocabulary, self.rows, self.widest = vocabulary, rows, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(made, torch.Tensor):
                assert made.dtype is not torch.float64, function
                if made.shape[-1:] == (self.vocabulary,) and function.overloadpacket is torch.ops.aten.mm:
                    self.widest = max(self.widest, made.shape[0])
                    assert made.shape[0] <= self.rows, function
        return result


def test_losses_and_scores_keep_to_what_apple_gpus_can_do(tmp_path):
    from tiny_model import make_tiny_model
    from transformers import AutoModelForCausalLM

    from utils.model.lm_head import CHUNK, cross_entropy_sum, token_logps
    from utils.model.packing import collate, model_inputs
    from utils.model.qwen3_train import prepare_packed

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "tiny"))
    document = ([1] * 5, [7, 8, 9] * CHUNK)  # three chunks
    with AppleGPU(model.config.vocab_size, CHUNK) as gpu:
        batch = collate([[{"documents": [document]}]])
        inputs, targets = model_inputs(batch), batch["targets"]
        hidden = prepare_packed(model)(**inputs)
        (cross_entropy_sum(hidden, model.lm_head.weight, targets) / len(targets)).backward()
        token_logps(hidden, model.lm_head.weight, targets)
    assert gpu.widest == CHUNK
