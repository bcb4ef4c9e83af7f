"""What a pass over a window costs, beside a plain step: milliseconds, on weights by chance.

python experiments/speculation/cost.py [--passes 12]

LlamaGen's GPT-B (111M, 16,384 codes) in bfloat16, pictures of 256 codes with guidance.
"""

import argparse
import json
import time

import torch

from arra.generate.engine import Engine
from arra.generate.request import Request
from arra.generate.settings import NO_SPECULATION, Sampling, Speculation
from arra.layout import Layout
from arra.models.llamagen import LlamaGen
from arra.models.llamagen_layers import LlamaGenConfig
from arra.models.llamagen_model import LlamaGenForImageGeneration


def milliseconds(backbone: LlamaGen, slots: int, speculation: Speculation, passes: int) -> float:
    """Median over the passes of one lane, prompts not counted."""
    engine, grid = Engine(backbone, slots, speculation=speculation), (16, 16)
    prefix = tuple(backbone.condition("1", grid))
    for seed in range(slots // 2):
        engine.submit(Request(prefix, seed, grid, Sampling(cfg=3.0)))
    taken = []
    with engine._ready():
        for _ in range(passes + 2):
            begun = time.perf_counter()
            engine._step()
            taken.append(time.perf_counter() - begun)
    return 1000 * sorted(taken[2:])[passes // 2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = LlamaGenConfig(num_classes=1000)
    model = LlamaGenForImageGeneration(sizes).to(torch.bfloat16).eval()
    backbone = LlamaGen(model, Layout("grid", tuple(range(sizes.vocab_size)), pad=0))
    for slots in (2, 4, 16):
        plain = milliseconds(backbone, slots, NO_SPECULATION, args.passes)
        found = {"slots": slots, "plain_ms": round(plain, 1)}
        for window in (2, 4, 8, 16):
            taken = milliseconds(backbone, slots, Speculation("scd", window), args.passes)
            found[f"window_{window}"] = round(taken / plain, 2)
        print(json.dumps({"threads": torch.get_num_threads()} | found), flush=True)


if __name__ == "__main__":
    main()
