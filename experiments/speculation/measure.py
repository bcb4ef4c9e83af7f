"""How many forward passes speculation saves, and how much time: one JSON line per setting.

python experiments/speculation/measure.py MODEL [--data DATASET] [--pictures 16] [--at-once 1]
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch

from arra.generate.pipeline import Pipeline
from arra.generate.settings import Speculation

SCENES = [
    "a red circle left of a blue square",
    "a green triangle above a yellow star",
    "a purple square",
    "two red circles",
    "a small blue star below a large red square",
    "three yellow triangles",
    "an orange circle right of a green star",
    "a blue triangle",
]


def prompts_of(data: str | None, pictures: int) -> list[str]:
    """Captions of the dataset's validation split; of built-in scenes where none is named."""
    texts = SCENES
    if data is not None:
        [first, *_] = sorted(Path(data).glob("val*.parquet"))
        texts = parquet.read_table(first, columns=["text"])["text"].to_pylist()
    return [texts[number % len(texts)] for number in range(pictures)]


def measure(
    pipe: Pipeline, prompts: list[str], cfg: float, speculation: Speculation, at_once: int
) -> dict[str, Any]:
    """Paints the prompts; what it took."""
    pipe.speculation = speculation
    slots = at_once * (1 if cfg == 1 else 2)
    pipe.codes(prompts[:1], cfg=cfg, slots=slots)  # memory is filled, code is loaded
    before, begun = vars(pipe.tally).copy(), time.perf_counter()
    pipe.codes(prompts, cfg=cfg, slots=slots)
    seconds = time.perf_counter() - begun
    codes, forwards, kept = (
        getattr(pipe.tally, name) - before[name] for name in ("codes", "forwards", "kept")
    )
    return {
        "cfg": cfg,
        "mode": speculation.mode,
        "window": None if speculation.mode == "off" else speculation.width,
        "adaptive": speculation.adaptive,
        "pictures": len(prompts),
        "slots": slots,
        "forwards_per_picture": round(forwards / len(prompts), 2),
        "times_fewer": round((codes / len(prompts) - 1) / (forwards / len(prompts)), 3),
        "kept": round(kept / codes, 3),
        "seconds": round(seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=16, help="pictures")
    parser.add_argument("--cfg", type=float, nargs="+", default=[3.0, 1.0])
    parser.add_argument("--modes", nargs="+", default=["sjd", "scd"])
    parser.add_argument("--image-tokenizer")
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--adaptive", action="store_true")
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(
        args.model, dtype="float32", image_tokenizer=args.image_tokenizer
    )
    prompts = prompts_of(args.data, args.pictures)
    for cfg in args.cfg:
        settings = [Speculation()]
        settings += [
            Speculation(mode, window, args.adaptive)
            for window in args.windows
            for mode in args.modes
        ]
        for speculation in settings:
            found = measure(pipe, prompts, cfg, speculation, args.at_once)
            print(json.dumps({"model": args.model, "threads": torch.get_num_threads()} | found))


if __name__ == "__main__":
    main()
