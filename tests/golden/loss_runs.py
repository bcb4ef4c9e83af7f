"""100 steps of each recipe on a tiny dataset, and the losses that they had when last written.

.venv/bin/python tests/golden/loss_runs.py             after a deliberate change: writes losses/
.venv/bin/python tests/golden/loss_runs.py --out DIR   writes them there, as compare_losses.py asks

Sizes are tiny; all else is the recipe's own, but for float32, the batch, and learning rates that do
something within 100 steps. Codes and features are whole numbers from NumPy's generator, so every
machine trains on the same data; weights are drawn by PyTorch, whose last bits are the machine's.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tiny_chameleon import publish
from transformers import AutoConfig, AutoModelForCausalLM

from arra.config import AlignConfig, CheckpointConfig, LogConfig, LoraConfig, TrainConfig
from arra.data.manifest import (
    FeatureInfo,
    Manifest,
    SplitInfo,
    TextFeatureInfo,
    TokenizerInfo,
    write_manifest,
)
from arra.data.shard_file import Row, shard_name, write_shard
from arra.image_tokenizers.vq import VQConfig, VQModel
from arra.models.loading import fit_text_tokenizer
from arra.recipes import RECIPES
from arra.train.loop import train

STEPS, ROWS, CODES, GRID, DIM, WIDTH, SLOTS = 100, 48, 16, 4, 6, 5, 4
TERMS = ("loss", "loss_ar", "loss_z", "loss_gva", "grad_norm")
WRITTEN = Path(__file__).parent / "losses"
COLOURS, SHAPES = ("red", "blue", "green"), ("circle", "square", "line and a dot", "cross")
TOKENIZER = VQConfig(
    image_size=8,
    base_channels=4,
    channel_multipliers=(1, 1),
    res_blocks=1,
    middle_attention=False,
    norm_groups=2,
    z_channels=4,
    codebook_size=CODES,
    codebook_dim=3,
)


def dataset(folder: Path, prompts: str) -> Path:
    """Pictures whose codes follow from their caption, but for one code in four.

    Args:
        prompts: what the rows have: captions, classes, or features (of captions).
    """
    random = np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        colour, shape = i % len(COLOURS), i % len(SHAPES)
        codes = (5 * colour + 3 * shape + np.arange(GRID * GRID) * (1 + shape)) % CODES
        noise = random.integers(0, CODES, codes.shape)
        codes = np.where(random.integers(0, 4, codes.shape) == 0, noise, codes)
        seen = np.array([colour, shape, *random.integers(0, 4, DIM - 2)]) - 1.5
        said = np.array([[colour, shape, word, i % 2, 1] for word in range(1 + i % SLOTS)])
        text = f"a {COLOURS[colour]} {SHAPES[shape]}" if i % 5 else ""
        rows.append(
            Row(
                f"{i}",
                f"{i}",
                0,
                str(colour) if prompts == "classes" else text,
                codes.reshape(GRID, GRID),
                {"clip": seen.astype(np.float16)},
                text_features={"t5": said.astype(np.float16)} if prompts == "features" else {},
            )
        )
    texts = {"t5": WIDTH} if prompts == "features" else {}
    shard = write_shard(folder / shard_name("train", 0), rows, {"clip": DIM}, {}, texts)
    torch.manual_seed(0)
    tokenizer = VQModel(TOKENIZER).eval()
    tokenizer.save_pretrained(folder / "tokenizer")
    usual = [0.25, 0.5, -0.25, 0.125, -0.125, 0.5]
    manifest = Manifest(
        {"train": SplitInfo(ROWS, [shard])},
        TokenizerInfo(str(folder / "tokenizer"), tokenizer.fingerprint, CODES, 2),
        {"clip": FeatureInfo(DIM, "none", "made up", "class", [0.0] * DIM, usual, usual)},
        size=8,
        crop="none",
        class_names=list(COLOURS) if prompts == "classes" else [],
        text_features={"t5": TextFeatureInfo(WIDTH, "none", "made up", SLOTS)} if texts else {},
    )
    write_manifest(folder, manifest)
    return folder


def language_model(folder: Path) -> str:
    """A model that can only write."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fit_text_tokenizer(["a red circle, two blue squares"] * 3, 280).save_pretrained(folder)
    return str(folder)


def _config(recipe: str, prompts: str, folder: Path, **changes: Any) -> TrainConfig:
    config = RECIPES[recipe](str(dataset(folder / "data", prompts)), str(folder / "run"))
    sizes = {"layers": 2, "hidden_size": 32, "heads": 2, "mlp_size": 48, "text_vocabulary": 280}
    changed = dataclasses.replace(
        config,
        steps=STEPS,
        batch_size=6,
        dtype="float32",
        device="cpu",
        threads=1,
        model=dataclasses.replace(config.model, **sizes),
        align=dataclasses.replace(config.align, layer=(1,)),
        optim=dataclasses.replace(config.optim, lr=max(config.optim.lr, 1e-3)),
        checkpoint=CheckpointConfig(every=10 * STEPS),
        log=LogConfig(every=1),
    )
    return dataclasses.replace(changed, **changes)


def _llm(folder: Path, **changes: Any) -> TrainConfig:
    model = language_model(folder / "model")
    return _config("llm", "captions", folder, model_path=model, **changes)


def _adapt(folder: Path) -> TrainConfig:
    model = str(publish(folder / "model"))
    config = _config("adapt", "captions", folder, model_path=model)
    # At 1e-3 it jumps about after 60 steps, and the last bits of step 1 decide where to.
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=2e-4))


RUNS: dict[str, Callable[[Path], TrainConfig]] = {
    "scenes": lambda folder: _config("scenes", "captions", folder),
    "scenes-plain": lambda folder: _config(
        "scenes", "captions", folder, align=AlignConfig(weight=0.0)
    ),
    "base-classes": lambda folder: _config("base", "classes", folder),
    "base-features": lambda folder: _config("base", "features", folder),
    "llm": _llm,
    "adapt": _adapt,
    "lora": lambda folder: _llm(folder, lora=LoraConfig(rank=4, dropout=0.1)),
}
"""Name -> its config, for a folder in which it may write."""


@dataclass(frozen=True)
class Difference:
    """How far two series of one term are apart.

    Attributes:
        first: the first step, from 1, at which they are not equal; None = they are equal.
        largest: the largest relative difference.
        beyond: the first step beyond the tolerance.
    """

    first: int | None
    largest: float
    beyond: int | None


def tolerance(term: str, step: int) -> float:
    """Relative difference that another machine may make at a step, counted from 1.

    Measured on one x86 CPU: PyTorch's kernels without vector instructions (ATEN_CPU_CAPABILITY=
    default, MKL_CBWR=COMPATIBLE, ONEDNN_MAX_CPU_ISA=SSE41) against AVX2, and two threads against
    one. Losses differed by 2e-7 at most up to step 30 and by 4e-7 later, gradient norms by 3e-7
    and 2e-4. A changed mask, weight or count moves the first step by more than 1e-3.
    """
    loose = 10 if term == "grad_norm" else 1
    return (1e-5 if step <= 30 else 1e-3) * loose


def compare(one: list[float], other: list[float], term: str) -> Difference:
    """How far two series of `term` are apart, step by step."""
    apart = [
        0.0 if a == b else abs(a - b) / max(abs(a), abs(b)) for a, b in zip(one, other, strict=True)
    ]
    steps = list(enumerate(apart, 1))
    return Difference(
        next((step for step, value in steps if value), None),
        max(apart),
        next((step for step, value in steps if not value <= tolerance(term, step)), None),
    )


def losses(name: str, folder: Path) -> dict[str, list[float]]:
    """Every step's terms, as log.jsonl has them."""
    run = train(RUNS[name](folder))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {term: [line[term] for line in lines] for term in TERMS if term in lines[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WRITTEN)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            found = losses(name, Path(folder))
        file = options.out / f"{name}.json"
        lines = [f'"{term}": {json.dumps(values)}' for term, values in found.items()]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"{name}: {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
