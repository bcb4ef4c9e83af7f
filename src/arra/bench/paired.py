"""Comparing ways to do the same work on a machine that others use too.

The ways take turns, in an order that changes from round to round, and are compared within a round:
what slows a whole round down cancels out. A comparison is the median of the rounds' ratios, with
its percentile bootstrap interval.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and its 95 % interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> "Ratio":
        """Of `above` over `below`, round by round."""
        ratios_N = np.asarray(above) / np.asarray(below)
        chosen = np.random.default_rng(0).integers(0, len(ratios_N), (RESAMPLES, len(ratios_N)))
        low, high = np.quantile(np.median(ratios_N[chosen], axis=1), [0.025, 0.975])
        return cls(float(np.median(ratios_N)), float(low), float(high))

    def fields(self, name: str) -> dict[str, float | list[float]]:
        """For the JSON line."""
        return {name: self.median, f"{name}_interval": [self.low, self.high]}

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after `warmup` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-warmup, rounds):
        names = list(ways)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent = timed(ways[name], device)
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def timed(way: Callable[[], object], device: torch.device) -> float:
    """Seconds until the work is done, on a GPU too."""
    _finish(device)
    begun = time.perf_counter()
    way()
    _finish(device)
    return time.perf_counter() - begun


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """10^12 operations a second of one large matrix product: the limit that is near at hand."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    best = min(timed(lambda: left @ right, device) for _ in range(5))
    return 2 * size**3 / best / 1e12


def rounded(value: Any) -> Any:
    """For the JSON line: every number in it to five digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
