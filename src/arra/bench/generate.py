"""`arra bench generate`: how fast pictures are painted, and how far that is from the limit.

Painting reads all weights and the cache in every step, so the limit is memory's speed. It is
measured on the same machine, in turns with the arms, on a working set of the weights' size.
"""

import json
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro

from arra.bench.bandwidth import read_bandwidth
from arra.bench.generate_arms import (
    ORIGINALS,
    Others,
    Ours,
    Way,
    by_transformers,
    fresh_image_tokenizer,
    fresh_painter,
    grid_of,
    original,
    requests_of,
    smaller,
    step_bytes,
    with_pixels,
)
from arra.bench.generate_gpu import gpu_arms
from arra.bench.paired import Ratio, rounded, take_turns
from arra.bench.train_arms import require_checkout
from arra.device import cpu_has_bfloat16, pick_device
from arra.files import read_json
from arra.generate.pipeline import Pipeline
from arra.generate.settings import Sampling, Speculation
from arra.models import native
from arra.models.base import Backbone, Grid
from arra.models.loading import PIPELINE, load_model, model_place
from arra.train.throughput import peak_resident

Name = Literal["tiny", "B", "L", "XL", "text", "7B"]
QUICK_ROUNDS = 2
ONE = ", one picture"
"""What the name of an arm ends with that paints one picture at a time."""


@dataclass(frozen=True)
class BenchGenerateConfig:
    """Measures painting: tokens, pictures and forward passes, and the share of the limit."""

    model: str | None = None
    """A painter, as `arra generate` opens it. Default: random weights, of a size."""
    size: Name = "B"
    """LlamaGen's B, L or XL; text = of B's shape, reading captions; 7B = shaped as Chameleon; tiny
    only shows that everything runs."""
    images: int = 2
    """Pictures side by side; one picture is measured besides."""
    slots: int = 0
    """Rows of a forward pass; 0 = what the pictures take, two each with guidance."""
    cfg: float = 4.0
    """Guidance scale, 1 = off."""
    top_k: int = 0
    """Draw from the k likeliest codes, 0 = all."""
    grid: tuple[int, int] | None = None
    """Height and width in codes. Default: the model's own, else 16 16."""
    rounds: int = 5
    """Calls of each arm that are measured."""
    quick: bool = False
    """2 rounds, no process apart for the peak of the resident set."""
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False
    """Another arm: ours with the decode step compiled."""
    quantization: tuple[Literal["int8", "int4", "fp8"], ...] = ()
    """More arms: ours with smaller weights."""
    speculate: tuple[Literal["sjd", "scd", "tree"], ...] = ()
    """More arms: ours with speculation. It says something of a trained --model alone."""
    window: int | None = None
    """Of the arms with speculation. Default: 8, of a tree 64."""
    llamagen: str | None = None
    """A checkout of FoundationVision/LlamaGen: its own `generate` is an arm."""
    transformers: bool = False
    """Another arm: the model's `generate` of transformers with guidance."""
    pixels: bool = False
    """Also one picture down to its pixels, by a call and streamed; with random weights by an image
    tokenizer of LlamaGen's shape."""
    gpu_arms: bool = False
    """Also, on a GPU: XL and 7B, compiled: one picture, and ever more until memory is full."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = bfloat16 where it is native; of --model: as it is stored."""
    threads: int = 0
    """CPU threads; 0 = torch's default."""

    def __post_init__(self) -> None:
        Sampling(cfg=self.cfg, top_k=self.top_k)
        Speculation(window=self.window)
        if min(self.images, self.rounds) < 1 or min(self.slots, self.threads) < 0:
            raise ValueError(
                "--images and --rounds must be at least 1, --slots and --threads at least 0"
            )
        if self.llamagen is not None and (self.model is not None or self.size not in ORIGINALS):
            raise ValueError("--llamagen compares with its GPT-B, L or XL: leave out --model")

    def settled(self) -> "BenchGenerateConfig":
        """With `quick` and every "auto" turned into what they stand for."""
        made = replace(self, device=pick_device(self.device))
        if self.dtype == "auto" and self.model is None:
            native = made.device != "cpu" or cpu_has_bfloat16()
            made = replace(made, dtype="bfloat16" if native else "float32")
        return replace(made, rounds=QUICK_ROUNDS) if self.quick else made

    def sampling(self) -> Sampling:
        return Sampling(cfg=self.cfg, top_k=self.top_k)

    def painter(self) -> Backbone:
        if self.model is not None:
            return load_model(self.model, self.device, dtype=self.dtype)
        return fresh_painter(self.size, torch.device(self.device), getattr(torch, self.dtype))

    def pipe(self, backbone: Backbone, grid: Grid) -> Pipeline:
        """Down to pixels, for one picture at a time."""
        if self.model is not None:
            pipe = Pipeline.from_pretrained(self.model, self.device, grid=grid, dtype=self.dtype)
        else:
            tokenizer = fresh_image_tokenizer(len(backbone.layout.code_ids), backbone.device)
            pipe = Pipeline(backbone, tokenizer, grid)
        pipe.sampling, pipe.slots = self.sampling(), 1 if self.cfg == 1 else 2
        return pipe

    def grid_of(self, backbone: Backbone) -> Grid:
        if self.grid is not None or self.model is None:
            return self.grid or grid_of(self.size)
        described = model_place(self.model) / PIPELINE
        if described.is_file():
            height, width = read_json(described)["grid"]
            return height, width
        return backbone.default_grid or grid_of(self.size)


def bench_generate(config: BenchGenerateConfig) -> dict[str, Any]:
    """Runs it and returns the result, which is also the last line that is printed.

    Raises:
        ValueError: what is asked for is not there.
    """
    config = config.settled()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    if config.gpu_arms and device.type != "cuda":
        raise ValueError("--gpu-arms needs a GPU, and there is none")
    if config.llamagen is not None:
        require_checkout(Path(config.llamagen))
    backbone = config.painter()
    grid = config.grid_of(backbone)
    ours = _ours(config, backbone, grid)
    arms: dict[str, Ours | Others] = {**ours, **_others(config, backbone, grid)}
    speeds: list[float] = []
    size = sum(step_bytes(backbone, ours["plain"].requests))
    turns: dict[str, Any] = dict(arms)
    turns["memory"] = lambda: speeds.append(read_bandwidth(size, device))
    seconds = take_turns(turns, config.rounds, 1, device)
    del seconds["memory"]
    result = _measured(arms, seconds, grid, speeds[-config.rounds :])
    result["first_rows_share"] = median(ours["plain" + ONE].first_rows() for _ in range(3))
    if device.type == "cpu" and not config.quick:
        result["peak_rss"] = _apart(config)
    if config.pixels:
        result["pixels"] = with_pixels(config.pipe(backbone, grid))
    surroundings = _surroundings(config, backbone, grid, device)
    del ours, arms, turns, backbone
    if config.gpu_arms:
        result["gpu_arms"] = gpu_arms(device, config.cfg, config.rounds, config.llamagen)
    return rounded(result | surroundings)


def _ours(config: BenchGenerateConfig, backbone: Backbone, grid: Grid) -> dict[str, Ours]:
    """Our ways, each for all pictures side by side and for one."""
    ways = {"plain": Way(backbone)}
    if config.compiled:
        ways["compiled"] = Way(backbone, compiled=True)
    for kind in config.quantization:
        ways[kind] = Way(smaller(backbone, kind))
    for mode in config.speculate:
        ways[mode] = Way(backbone, speculation=Speculation(mode, config.window))
    arms = {}
    for name, way in ways.items():
        for ending, images in (("", config.images), (ONE, 1)):
            requests = requests_of(way.backbone, grid, images, config.sampling())
            rows = requests[0].rows * images
            arms[name + ending] = Ours(
                requests, way.engine(rows if ending else config.slots or rows)
            )
    return arms


def _others(config: BenchGenerateConfig, backbone: Backbone, grid: Grid) -> dict[str, Others]:
    arms = {}
    if config.llamagen is not None:
        arms["llamagen"] = original(
            Path(config.llamagen),
            config.size,
            config.images,
            config.sampling(),
            backbone.device,
            backbone.model.dtype,
        )
    if config.transformers:
        requests = requests_of(backbone, grid, config.images, config.sampling())
        arms["transformers"] = by_transformers(backbone, requests)
    return arms


def _measured(
    arms: dict[str, Ours | Others],
    seconds: dict[str, list[float]],
    grid: Grid,
    bandwidths: list[float],
) -> dict[str, Any]:
    """Rates of each arm, and how many times ours is as fast as others.

    The share of the limit is taken round by round too: memory's speed changes with what else the
    machine does.
    """
    told: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        spent, codes = median(seconds[name]), grid[0] * grid[1]
        told[name] = {
            "seconds": spent,
            "tokens_per_s": arm.images * codes / spent,
            "images_per_s": arm.images / spent,
            "ms_per_token": spent / codes * 1e3,
            "forwards_per_image": arm.forwards_each,
        }
        if isinstance(arm, Ours):
            weights, cache = step_bytes(arm.engine.backbone, arm.requests)
            read = arm.forwards * (weights + cache)
            fraction = Ratio.of([read / speed for speed in bandwidths], seconds[name])
            told[name] |= {"weight_bytes": weights, "cache_bytes": cache}
            told[name] |= fraction.fields("bandwidth_fraction")
            told[name]["kept_share"] = arm.kept / arm.images / codes
    result: dict[str, Any] = {
        "tokens_per_s": told["plain"]["tokens_per_s"],
        "images_per_s": told["plain"]["images_per_s"],
        "bandwidth_fraction": told["plain" + ONE]["bandwidth_fraction"],
        "bandwidth": median(bandwidths),
        "bandwidth_range": [min(bandwidths), max(bandwidths)],
        "arms": told,
    }
    ours = [name for name, arm in arms.items() if isinstance(arm, Ours) and ONE not in name]
    for name in ours:
        for other in (*(each for each in arms if each not in ours and ONE not in each), "plain"):
            if other != name:
                ratio = Ratio.of(seconds[other], seconds[name])
                result |= ratio.fields(f"{name}_times_{other}")
    return result


def _apart(config: BenchGenerateConfig) -> int:
    """Highest resident set, in bytes, of a process that paints the pictures once."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, config, torch.get_num_threads()).result()


def _peak(config: BenchGenerateConfig, threads: int) -> int:
    torch.set_num_threads(threads)
    backbone = config.painter()
    _ours(
        replace(config, compiled=False, quantization=(), speculate=()),
        backbone,
        config.grid_of(backbone),
    )["plain"]()
    return peak_resident()


# ---- telling -------------------------------------------------------------------------------------


def told(result: dict[str, Any]) -> str:
    """A table, and one JSON line last."""
    height, width = result["grid"]
    lines = [
        f"{result['model']}, {result['images']} pictures of {height}x{width} codes, guidance "
        f"{result['cfg']:g}, {result['dtype']}, {result['device']}, {result['threads']} threads",
        "",
        f"{'arm':24}{'s':>8}{'ms/token':>10}{'tokens/s':>10}{'pictures/s':>12}"
        f"{'forwards each':>15}{'of the limit':>14}",
    ]
    for name, arm in result["arms"].items():
        share = arm.get("bandwidth_fraction")
        lines.append(
            f"{name:24}{arm['seconds']:8.2f}{arm['ms_per_token']:10.2f}{arm['tokens_per_s']:10.1f}"
            f"{arm['images_per_s']:12.3f}{arm['forwards_per_image']:15.0f}"
            + (f"{share:14.0%}" if share is not None else "")
            + (f", {arm['kept_share']:.0%} foreseen" if arm.get("kept_share") else "")
        )
    slowest, fastest = (speed / 1e9 for speed in result["bandwidth_range"])
    lines += [
        "",
        f"the limit: memory is read at {result['bandwidth'] / 1e9:.1f} GB/s "
        f"({slowest:.1f} to {fastest:.1f} in the rounds)",
    ]
    lines.append(f"first row of one picture: after {result['first_rows_share']:.1%} of its time")
    for key, value in result.items():
        name, times, other = key.partition("_times_")
        if times and not other.endswith("_interval"):
            low, high = result[f"{key}_interval"]
            lines.append(f"{name}: {value:.2f} [{low:.2f}, {high:.2f}] times as fast as {other}")
    if "pixels" in result:
        pixels = result["pixels"]
        lines.append(
            f"one picture with its pixels: {pixels['called_seconds']:.2f} s by a call, streamed "
            f"{pixels['streamed_seconds']:.2f} s, its first rows after "
            f"{pixels['first_rows_seconds']:.2f} s ({pixels['first_rows_share']:.1%})"
        )
    if "peak_rss" in result:
        lines.append(f"peak resident set: {result['peak_rss'] / 1e6:.0f} MB")
    for name, arm in result.get("gpu_arms", {}).items():
        lines.append(
            f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in arm.items())
        )
    return "\n".join([*lines, json.dumps(result)])


def _short(value: float | list[float]) -> str:
    return str([float(f"{v:.3g}") for v in value]) if isinstance(value, list) else f"{value:.4g}"


def _surroundings(
    config: BenchGenerateConfig, backbone: Backbone, grid: Grid, device: torch.device
) -> dict[str, Any]:
    is_gpu = device.type == "cuda"
    return {
        "model": config.model or config.size,
        "images": config.images,
        "grid": list(grid),
        "cfg": config.cfg,
        "top_k": config.top_k,
        "rounds": config.rounds,
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native": native.serves(backbone.output_table.weight),  # type: ignore[arg-type]
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
