"""Which device and number format to compute with, and why. CUDA, else Apple MPS, else CPU."""

import ctypes
import os
import platform
import sys
from dataclasses import dataclass

import torch

from utils.errors import UserError, imports_are_done


@dataclass(frozen=True)
class Device:
    """`name` is torch's device type, `bf16` whether matrix products run in bfloat16 (trained weights stay float32), `weights` the
    form in which those are held that answer: plain, half or int8 (utils/model/answer_weights.py)."""

    name: str
    bf16: bool
    reason: str
    weights: str = "plain"

    @property
    def dtype(self) -> torch.dtype:
        """The number format for inference: torch.bfloat16 or torch.float32."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def answers(self) -> str:
        """The number format of answers, in words."""
        forms = {"half": "fp16 weights, fp32 products", "int8": "int8 weights and products"}
        return forms.get(self.weights) or ("bf16" if self.bf16 else "fp32")

    def __str__(self):
        return f"{self.name}, {'bf16 autocast over fp32 weights' if self.bf16 else 'fp32'} ({self.reason})"


def pick_device(name: str = "auto", precision: str = "auto", answering: bool = False) -> Device:
    """Choose a Device. `name`: auto, cuda, mps or cpu; `precision`: auto, bf16 or fp32 (both are settings of the scripts); for
    `answering` alone also int8.

    bfloat16 is chosen only where the hardware computes in it: CUDA from compute capability 8.0, x86 with AVX512-BF16 or
    AMX. Elsewhere it is emulated and slower than float32; Apple's M1 and M2 emulate it, so MPS gets it only on request.
    Other x86 CPUs (with AVX2, which FBGEMM needs) answer from half weights, unless another precision is asked for.
    Raises UserError for a device that is not there and for another precision. On a CPU, memory is held from now on.
    """
    imports_are_done()
    known = ("auto", "bf16", "fp32", "int8") if answering else ("auto", "bf16", "fp32")
    if precision not in known:
        raise UserError(f"--precision: wanted {', '.join(known[:-1])} or {known[-1]}, got {precision!r}")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind, there in present.items() if there]
    name = here[0] if name == "auto" else name
    if name not in here:
        raise UserError(f"--device: no {name} device here; there is: {', '.join(here)}")
    if name == "cpu":
        hold_memory()
        limit_kernels()
    if name == "mps" and precision == "bf16" and () < _macos() < (14,):
        raise UserError(
            f"--precision bf16 on an Apple GPU needs macOS 14, and this is {platform.mac_ver()[0]}; take fp32"
        )
    native, reason = {"cuda": _cuda_bf16, "mps": _mps_bf16, "cpu": _cpu_bf16}[name]()
    fbgemm = name == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
    if precision == "auto":
        return Device(name, native, reason, "half" if fbgemm and not native else "plain")
    if precision == "int8":
        if not fbgemm:
            raise UserError("--precision int8 is for x86 CPUs with AVX2; here, take auto")
        return Device(name, False, f"int8 as asked for; {reason}", "int8")
    return Device(name, precision == "bf16", f"{precision} as asked for; {reason}")


def hold_memory() -> None:
    """Keep the memory of freed tensors for the next ones; does nothing elsewhere than on glibc.

    By default glibc gives large blocks back to the system at once, and every training step pays for having each page of them
    zeroed and mapped again (full fine-tuning of 0.6 B parameters: 20 tokens/s so, 27 with this).
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_TOP_PAD, 64 * 2**20)  # bytes asked for at a time


def limit_kernels() -> None:
    """Let oneDNN keep 256 kernels instead of 1,024: it makes some for every new shape of a product, about 2.6 MiB for each new length
    of a document. An environment that says otherwise is obeyed. It has to come before the first product."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "256")


def release_memory() -> None:
    """Give what hold_memory has held, and nothing uses, back to the system."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc():
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None  # musl has none


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # numbers of malloc.h


def _cuda_bf16():
    major, minor = torch.cuda.get_device_capability()
    return major >= 8, f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _macos() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit())


def _mps_bf16():
    return False, "Apple GPU; bf16 would save memory, not time"


def _cpu_bf16():
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False, f"{platform.machine()} processor"
    if torch.cpu._is_amx_tile_supported():
        return True, "x86 processor with AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "x86 processor with AVX512-BF16"
    return False, "x86 processor without bf16 instructions"
