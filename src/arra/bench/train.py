"""`arra bench train`: what a training step takes, and what alignment adds to it.

Every arm is a run as `arra train` puts it together, on made-up images, and takes its steps by the
loop's own function. The arms take turns, step by step.
"""

import gc
import json
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from arra.bench.paired import Ratio, product_tflops, rounded, take_turns
from arra.bench.train_arms import (
    SIZES,
    Ours,
    Size,
    config_of,
    original_apart,
    require_checkout,
)
from arra.bench.train_memory import StepMemory, step_memory
from arra.config import EngineConfig, TrainConfig
from arra.device import cpu_has_bfloat16, keep_freed_memory, pick_device
from arra.train.throughput import peak_resident

Name = Literal["tiny", "B", "L", "XL", "7B"]
QUICK_BATCH, QUICK_ROUNDS = 2, 4


@dataclass(frozen=True)
class BenchTrainConfig:
    """Measures a training step: plain and aligned, and what else is asked for, in turns."""

    size: Name = "B"
    """LlamaGen's B, L or XL at 256 codes; 7B = shaped as Chameleon, at 1,024 codes, an adapter of
    rank 16 on bfloat16 weights; tiny only shows that everything runs."""
    batch_size: int = 8
    """Images a step."""
    rounds: int = 16
    """Steps of each arm that are measured."""
    warmup: int = 2
    """Steps of each arm before that."""
    quick: bool = False
    """2 images, 4 rounds, no process apart for the peak of the resident set."""
    llamagen: str | None = None
    """A checkout of FoundationVision/LlamaGen: its own GPT-B training step is an arm, in a
    process of its own."""
    compiled: bool = False
    """Another arm: plain, with --engine.compile."""
    gpu_arms: bool = False
    """Also, one after another, on a GPU: L and XL compiled, 7B with selective checkpointing."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = bfloat16 where it is native."""
    threads: int = 0
    """CPU threads; 0 = torch's default."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Of our arms."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.rounds) < 1 or self.warmup < 1:
            raise ValueError("--batch-size, --rounds and --warmup must be at least 1")
        if self.llamagen is not None and self.size != "B":
            raise ValueError("--llamagen compares with its GPT-B: leave out --size")

    def settled(self) -> "BenchTrainConfig":
        """With `quick` and every "auto" turned into what they stand for."""
        device = pick_device(self.device)
        native = device != "cpu" or cpu_has_bfloat16()
        dtype = self.dtype if self.dtype != "auto" else ("bfloat16" if native else "float32")
        made = replace(self, device=device, dtype=dtype)
        if self.quick:
            return replace(made, batch_size=QUICK_BATCH, rounds=QUICK_ROUNDS, warmup=1)
        return made

    def run(self, *, aligned: bool) -> TrainConfig:
        """Of one of our arms."""
        size = SIZES[self.size]
        return config_of(
            size, self.batch_size, self.device, self.dtype, self.engine, aligned=aligned
        )


def bench_train(config: BenchTrainConfig) -> dict[str, Any]:
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
    if device.type == "cpu":
        keep_freed_memory()  # as `arra train` does
    size = SIZES[config.size]
    with ExitStack() as until:
        ours = {
            "plain": Ours(config.run(aligned=False), size, until),
            "aligned": Ours(config.run(aligned=True), size, until),
        }
        if config.compiled:
            compiled = replace(config, engine=replace(config.engine, compile=True))
            ours["compiled"] = Ours(compiled.run(aligned=False), size, until)
        arms: dict[str, Callable[[], object]] = dict(ours)
        if config.llamagen is not None:
            arms["llamagen"] = original_apart(
                Path(config.llamagen), config.batch_size, device, config.dtype, until
            )
        seconds = take_turns(arms, config.rounds, config.warmup, device)
        waited = {name: arm.waited_share(sum(seconds[name])) for name, arm in ours.items()}
        memory = {name: step_memory(ours[name].run, ours[name]) for name in ("plain", "aligned")}
        work = ours["plain"].flops()
        product = product_tflops(device, getattr(torch, config.dtype))
    del ours, arms
    result = _compared(config, size, seconds, memory) | _rates(work, product, seconds)
    result["data_wait"] = waited
    if device.type == "cpu" and not config.quick:
        result["peak_rss"] = {
            name: _apart(config.run(aligned=name == "aligned"), size, torch.get_num_threads())
            for name in memory
        }
    if config.gpu_arms:
        result["gpu_arms"] = _gpu_arms(config)
    return rounded(result | _surroundings(config, device))


def _compared(
    config: BenchTrainConfig,
    size: Size,
    seconds: dict[str, list[float]],
    memory: dict[str, StepMemory],
) -> dict[str, Any]:
    middle = {name: median(values) for name, values in seconds.items()}
    aligned, plain = memory["aligned"], memory["plain"]
    found: dict[str, Any] = {
        **Ratio.of(seconds["aligned"], seconds["plain"]).fields("aligned_over_plain_time"),
        "aligned_over_plain_memory": aligned.total / plain.total,
        "tokens_per_s": config.batch_size * size.side**2 / middle["aligned"],
        "images_per_s": config.batch_size / middle["aligned"],
        "step_seconds": middle,
        "memory": {name: asdict(m) | {"total": m.total} for name, m in memory.items()},
    }
    if "llamagen" in seconds:
        found |= Ratio.of(seconds["llamagen"], seconds["plain"]).fields("times_llamagen")
    if "compiled" in seconds:
        found |= Ratio.of(seconds["plain"], seconds["compiled"]).fields("times_by_compiling")
    return found


def _rates(work: float, product: float, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Distance from the limit: operations of the plain step, which LlamaGen's has too."""
    reached = {name: work / median(values) / 1e12 for name, values in seconds.items()}
    return {
        "tflop_per_step": work / 1e12,
        "product_tflops": product,
        "tflops": reached,
        "fraction_of_product": {name: value / product for name, value in reached.items()},
    }


def _apart(config: TrainConfig, size: Size, threads: int) -> int:
    """Highest resident set, in bytes, of a process that does three steps and nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_of_steps, config, size, threads).result()


def _peak_of_steps(config: TrainConfig, size: Size, threads: int) -> int:
    torch.set_num_threads(threads)
    keep_freed_memory()
    with ExitStack() as until:
        step = Ours(config, size, until)
        for _ in range(3):
            step()
    return peak_resident()


# ---- on a GPU ------------------------------------------------------------------------------------

GPU_ARMS: dict[Name, tuple[int, EngineConfig]] = {
    "L": (64, EngineConfig(compile=True)),
    "XL": (32, EngineConfig(compile=True)),
    "7B": (4, EngineConfig(activation_checkpointing="selective", compile=True)),
}
"""Size -> images a step, engine."""


def _gpu_arms(config: BenchTrainConfig) -> dict[str, dict[str, float]]:
    return {
        f"{name} {'aligned' if aligned else 'plain'}": _alone(config, name, aligned)
        for name in GPU_ARMS
        for aligned in (False, True)
    }


def _alone(config: BenchTrainConfig, name: Name, aligned: bool) -> dict[str, float]:
    """One arm by itself, its memory given back: `steps` of it without waiting in between."""
    batch, engine = GPU_ARMS[name]
    chosen = replace(config, size=name, batch_size=batch, engine=engine)
    device, steps = torch.device(config.device), config.rounds
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as until:
        arm = Ours(chosen.run(aligned=aligned), SIZES[name], until)
        take_turns({"": arm}, 1, config.warmup + 3, device)
        arm.run.loader.waited = 0.0

        def several() -> None:
            for _ in range(steps):
                arm()

        seconds = take_turns({"": several}, 1, 0, device)[""][0]
        work, kernel = arm.flops() * steps, arm.run.step.objective.kernel
        share = arm.waited_share(seconds)
        peak = arm.peak_tflops()
    rate = work / seconds / 1e12
    return {
        "images_per_s": batch * steps / seconds,
        "tflops": rate,
        "mfu": rate / peak if peak else float("nan"),
        "peak_memory": torch.cuda.max_memory_allocated(device),
        "data_wait": share,
        "liger": float(kernel == "liger"),
    }


# ---- telling -------------------------------------------------------------------------------------


def told(result: dict[str, Any]) -> str:
    """A table, and one JSON line last."""
    lines = [
        f"GPT-{result['size']}, {result['batch_size']} images a step, {result['dtype']}, "
        f"{result['device']}, {result['threads']} threads, {result['rounds']} rounds",
        "",
        f"{'arm':10}{'s/step':>9}{'TFLOP/s':>9}{'of a product':>14}{'MB held':>9}{'data wait':>11}",
    ]
    for name, spent in result["step_seconds"].items():
        held = result["memory"].get(name)
        held_mb = f"{held['total'] / 1e6:9.0f}" if held else " " * 9
        waits = result["data_wait"].get(name)
        waited = f"{waits:11.2%}" if waits is not None else ""
        lines.append(
            f"{name:10}{spent:9.3f}{result['tflops'][name]:9.3f}"
            f"{result['fraction_of_product'][name]:14.0%}{held_mb}{waited}"
        )
    lines += ["", f"a large product: {result['product_tflops']:.3f} TFLOP/s"]
    for name, meaning in (
        ("aligned_over_plain_time", "time of an aligned step over a plain one"),
        ("times_llamagen", "time of LlamaGen's own step over our plain one"),
        ("times_by_compiling", "time of a plain step over a compiled one"),
    ):
        if name in result:
            low, high = result[f"{name}_interval"]
            lines.append(f"{meaning}: {result[name]:.3f} [{low:.3f}, {high:.3f}]")
    lines.append(f"memory, likewise: {result['aligned_over_plain_memory']:.4f}")
    for name, size in result.get("peak_rss", {}).items():
        lines.append(f"peak resident set, {name}: {size / 1e6:.0f} MB")
    for name, arm in result.get("gpu_arms", {}).items():
        lines.append(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in arm.items()))
    return "\n".join([*lines, json.dumps(result)])


def _surroundings(config: BenchTrainConfig, device: torch.device) -> dict[str, Any]:
    is_gpu = device.type == "cuda"
    return {
        "size": config.size,
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        "dtype": config.dtype,
        "engine": asdict(config.engine),
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
