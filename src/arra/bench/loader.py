"""`arra bench loader`: batches a second, of one thread, beside what training takes.

Two kinds of data, written to shards and read as `arra train` reads them: classes with 256 codes
(LlamaGen's ImageNet) and captions with 64 (the built-in scenes). Each is read from memory and as a
stream. A process of a run has a loader of its own, so the rates are those of one device.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arra.bench.paired import timed
from arra.config import ModelConfig
from arra.data.cache import ShardCache
from arra.data.loader import Loader
from arra.data.manifest import FeatureInfo, Manifest, SplitInfo, TokenizerInfo, write_manifest
from arra.data.shard_file import Row, shard_name, write_shard
from arra.data.shards import open_dataset
from arra.data.split import Split
from arra.data.stream import Stream
from arra.doctor.memoryless import without_memory
from arra.models.base import Backbone
from arra.models.loading import load_for_training
from arra.models.outline import outline_for_training
from arra.recipes import RECIPES
from arra.train.setup import assemble
from arra.train.step import optimizer_step
from arra.train.tally import Tally
from arra.train.throughput import ModelFlops, peak_resident
from arra.train.world import World

CLASSES = 1000
WORDS = (
    "red",
    "green",
    "blue",
    "yellow",
    "circle",
    "square",
    "left",
    "right",
    "of",
    "above",
    "the",
)
GPU_TFLOPS, MFU = 989.0, 0.45
"""Dense bfloat16 of an H100 or H200 (NVIDIA's data sheets), and the share that is aimed at."""


@dataclass(frozen=True)
class BenchLoaderConfig:
    """Measures how many images a second the loader gives."""

    images: int = 20_000
    """Of each made-up dataset."""
    batch_size: int = 64
    """Images a step."""
    seconds: float = 3.0
    """For which each rate is measured, three times; the best counts."""
    shard_rows: int = 1000
    """Images of a shard."""
    window: int = 4
    """--data.stream of the streamed one, with two lanes."""
    rounds: int = 6
    """Training steps that are timed, after two; the fastest counts."""

    def __post_init__(self) -> None:
        if min(self.images, self.shard_rows, self.window, self.rounds) < 1 or self.seconds <= 0:
            raise ValueError("every option must be more than 0")
        if self.batch_size < 1 or self.batch_size % 2:
            raise ValueError(f"--batch-size {self.batch_size} must be even: there are two lanes")


@dataclass(frozen=True)
class _Kind:
    """One kind of data, and the model that reads it."""

    name: str
    side: int
    codes: int
    dim: int
    model: ModelConfig


_SMALL = ModelConfig(layers=1, hidden_size=64, heads=2, mlp_size=64)
KINDS = (
    _Kind("classes", 16, 16384, 768, replace(_SMALL, architecture="llamagen")),
    _Kind("captions", 8, 512, 128, _SMALL),
)


def bench_loader(config: BenchLoaderConfig) -> dict[str, Any]:
    """Runs it and returns the result, which is also the last line that is printed."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            result[kind.name] = _measured(config, kind, Path(folder))
    consumed = _consumed(config.rounds)
    on_paper = _on_paper()
    result |= {
        "scenes_recipe_images_per_s": consumed,
        "times_scenes_recipe": result["captions"]["memory"] / consumed,
        "gpu_on_paper_images_per_s": on_paper,
        "times_gpu_on_paper": result["classes"]["memory"] / on_paper,
        "batch_size": config.batch_size,
        "images": config.images,
        "peak_resident_gb": peak_resident() / 1e9,
    }
    return result


def told(result: dict[str, Any]) -> str:
    """A table, and one JSON line last."""
    lines = [f"{'images/s, one thread':22}{'first epoch':>14}{'later':>10}{'streamed':>10}"]
    for kind in KINDS:
        rates = result[kind.name]
        three = f"{rates['first_epoch']:14.0f}{rates['memory']:10.0f}{rates['stream']:10.0f}"
        lines.append(f"{kind.name:22}{three}")
    consumed, on_paper = result["scenes_recipe_images_per_s"], result["gpu_on_paper_images_per_s"]
    lines += [
        "",
        f"the scenes recipe on this CPU takes {consumed:.0f} images/s: captions are made "
        f"{result['times_scenes_recipe']:.0f} x as fast",
        f"an H200 at {MFU:.0%} MFU would take {on_paper:.0f} images/s with GPT-B (on paper): "
        f"classes are made {result['times_gpu_on_paper']:.0f} x as fast",
        json.dumps(result),
    ]
    return "\n".join(lines)


def _measured(config: BenchLoaderConfig, kind: _Kind, folder: Path) -> dict[str, float]:
    _write(config, kind, folder)
    dataset = open_dataset(folder)
    grid = (kind.side, kind.side)
    backbone = load_for_training(
        None,
        kind.model,
        codebook_KC=torch.zeros(kind.codes, 8),
        captions=dataset.texts,
        seed=0,
        grid=grid,
        class_names=dataset.manifest.class_names,
    )
    held = Loader(dataset, backbone, batch_size=config.batch_size, seed=0, prompt_dropout=0.1)
    steps = config.images // config.batch_size
    first = steps * config.batch_size / timed(lambda: _drain(held, steps), torch.device("cpu"))
    rates = {"first_epoch": first, "memory": _rate(config, held, steps)}
    return rates | {"stream": _rate(config, _streamed(config, folder, backbone), 0)}


def _streamed(config: BenchLoaderConfig, folder: Path, backbone: Backbone) -> Loader:
    unused = ShardCache(folder / "cache", 10**9)
    stream: Split = Stream(folder, "train", ["clip"], window=config.window, lanes=2, cache=unused)
    return Loader(stream, backbone, batch_size=config.batch_size, seed=0, prompt_dropout=0.1)


def _drain(loader: Loader, steps: int) -> None:
    for step in range(steps):
        loader.step(step)


def _rate(config: BenchLoaderConfig, loader: Loader, step: int) -> float:
    best = 0.0
    for _ in range(3):
        begun, first = time.perf_counter(), step
        while time.perf_counter() - begun < config.seconds:
            loader.step(step)
            step += 1
        spent = time.perf_counter() - begun
        best = max(best, (step - first) * config.batch_size / spent)
    loader.dataset.close()
    return best


# ---- data ----------------------------------------------------------------------------------------


def _write(config: BenchLoaderConfig, kind: _Kind, folder: Path) -> None:
    rows, size = list(_rows(config, kind)), config.shard_rows
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    shards = [
        write_shard(folder / shard_name("train", i), part, {"clip": kind.dim}, {})
        for i, part in enumerate(parts)
    ]
    unit = [1.0] * kind.dim
    names = [f"class {number}" for number in range(CLASSES)] if kind.name == "classes" else []
    write_manifest(
        folder,
        Manifest(
            {"train": SplitInfo(len(rows), shards)},
            TokenizerInfo("made up", "none", kind.codes, 16),
            features={"clip": FeatureInfo(kind.dim, "none", "made up", "class", unit, unit, unit)},
            size=16 * kind.side,
            crop="none",
            class_names=names,
        ),
    )


def _rows(config: BenchLoaderConfig, kind: _Kind) -> Iterator[Row]:
    random = np.random.default_rng(0)
    for number in range(config.images):
        text = f"class {number % CLASSES}"
        if kind.name == "captions":
            text = " ".join(random.choice(WORDS, 9))
        codes = random.integers(0, kind.codes, (kind.side, kind.side), np.int32)
        feature = random.standard_normal(kind.dim, np.float32).astype(np.float16)
        yield Row(str(number), str(number), 0, text, codes, {"clip": feature})


# ---- what training takes -------------------------------------------------------------------------


def _consumed(rounds: int) -> float:
    """Images/s of the scenes recipe's own steps on this CPU, in one thread."""
    config = replace(RECIPES["scenes"]("", ""), dtype="float32", device="cpu")
    kind, small = KINDS[1], BenchLoaderConfig(images=500)
    with tempfile.TemporaryDirectory() as folder:
        _write(small, kind, Path(folder))
        dataset = open_dataset(folder)
    backbone = load_for_training(
        None,
        config.model,
        codebook_KC=torch.randn(kind.codes, 8),
        captions=dataset.texts,
        seed=0,
        grid=(kind.side, kind.side),
        class_names=[],
    )
    world = World(torch.device("cpu"))
    run = assemble(config, Path("."), world, backbone, dataset, None, "")
    tally = Tally(world)
    times = [
        timed(lambda step=step: optimizer_step(run, step, tally), world.device)  # type: ignore[misc]
        for step in range(2 + rounds)
    ]
    return config.batch_size / min(times[2:])


def _on_paper() -> float:
    """Images/s of GPT-B at 256 codes on an H100 or H200 at `MFU`."""
    with without_memory():
        backbone = outline_for_training(
            None,
            ModelConfig(architecture="llamagen", size="B"),
            codebook_size=16384,
            captions=[],
            grid=(16, 16),
            class_names=[str(number) for number in range(CLASSES)],
            text_width=0,
            text_slots=0,
        )
        work = ModelFlops.of(backbone).total(256, 256**2, 256)
    return GPU_TFLOPS * 1e12 * MFU / work
