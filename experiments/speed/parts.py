"""Where a step's milliseconds go, by part: medians of an operator's times, times how often it runs.

    OMP_NUM_THREADS=2 python experiments/speed/parts.py [CHECKOUT of LlamaGen]

GPT-B, 8 x 256 codes, bfloat16. A median leaves out what the machine did in between.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from arra.bench.train_arms import SIZES, Ours, config_of, original
from arra.config import EngineConfig
from arra.device import keep_freed_memory

STEPS = 5
WEIGHTS = [[2048, 768], [768, 2048], [2304, 768], [768, 768], [16384, 768], [768], [1001, 768]]
ATTENTION = ("12, 64]", "[96, ", "12, 256, ", "12, 32", "dot_product", "TurnedAttention")
LOSS = ("16384]", "[64, 1]", "softmax", "nll_loss", "cross_entropy", "CrossEntropy")


def part_of(name: str, shapes: list[list[int]]) -> str:
    """By an operator's name and the shapes of its inputs, which tell enough at these sizes."""
    told = f"{name} {shapes}"
    first = shapes[0] if shapes else []
    matrix = bool(first) and first in WEIGHTS
    if name == "aten::mm":
        return "matrix products"
    if any(sign in told for sign in ATTENTION) or name in ("aten::cat", "aten::stack"):
        return "attention and turning"
    if "adam" in name.lower():
        return "AdamW"
    if "embedding" in name or (matrix and name in ("aten::fill_", "aten::zero_")):
        return "embedding"
    if matrix and name == "aten::copy_":
        return "weights to bfloat16, gradients to float32"
    if matrix and name in ("aten::linalg_vector_norm", "aten::mul_", "aten::norm"):
        return "clipping"
    if any(sign in told for sign in LOSS):
        return "loss"
    if "[8, 256, 2048]" in told:
        return "SwiGLU"
    if "[8, 256, 768]" in told or "[8, 256, 1]" in told or first == [2048, 768]:
        return "norms, dropout, sums of the residual stream"
    return "all else"


def parts(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each part, most first. NumPy's random bits are no operator and not in it."""
    for _ in range(3):
        step()
    times: dict[tuple[str, str], list[float]] = {}
    named: dict[tuple[str, str], str] = {}
    walls = []
    for _ in range(STEPS):
        step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            begun = time.perf_counter()
            step()
            walls.append(1e3 * (time.perf_counter() - begun))
        for event in seen.events():
            key = event.name, str(event.input_shapes)
            named[key] = part_of(event.name, [s for s in event.input_shapes or [] if s])
            times.setdefault(key, []).append(event.self_cpu_time_total / 1e3)
    found: dict[str, float] = {}
    for key, spent in times.items():
        found[named[key]] = found.get(named[key], 0.0) + median(spent) * len(spent) / STEPS
    found["sum"] = sum(found.values())
    found["wall, with the profiler"] = median(walls)
    return {name: round(value, 1) for name, value in sorted(found.items(), key=lambda x: -x[1])}


if __name__ == "__main__":
    cpu, size = torch.device("cpu"), SIZES["B"]
    if len(sys.argv) > 1:
        print(json.dumps({"llamagen": parts(original(Path(sys.argv[1]), 8, cpu, "bfloat16"))}))
    keep_freed_memory()
    with ExitStack() as until:
        config = config_of(size, 8, "cpu", "bfloat16", EngineConfig(), aligned=False)
        print(json.dumps({"plain": parts(Ours(config, size, until))}))
