"""Which device and number format are chosen, and the memory of a process, on machines that are not here: their signs are faked."""

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

    def fake(code=("sm_75", "sm_80", "sm_90"), flash=True, cuda=None, mps=False, cpu="x86_64", **more):
        engines = more.get("engines", ("x86", "fbgemm"))
        monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", engines)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(code))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(device.platform, "machine", lambda: cpu)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in more)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in more)

    return fake


NO_FBGEMM = {"engines": ["onednn"]}


@pytest.mark.parametrize(
    "signs, asked, form, reason",
    [  # the form: device, format of products, one mask over rows of one length or not, format of answers
        ({"cuda": (9, 0)}, "auto", "cuda bf16 False bf16", "Test GPU, compute capability 9.0"),
        ({"cuda": (8, 0), "mps": True}, "auto", "cuda bf16 False bf16", "compute capability 8.0"),
        ({"cuda": (8, 0)}, "fp32", "cuda fp32 True fp32", "fp32 as asked for; Test GPU"),
        ({"cuda": (8, 6), "flash": False}, "auto", "cuda bf16 True bf16", "capability 8.6"),  # Windows
        ({"cuda": (7, 5)}, "auto", "cuda fp16 True fp16", "compute capability 7.5"),
        ({"mps": True, "cpu": "arm64"}, "auto", "mps fp32 True fp16", "Apple GPU"),
        ({"mps": True}, "fp32", "mps fp32 True fp32", "Apple GPU"),
        ({"mps": True}, "bf16", "mps bf16 True bf16", "Apple GPU"),
        ({"cpu": "arm64", **NO_FBGEMM}, "auto", "cpu fp32 False fp32", "arm64 processor"),
        ({}, "auto", "cpu fp32 False fp16 weights, fp32 products", "without bf16 instructions"),
        ({}, "fp32", "cpu fp32 False fp32", "without bf16 instructions"),
        (NO_FBGEMM, "auto", "cpu fp32 False fp32", "without bf16 instructions"),
        ({"avx512_bf16": True}, "auto", "cpu bf16 False bf16", "AVX512-BF16"),
        ({"avx512_bf16": True}, "fp32", "cpu fp32 False fp32", "AVX512-BF16"),
        ({"amx": True, "avx512_bf16": True, "cpu": "AMD64"}, "auto", "cpu bf16 False bf16", "AMX"),
    ],
)
def test_the_best_device_is_chosen_and_explained(machine, signs, asked, form, reason):
    machine(**signs)
    found = pick_device(precision=asked)
    assert f"{found.name} {found.format} {found.equal_rows} {found.answers}" == form and reason in str(found)
    assert ("autocast over fp32 weights" in str(found)) == (found.format != "fp32")


def test_what_is_asked_for_is_obeyed_or_refused(machine):
    machine(mps=True, cpu="arm64")
    assert pick_device("cpu").name == "cpu"
    with pytest.raises(UserError, match="no cuda device here; there is: mps, cpu"):
        pick_device("cuda")
    with pytest.raises(UserError, match="wanted auto, bf16, fp16 or fp32, got 'fp8'"):
        pick_device("cpu", "fp8")


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
    told = capsys.readouterr().err
    assert told.count("\n") == (not used) and ("has code for sm_" in told) == (not used)
    if not used:
        with pytest.raises(UserError, match="is not used: torch .* has code for"):
            pick_device("cuda")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    "build, hidden, told",
    [
        (None, False, " is not used: torch .* is built without CUDA; mend it with: .*/whl/cu130"),
        ("13.0", False, " is not used: .* for CUDA 13.0, and the driver is too old; .* R580"),
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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if not hidden:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert pick_device().name == "cpu"
    out, said = capsys.readouterr()
    assert not out  # answers of a chat may go there
    assert re.fullmatch(f"NVIDIA GeForce RTX 3060{told}.*\n", said) if told else not said
    assert pick_device("cpu").name == "cpu" and not capsys.readouterr().err  # asked for: nothing to tell


@pytest.mark.parametrize("capability, told", [((7, 5), True), ((8, 0), False)])
def test_bf16_on_a_gpu_that_emulates_it_is_told(machine, capsys, capability, told):
    machine(cuda=capability)
    assert pick_device("cuda", "bf16").bf16
    assert ("this GPU emulates bf16" in capsys.readouterr().err) == told


def test_kernels_are_limited_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "99"})
    pick_device("cpu")
    assert os.environ == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "99", "LRU_CACHE_CAPACITY": "256"}


def test_collections_are_rare_until_the_libraries_are_imported():
    during = []

    def main():
        during.append(gc.get_threshold())
        pick_device("cpu")

    assert run(main) == 0
    assert during[0] > OWN_THRESHOLDS == gc.get_threshold() and gc.get_freeze_count()


# ---- Memory


@pytest.mark.parametrize(
    "group, files",
    [
        ("0::/a/b\n", ["a/b/memory.max", "a/memory.max", "memory.max"]),
        ("3:memory:/a\n2:cpuset:/\n", ["memory/a/memory.limit_in_bytes", "memory/memory.limit_in_bytes"]),
    ],
    ids=["version 2", "version 1"],
)
def test_the_limits_of_a_control_group_and_of_those_above_it_hold(tmp_path, monkeypatch, group, files):
    groups = tmp_path / "cgroup"
    groups.write_text(group, encoding="utf-8")
    monkeypatch.setattr(device, "CGROUPS", tmp_path)
    monkeypatch.setattr(device, "Path", lambda path: groups)
    free = device.memory_for_process()
    for number, path in enumerate(tmp_path / name for name in reversed(files)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(12345678 - number), encoding="ascii")
        assert device.memory_for_process() == 12345678 - number
    path.write_text("max\n", encoding="ascii")
    assert device.memory_for_process() == 12345679 - number < free


def test_the_processes_of_a_machine_share_its_memory(tmp_path, monkeypatch):
    machine = device.psutil.virtual_memory()._replace(available=2**34)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(device, "Path", lambda path: tmp_path / "none")
    alone = device.memory_for_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone - device.memory_for_process() == pytest.approx(2**34 - 2**32, abs=2**24)
