"""Small training runs put together in memory, with no run folder: for tests of what steps compute.

run = small_run(config, data, world)
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from tiny_chameleon import publish
from torch import Tensor
from torch.distributed.tensor import DTensor

from arra.config import AlignConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from arra.data.manifest import FeatureInfo, Manifest, SplitInfo, TokenizerInfo, write_manifest
from arra.data.shard_file import Row, shard_name, write_shard
from arra.data.shards import open_dataset
from arra.models.adapted import put_on
from arra.models.loading import load_for_training
from arra.train.adapters import peft_config
from arra.train.setup import Run, assemble
from arra.train.step import optimizer_step
from arra.train.tally import Tally
from arra.train.world import World

CODES, DIM, GRID = 16, 6, (2, 4)


def small_dataset(folder: Path, classes: int = 0) -> Path:
    """20 training and 5 validation images of random codes, with one feature; captions of several
    lengths, or classes."""
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in {"train": 20, "val": 5}.items():
        values = generator.normal(size=(count, DIM)).astype(np.float16)
        captions = ["a red circle", "two blue squares and a line", "a line", ""]
        texts = [str(i % classes) if classes else captions[i % 4] for i in range(count)]
        rows = [
            Row(f"{split}-{i}", f"{split}-{i}", 0, texts[i], codes, {"clip": values[i]})
            for i, codes in enumerate(generator.integers(0, CODES, (count, *GRID)))
        ]
        shard = write_shard(folder / shard_name(split, 0), rows, {"clip": DIM}, {})
        splits[split] = SplitInfo(count, [shard])
    unit = np.linspace(0.1, 0.4, DIM).tolist()
    info = FeatureInfo(DIM, "none", "made up", "class", [0.0] * DIM, unit, unit)
    tokenizer = TokenizerInfo("none", "none", CODES, 2)
    manifest = Manifest(splits, tokenizer, features={"clip": info}, size=8, crop="none")
    write_manifest(folder, manifest)
    return folder


def small_config(data: Path, **changes: object) -> TrainConfig:
    """Batch 8, alignment after the first of two blocks, a z-loss; no dropout but of prompts."""
    config = TrainConfig(
        data_folder=str(data),
        out="",
        steps=20,
        batch_size=8,
        model=ModelConfig(layers=2, hidden_size=24, heads=2, mlp_size=32, text_vocabulary=280),
        align=AlignConfig(weight=0.5),
        loss=LossConfig(z=1e-3, chunk=16),
        data=DataConfig(prompt_dropout=0.25),
        optim=OptimConfig(lr=3e-3, warmup=0.2),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def small_run(config: TrainConfig, world: World, published: str | None = None) -> Run:
    """What a command would train, its weights of torch's default type.

    Args:
        published: start from a tiny checkpoint of this family in place of `config.model`.
    """
    dataset = open_dataset(config.data_folder, "train", features=("clip",))
    held_out = open_dataset(config.data_folder, "val", features=("clip",))
    backbone = load_for_training(
        config.model_path,
        config.model,
        codebook_KC=torch.zeros(CODES, 4),
        captions=dataset.texts,
        seed=config.seed,
        grid=GRID,
        class_names=["one", "two", "three"] if config.model.architecture == "llamagen" else [],
    )
    backbone.model.to(torch.get_default_dtype())
    adapter = None
    if config.lora.rank:
        backbone, adapter = put_on(backbone, peft_config(backbone, config.lora), config.seed)
    return assemble(config, Path(), world, backbone, dataset, held_out, "", adapter)


def tiny_chameleon(folder: Path) -> str:
    """A published checkpoint of another family, for `--model`."""
    return str(publish(folder))


def trajectory(run: Run, steps: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The mean terms of each step over all processes, and the weights that trained, whole."""
    lines = []
    for step in range(steps):
        tally = Tally(run.world)
        optimizer_step(run, step, tally)
        tally.read()
        lines.append(tally.means())
    weights = {f"model.{name}": whole(t) for name, t in run.state.trained().items()}
    objective = run.state.objective.named_parameters()
    return lines, weights | {f"objective.{name}": whole(p) for name, p in objective}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on every process."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
