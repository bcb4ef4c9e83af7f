"""How much memory a device has and how fast it multiplies: from a table, or measured here."""

import os
import time
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device as the plan sees it.

    Attributes:
        name: for the report.
        memory: bytes.
        tflops: dense products per second in the run's dtype, in 10^12; peak, or as measured.
        utilisation: fraction of `tflops` that training is assumed to reach.
        source: where `tflops` comes from.
    """

    name: str
    memory: int
    tflops: float
    utilisation: float
    source: str


@dataclass(frozen=True)
class Sheet:
    """A GPU's data sheet: memory in GiB, dense TFLOPS in bfloat16 and (without TF32) float32."""

    memory: int
    bfloat16: float
    float32: float


# NVIDIA's data sheets (A100, H100, H200, L4, L40S: half of what they give "with sparsity") and
# architecture white papers (GA102, AD102; bfloat16 with float32 accumulation). The bfloat16 column
# agrees with those of pytorch/torchtitan, torchtitan/tools/utils.py, and karpathy/nanochat,
# nanochat/common.py.
GPUS = {
    "rtx3090": Sheet(24, 71.0, 35.6),
    "rtx4090": Sheet(24, 165.2, 82.6),
    "l4": Sheet(24, 121.0, 30.3),
    "a100-40gb": Sheet(40, 312.0, 19.5),
    "l40s": Sheet(48, 362.0, 91.6),
    "a100-80gb": Sheet(80, 312.0, 19.5),
    "h100": Sheet(80, 989.0, 67.0),
    "h200": Sheet(141, 989.0, 67.0),
}
OF_PEAK, OF_MEASURED = 0.35, 0.5
"""Assumed utilisations. Of a data sheet's peak, well-tuned training reaches 0.4 to 0.55 (PaLM,
arXiv 2204.02311, table 3); this loop is plain PyTorch. Of a measured product: experiments/plan."""


def gpu_named(name: str, dtype: str) -> Device:
    """A GPU of the table.

    Raises:
        ValueError: it is not in the table.
    """
    sheet = GPUS.get(name)
    if sheet is None:
        raise ValueError(
            f"--gpu {name} is not in the table ({', '.join(GPUS)}): give --memory and --tflops "
            f"instead"
        )
    peak = sheet.bfloat16 if dtype == "bfloat16" else sheet.float32
    return Device(name, sheet.memory * GIB, peak, OF_PEAK, f"data sheet, dense {dtype}")


def peak_tflops(driver_name: str, dtype: str) -> float | None:
    """The data sheet's 10^12 dense products per second of a GPU, by the name that its driver gives
    it; None for one that is not in the table. Cards that share a name but are slower are not."""
    words = set(driver_name.lower().replace("rtx ", "rtx").replace("-", " ").split())
    slower = {"ti", "super", "laptop", "nvl"} | ({"pcie"} if "h100" in words else set())
    for name, sheet in GPUS.items():
        if set(name.split("-")) <= words and not slower & words:
            return sheet.bfloat16 if dtype == "bfloat16" else sheet.float32
    return None


def this_device(kind: str, dtype: str, threads: int) -> Device:
    """The machine that this runs on, its rate measured in a fraction of a second."""
    if kind == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        name = "this CPU"
    else:
        memory = torch.cuda.get_device_properties(0).total_memory
        name = torch.cuda.get_device_name()
    rate = _measured_tflops(kind, getattr(torch, dtype), threads)
    return Device(name, memory, rate, OF_MEASURED, f"measured here, {dtype} products")


def _measured_tflops(kind: str, dtype: torch.dtype, threads: int) -> float:
    size = 512 if kind == "cpu" else 8192
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        a = torch.randn(size, size).to(kind, dtype)
        b = torch.randn(size, size).to(kind, dtype)
        best = float("inf")
        for _ in range(8):
            started = time.perf_counter()
            for _ in range(4):
                a @ b
            if kind != "cpu":
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - started) / 4)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best / 1e12
