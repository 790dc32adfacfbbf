"""The device and number format to compute with, and the reason: CUDA, else Apple MPS, else CPU; and the memory of a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from utils.errors import UserError, imports_are_done

if TYPE_CHECKING:  # the conversion asks for memory, and does not wait for it
    import torch

INDEX = "https://download.pytorch.org/whl"  # of torch's builds: cu130 and others
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # numbers of malloc.h
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Device:
    """`name` is torch's device type. `bf16`, `fp16`: matrix products run in that format, trained weights stay float32. `weights`:
    the form of the weights that answer, plain, fp16, half or int8 (utils/model/qwen3_answer.py). `equal_rows`: attention is by
    one mask over rows of one length, not by FlashAttention's kernel or document by document (utils/model/attention.py)."""

    name: str
    bf16: bool
    reason: str
    weights: str = "plain"
    fp16: bool = False
    equal_rows: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The number format for inference: torch.bfloat16, torch.float16 or torch.float32."""
        import torch

        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def autocast(self) -> torch.autocast:
        """The context in which matrix products run in the device's number format for training and scoring."""
        import torch

        dtype = torch.float16 if self.fp16 else torch.bfloat16
        return torch.autocast(self.name, dtype, enabled=self.bf16 or self.fp16)

    @property
    def answers(self) -> str:
        """The number format of answers, in words."""
        forms = {"half": "fp16 weights, fp32 products", "int8": "int8 weights and products", "fp16": "fp16"}
        return forms.get(self.weights, self.format)

    @property
    def format(self) -> str:
        """The number format of matrix products in training: bf16, fp16 or fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def __str__(self):
        reduced = "" if self.format == "fp32" else " autocast over fp32 weights"
        return f"{self.name}, {self.format}{reduced} ({self.reason})"


def pick_device(name: str = "auto", precision: str = "auto", answering: bool = False) -> Device:
    """Choose a Device. `name`: auto, cuda, mps or cpu; `precision`: auto, bf16, fp16 or fp32, for `answering` also int8.

    By itself, bf16 is chosen only where the hardware computes in it: CUDA from compute capability 8.0, x86 with AVX512-BF16 or
    AMX; fp16 on CUDA from 7.0, three times as fast as fp32 there. Other x86 CPUs (with AVX2, which FBGEMM needs) answer from half
    weights and Apple GPUs from fp16 ones, which halves what each token reads. UserError for what is not there. On a CPU, memory is
    held from now on.
    """
    import torch

    imports_are_done()
    known = ["auto", "bf16", "fp16", "fp32"] + ["int8"] * answering
    if precision not in known:
        raise UserError(f"--precision: wanted {', '.join(known[:-1])} or {known[-1]}, got {precision!r}")
    name = _find_device(name)
    # 1. The format that the hardware is fastest in
    if name == "cuda":
        major, minor = torch.cuda.get_device_capability()
        best = "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
        reason = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        if precision == "bf16" and best != "bf16":
            print(f"{reason}: this GPU emulates bf16 and is slower with it than with fp16", file=sys.stderr)
    elif name == "mps":
        best, reason = "fp32", "Apple GPU; bf16 would save memory, not time"
    else:
        hold_memory()
        # oneDNN keeps 256 kernels, not 1,024: it makes some for every new length of a document, about 2.6 MiB each.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "256")
        best, reason = _processor()
    # 2. The form of the weights that answer
    fbgemm = name == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
    weights = "plain"
    if precision == "int8":
        if not fbgemm:
            raise UserError("--precision int8 is for x86 CPUs with AVX2; here, take auto")
        weights = "int8"
    elif precision == "fp16" or precision == "auto" and (best == "fp16" or name == "mps"):
        weights = "fp16"
    elif precision == "auto" and best == "fp32" and fbgemm:
        weights = "half"
    # 3. The format of training, and what it can do
    chosen = {"auto": best, "int8": "fp32"}.get(precision, precision)
    if precision != "auto":
        reason = f"{precision} as asked for; {reason}"
    flash = name == "cuda" and best == "bf16" and chosen != "fp32"
    flash = flash and torch.backends.cuda.is_flash_attention_available()  # not in builds for Windows
    return Device(name, chosen == "bf16", reason, weights, chosen == "fp16", name != "cpu" and not flash)


def _find_device(name):
    """The device of this name, or the best one for "auto". A GPU that cannot be used is told on stderr, where no answers go."""
    import torch

    unused = "" if name in ("mps", "cpu") else _unused_gpu()
    here = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if torch.cuda.is_available() and not unused:
        here.insert(0, "cuda")
    if name not in ("auto", *here):
        raise UserError(unused or f"--device: no {name} device here; there is: {', '.join(here)}")
    if unused:
        print(unused, file=sys.stderr)
    return here[0] if name == "auto" else name


def _processor():
    """(the format that it multiplies matrices in, its description)"""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "fp32", f"{platform.machine()} processor"
    if torch.cpu._is_amx_tile_supported():
        return "bf16", "x86 processor with AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "bf16", "x86 processor with AVX512-BF16"
    return "fp32", "x86 processor without bf16 instructions"


def _unused_gpu():
    """Why an NVIDIA GPU that is there cannot be used, with what helps; "" if it can, or if there is none."""
    import torch

    if torch.version.hip:
        return ""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        code = torch.cuda.get_arch_list()
        # Code of one generation runs on its later cards (sm_80 on 8.6), and compute_ code on all later ones.
        for kind, generation, number in re.findall(r"(sm|compute)_(\d+)(\d)", str(code)):
            same = int(generation) == major or kind == "compute"
            if same and (int(generation), int(number)) <= (major, minor):
                return ""
        why = f"torch {torch.__version__} has code for {', '.join(code)}; other builds are at {INDEX}, such as cu126"
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor}) is not used: {why}"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return ""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):  # no such program
        return ""
    gpu = re.search(r"GPU \d+: ([^(\n]*)", found.decode("utf-8", "replace"))
    if not gpu:
        return ""
    why = f"built for CUDA {torch.version.cuda}, and the driver is too old; update it (CUDA 13 needs R580 or newer)"
    if not torch.version.cuda:
        version = torch.__version__.partition("+")[0]
        pip = f"{sys.executable} -m pip install --force-reinstall torch=={version} --index-url {INDEX}/cu130"
        why = f"built without CUDA; mend it with: {pip}"
    return f"{gpu[1].strip()} is not used: torch {torch.__version__} is {why}"


# ---- Memory of a CPU


def memory_for_process() -> int:
    """Bytes of main memory that this process has or could still get; the limits of its control groups (containers) hold.

    Processes that train together on one machine (LOCAL_WORLD_SIZE) share what is free.
    """
    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limits = [free + psutil.Process().memory_info().rss]
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)  # version 2 names no controllers
        own = CGROUPS / controllers / path.lstrip("/")
        for place, name in itertools.product((own, *own.parents), ("memory.max", "memory.limit_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
                limits.append(int((place / name).read_text(encoding="ascii")))
    return min(limits)


def hold_memory() -> None:
    """Keep the memory of freed tensors for the next ones; only on glibc, which by default gives large blocks back at once: every
    step then pays for having their pages zeroed and mapped again (full fine-tuning of 0.6 B parameters: 20 tokens/s, not 27)."""
    if libc := _glibc():
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_TOP_PAD, 64 * 2**20)  # bytes asked for at a time


def release_memory() -> None:
    """Give what hold_memory has held, and nothing uses, back to the system."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc():
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None  # musl has none
