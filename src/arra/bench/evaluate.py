"""`arra bench evaluate`: how long the distances take, and pictures on their way to a network.

Features are made up: ReLU of normal numbers, as wide as FID's. The least that a measure can take is
its products' operations over the rate at which this machine multiplies float64 matrices, measured
in the same run; a matrix by its own transpose counts half.

Legend: N images, D feature width.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from arra.bench.paired import Ratio, take_turns
from arra.bench.pictures import write_pictures
from arra.data.images import square
from arra.encoders import load_encoder
from arra.evaluate.cmmd import cmmd
from arra.evaluate.collected import Collected
from arra.evaluate.distances import frechet_distance, kernel_distance
from arra.evaluate.entries import open_entries
from arra.evaluate.features import FEATURES, EncoderFeatures
from arra.evaluate.image_set import StoredSet
from arra.evaluate.measures import KEPT_ROWS, PAIRED_ROWS
from arra.evaluate.passes import FeaturePass, go_through
from arra.evaluate.prdc import prdc
from arra.train.throughput import peak_resident

KID = (100, 1000)
"""Subsets and their size: the defaults of `arra evaluate`."""
BATCH = 1000
"""Rows that come at once."""
RATE_SIDE = 2048


@dataclass(frozen=True)
class BenchEvaluateConfig:
    """Measures how long the distances take, and what the way of a picture adds to a network."""

    images: int = 50_000
    """Rows of features in each of the two sets."""
    width: int = 2048
    """Numbers in a row."""
    paired: int = PAIRED_ROWS
    """Rows of each set that prdc and cmmd compare."""
    pictures: int = 512
    """JPEG files that are read, cropped and shown to --extractor; 0 leaves this part out."""
    extractor: str = "builtin:scenes-judge"
    """The network of that part."""
    rounds: int = 5
    """Of that part."""
    threads: int | None = None
    """CPU threads; default: torch's own choice."""

    def __post_init__(self) -> None:
        if self.images < KID[1] or self.paired < 10 or self.width < 2 or self.rounds < 1:
            raise ValueError(
                f"--images must be at least {KID[1]}, which a subset of kid takes, --paired 10, "
                f"--width 2 and --rounds 1"
            )
        if self.pictures < 0:
            raise ValueError("--pictures must be 0 or more")


def bench_evaluate(config: BenchEvaluateConfig) -> dict[str, Any]:
    """Runs it and returns the result, which is also the last line that is printed."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rate = _float64_rate()
    seconds = _distances(config)
    resident = peak_resident()
    least = {name: count / rate for name, count in _operations(config).items()}
    result: dict[str, Any] = {
        "images": config.images,
        "width": config.width,
        "paired": config.paired,
        "threads": torch.get_num_threads(),
        "float64_gflops": rate / 1e9,
        "seconds": seconds,
        "least_seconds": least,
        "total_seconds": sum(seconds.values()),
        "share_of_limit": sum(least.values()) / sum(seconds.values()),
        "peak_resident_gb": resident / 1e9,
    }
    if config.pictures:
        result |= _through_a_network(config)
    return result


def told(result: dict[str, Any]) -> str:
    """A table, and one JSON line last."""
    lines = [
        f"{result['images']:,} x {result['width']} features in each set, {result['paired']:,} for "
        f"prdc and cmmd, {result['threads']} threads",
        f"{'':12}{'seconds':>10}{'least':>10}",
    ]
    for name, spent in result["seconds"].items():
        lines.append(f"{name:12}{spent:10.2f}{result['least_seconds'][name]:10.2f}")
    lines += [
        f"{'all':12}{result['total_seconds']:10.2f}{sum(result['least_seconds'].values()):10.2f}"
        f"   {result['share_of_limit']:.0%} of {result['float64_gflops']:.0f} GFLOP/s in float64; "
        f"{result['peak_resident_gb']:.2f} GB at most",
    ]
    if "images_per_s" in result:
        low, high = result["times_the_network_interval"]
        lines.append(
            f"pictures through {result['extractor']}: {result['images_per_s']:.0f} images/s, "
            f"{result['times_the_network']:.2f} [{low:.2f}, {high:.2f}] x the time of the network "
            f"alone on decoded pictures"
        )
    return "\n".join([*lines, json.dumps(result)])


def _float64_rate() -> float:
    """Operations a second of a product of two float64 matrices, the best of five."""
    one, other = (torch.randn(RATE_SIDE, RATE_SIDE, dtype=torch.float64) for _ in range(2))
    best = min(_spent(lambda: one @ other) for _ in range(5))
    return 2 * RATE_SIDE**3 / best


def _operations(config: BenchEvaluateConfig) -> dict[str, float]:
    """Additions and multiplications that each measure cannot do without."""
    n, d, p = config.images, config.width, config.paired
    subsets, size = KID
    within_and_across = 2 * (p * p * d) + 2 * p * p * d
    return {
        "moments": 2 * n * d**2,
        "fd": 2 * d**3 + 2 * min(p, n) * d**2,
        "kid": subsets * (2 * size) ** 2 * d,
        "prdc": within_and_across,
        "cmmd": within_and_across,
    }


def _distances(config: BenchEvaluateConfig) -> dict[str, float]:
    random = np.random.default_rng(0)
    seconds = {"moments": 0.0}
    sets, gaussians = [], []
    for shift in (0.0, 0.1):
        collected = Collected(config.width, keep=KEPT_ROWS)
        for start in range(0, config.images, BATCH):
            count = min(BATCH, config.images - start)
            rows = random.standard_normal((count, config.width), dtype=np.float32) + shift
            np.maximum(rows, 0, out=rows)
            keys = random.integers(0, 2**63, count).astype(np.uint64)
            seconds["moments"] += _spent(lambda: collected.add(rows, keys))  # noqa: B023
        begun = time.perf_counter()
        gaussians.append(collected.gaussian())
        sets.append(collected.rows_ND)
        seconds["moments"] += time.perf_counter() - begun
    real, generated = sets
    few = real[: config.paired], generated[: config.paired]
    subsets, size = KID
    measures: dict[str, Callable[[], object]] = {
        "fd": lambda: frechet_distance(gaussians[0], gaussians[1], few[1]),
        "kid": lambda: kernel_distance(real, generated, subsets=subsets, subset_size=size),
        "prdc": lambda: prdc(*few),
        "cmmd": lambda: cmmd(*few),
    }
    return seconds | {name: _spent(measure) for name, measure in measures.items()}


def _through_a_network(config: BenchEvaluateConfig) -> dict[str, Any]:
    extractor = EncoderFeatures(load_encoder(config.extractor))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "pictures"
        write_pictures(folder, config.pictures)
        images = StoredSet(str(folder), open_entries(str(folder)), workers=2)
        side = 256
        decoded: list[Image] = [square(picture.image, side) for picture in images]

        def alone() -> None:
            for start in range(0, len(decoded), 64):
                extractor(decoded[start : start + 64])

        ways = {
            "whole": lambda: go_through(images, [FeaturePass(extractor, {FEATURES: 0})], side, 64),
            "network": alone,
        }
        seconds = take_turns(ways, config.rounds, 1, torch.device("cpu"))
    ratio = Ratio.of(seconds["whole"], seconds["network"])
    return {
        "extractor": extractor.name,
        "pictures": config.pictures,
        "images_per_s": config.pictures / float(np.median(seconds["whole"])),
        **ratio.fields("times_the_network"),
    }


def _spent(way: Callable[[], object]) -> float:
    begun = time.perf_counter()
    way()
    return time.perf_counter() - begun
