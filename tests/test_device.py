"""Which device and number format are chosen, on machines that are not here: their signs are faked."""

import gc
import os
import re

import pytest
import torch

from utils import device
from utils.device import pick_device
from utils.errors import OWN_THRESHOLDS, UserError, run


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=(8, 0), ...) fakes what torch and platform report."""

    def fake(
        code=("sm_75", "sm_80", "sm_90"),
        flash=True,
        cuda=None,
        mps=False,
        cpu="x86_64",
        amx=False,
        avx512_bf16=False,
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(code))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(device.platform, "machine", lambda: cpu)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)

    return fake


@pytest.mark.parametrize(
    "signs, name, bf16, reason",
    [
        ({"cuda": (9, 0)}, "cuda", True, "Test GPU, compute capability 9.0"),
        ({"cuda": (8, 0), "mps": True}, "cuda", True, "compute capability 8.0"),
        ({"cuda": (7, 5)}, "cuda", False, "compute capability 7.5"),
        ({"mps": True, "cpu": "arm64"}, "mps", False, "Apple GPU"),
        ({"cpu": "arm64"}, "cpu", False, "arm64 processor"),
        ({}, "cpu", False, "without bf16 instructions"),
        ({"avx512_bf16": True}, "cpu", True, "AVX512-BF16"),
        ({"amx": True, "avx512_bf16": True, "cpu": "AMD64"}, "cpu", True, "AMX"),
    ],
)
def test_the_best_device_is_chosen_and_explained(machine, signs, name, bf16, reason):
    machine(**signs)
    found = pick_device()
    assert (found.name, found.bf16) == (name, bf16) and reason in str(found)
    assert ("bf16 autocast over fp32 weights" in str(found)) == bf16


@pytest.mark.parametrize(
    "signs, asked, engines, answers",
    [
        ({}, "auto", ["x86", "fbgemm"], "fp16 weights, fp32 products"),
        ({}, "fp32", ["x86", "fbgemm"], "fp32"),
        ({}, "auto", ["onednn"], "fp32"),
        ({"cpu": "arm64"}, "auto", ["qnnpack"], "fp32"),
        ({"mps": True}, "auto", ["fbgemm"], "fp16"),
        ({"mps": True}, "fp32", ["fbgemm"], "fp32"),
        ({"avx512_bf16": True}, "auto", ["fbgemm"], "bf16"),
        ({"avx512_bf16": True}, "fp32", ["fbgemm"], "fp32"),
    ],
)
def test_answers_come_from_half_weights_where_that_is_faster(
    machine, monkeypatch, signs, asked, engines, answers
):
    machine(**signs)
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", engines)
    assert pick_device(precision=asked).answers == answers


def test_what_is_asked_for_is_obeyed_or_refused(machine):
    machine(cuda=(9, 0))
    assert pick_device("cpu").name == "cpu"
    assert not pick_device("cuda", "fp32").bf16
    machine(mps=True, cpu="arm64")
    assert pick_device("mps", "bf16").bf16
    with pytest.raises(UserError, match="no cuda device here; there is: mps, cpu"):
        pick_device("cuda")
    with pytest.raises(UserError, match="wanted auto, bf16, fp16 or fp32, got 'fp8'"):
        pick_device("cpu", "fp8")


@pytest.mark.parametrize(
    "cuda, flash_built, can",
    [
        ((9, 0), True, (True, True, True)),
        ((8, 6), True, (True, True, True)),
        ((8, 6), False, (False, True, True)),  # Windows
        ((7, 5), True, (False, False, True)),
    ],
)
def test_what_a_gpu_can_do_is_found_once(machine, cuda, flash_built, can):
    machine(cuda=cuda, flash=flash_built)
    found = pick_device().can
    assert (found.flash, found.bf16, found.fp16) == can and found.architectures == ("sm_75", "sm_80", "sm_90")
    assert pick_device("cpu").can.flash is False


@pytest.mark.parametrize(
    "cuda, code, used",
    [
        ((6, 1), ["sm_75", "sm_80"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((8, 9), ["sm_75", "sm_80"], True),
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 1), ["sm_90", "sm_120"], True),
        ((12, 0), ["sm_90a", "compute_90"], True),
    ],
)
def test_a_card_that_the_build_has_no_code_for_is_told_and_not_used(machine, capsys, cuda, code, used):
    machine(cuda=cuda, code=code)
    assert pick_device().name == ("cuda" if used else "cpu")
    told = capsys.readouterr().out
    assert told.count("\n") == (not used) and ("has code for sm_" in told) == (not used)
    if not used:
        with pytest.raises(UserError, match="is not used: torch .* has code for"):
            pick_device("cuda")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    "build, hidden, told",
    [
        (
            None,
            False,
            "NVIDIA GeForce RTX 3060 is not used: torch .* is built without CUDA; mend it with: .*/whl/cu130",
        ),
        (
            "13.0",
            False,
            "NVIDIA GeForce RTX 3060 is not used: .* for CUDA 13.0, and the driver is too old; .* R580",
        ),
        (None, True, None),
    ],
)
def test_a_gpu_that_is_there_and_not_used_is_told(
    machine, monkeypatch, tmp_path, capsys, build, hidden, told
):
    machine()
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-1)"\n', encoding="utf-8")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", build)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pick_device().name == "cpu"
    said = capsys.readouterr().out
    assert re.fullmatch(told + ".*\n", said) if told else not said
    assert pick_device("cpu").name == "cpu" and not capsys.readouterr().out  # asked for: nothing to tell


def test_bf16_on_a_gpu_that_emulates_it_is_told(machine, capsys):
    machine(cuda=(7, 5))
    assert pick_device("cuda", "bf16").bf16 and "this GPU emulates bf16" in capsys.readouterr().out
    machine(cuda=(8, 0))
    assert pick_device("cuda", "bf16").bf16 and not capsys.readouterr().out


@pytest.mark.parametrize("version, refused", [("13.6.1", True), ("14.0", False), ("15.2", False)])
def test_bf16_on_an_apple_gpu_needs_macos_14(machine, monkeypatch, version, refused):
    machine(mps=True)
    monkeypatch.setattr(device.platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))
    if refused:
        with pytest.raises(UserError, match="needs macOS 14, and this is 13.6.1; take fp32"):
            pick_device("mps", "bf16")
    else:
        assert pick_device("mps", "bf16").bf16


def test_kernels_are_limited_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "99")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "to be put back")
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    device.limit_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "99" and os.environ["LRU_CACHE_CAPACITY"] == "256"


def test_collections_are_rare_until_the_libraries_are_imported():
    during = []

    def main():
        during.append(gc.get_threshold())
        pick_device("cpu")

    assert run(main) == 0
    assert during[0] > OWN_THRESHOLDS == gc.get_threshold() and gc.get_freeze_count()
