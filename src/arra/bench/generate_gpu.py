"""Painting on a GPU: one picture with guidance, against the limit and against others, and ever more
pictures side by side until memory is full. Weights are random and made on the device.
"""

import gc
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from arra.bench.bandwidth import read_bandwidth
from arra.bench.generate_arms import (
    ORIGINALS,
    Ours,
    by_transformers,
    fresh_painter,
    grid_of,
    original,
    requests_of,
    step_bytes,
)
from arra.bench.paired import Ratio, take_turns
from arra.generate.engine import Engine
from arra.generate.settings import Sampling
from arra.models.base import Backbone

SIZES = ("XL", "7B")


def gpu_arms(
    device: torch.device, cfg: float, rounds: int, llamagen: str | None
) -> dict[str, dict[str, Any]]:
    """What each size does, in bfloat16 and compiled; its memory is given back before the next."""
    found: dict[str, dict[str, Any]] = {}
    for name in SIZES:
        backbone = fresh_painter(name, device, torch.bfloat16)
        sampling = Sampling(cfg=cfg)
        checkout = Path(llamagen) if llamagen is not None and name in ORIGINALS else None
        found[f"{name}, one picture"] = _one(backbone, name, sampling, rounds, checkout)
        for images, measured in _throughput(backbone, name, sampling).items():
            found[f"{name}, {images} pictures"] = measured
        del backbone
        _give_back()
    return found


def _one(
    backbone: Backbone, name: str, sampling: Sampling, rounds: int, checkout: Path | None
) -> dict[str, Any]:
    """One picture, ours compiled, in turns with whom there is to compare with."""
    device, grid = backbone.device, grid_of(name)
    requests = requests_of(backbone, grid, 1, sampling)
    ours = Ours(requests, Engine(backbone, requests[0].rows, compiled=True))
    speeds: list[float] = []
    size = sum(step_bytes(backbone, requests))
    arms: dict[str, Callable[[], object]] = {
        "ours": ours,
        "memory": lambda: speeds.append(read_bandwidth(size, device)),
    }
    if checkout is not None:
        arms["llamagen"] = original(checkout, name, 1, sampling, device, torch.bfloat16)
    if backbone.model.can_generate():
        arms["transformers"] = by_transformers(backbone, requests)
    seconds = take_turns(arms, rounds, 2, device)
    spent = median(seconds["ours"])
    measured: dict[str, Any] = {
        "seconds": spent,
        "ms_per_token": spent / math.prod(grid) * 1e3,
        "bandwidth": median(speeds),
    }
    least = [ours.forwards * size / speed for speed in speeds[-rounds:]]
    measured |= Ratio.of(least, seconds["ours"]).fields("bandwidth_fraction")
    for other in ("llamagen", "transformers"):
        if other in seconds:
            measured |= Ratio.of(seconds[other], seconds["ours"]).fields(f"times_{other}")
    return measured


def _throughput(backbone: Backbone, name: str, sampling: Sampling) -> dict[int, dict[str, Any]]:
    """Pictures side by side -> rates, twice as many each time, until memory does not suffice."""
    found: dict[int, dict[str, Any]] = {}
    images, device, grid = 1, backbone.device, grid_of(name)
    while True:
        _give_back()
        torch.cuda.reset_peak_memory_stats(device)
        requests = requests_of(backbone, grid, images, sampling)
        slots = images * requests[0].rows
        arm = Ours(requests, Engine(backbone, slots, compiled=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that memory ran out: it ends this
            spent = take_turns({"": arm}, 1, 1, device)[""][0]
        if arm.engine.slots < slots:
            return found
        found[images] = {
            "images_per_s": images / spent,
            "tokens_per_s": images * math.prod(grid) / spent,
            "peak_memory": torch.cuda.max_memory_allocated(device),
        }
        del arm
        images *= 2


def _give_back() -> None:
    torch.compiler.reset()  # compiled code is kept for a few shapes alone, others would run plain
    gc.collect()
    torch.cuda.empty_cache()
