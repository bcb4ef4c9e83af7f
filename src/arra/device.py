"""Which device a command computes on, and what it can do there."""

import ctypes
import mmap
import platform
import sys
from contextlib import suppress

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt (malloc.h)."""


def pick_device(name: str) -> str:
    """A device that is there: `auto` = cuda if there is one, else cpu.

    Raises:
        ValueError: no such device, or none of its kind on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"--device {name} is no device: use auto, cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here, use cpu or auto")
    return name


def cpu_has_bfloat16() -> bool:
    """Whether bf16 products are native (AVX-512 BF16 or AMX) rather than emulated."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> None:
    """From here on this process keeps what it frees, for what it takes next: glibc only.

    glibc maps each large block anew and gives it back when it is freed; a training step on a CPU
    takes and frees 2 GB, and waited 2 to 10 % of its time for pages to be mapped and cleared.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)


def in_large_pages(count: int, dtype: torch.dtype) -> Tensor:
    """So many zeros (count,) on the CPU, in pages of 2 MB where the system has them (Linux).

    What is read from front to back over and over is read faster so: 195 MB at 54 GB/s instead of 47
    (two threads of an AMD Zen 4).
    """
    if sys.platform != "linux":
        return torch.zeros(count, dtype=dtype)
    held = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(held, dtype=dtype)
