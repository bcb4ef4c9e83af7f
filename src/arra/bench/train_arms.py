"""What `arra bench train` compares: runs of our own, put together as `arra train` does, and the
original LlamaGen's step, from a checkout.

Legend: N images, D width of a target, K codes.
"""

import importlib
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

from arra.bench.paired import timed
from arra.config import AlignConfig, EngineConfig, LoraConfig, ModelConfig, TrainConfig
from arra.data.manifest import FeatureInfo, Manifest, SplitInfo, TokenizerInfo
from arra.data.shards import Dataset
from arra.doctor.devices import peak_tflops
from arra.doctor.made_up import captions
from arra.layout import Layout
from arra.models.adapted import put_on
from arra.models.base import Backbone
from arra.models.causal_lm import CausalLM
from arra.models.loading import fit_text_tokenizer, load_for_training
from arra.recipes import RECIPES
from arra.train.adapters import peft_config
from arra.train.loop import deterministic
from arra.train.setup import Run, assemble
from arra.train.step import optimizer_step
from arra.train.tally import Tally
from arra.train.throughput import ModelFlops
from arra.train.world import World

CODES, CLASSES, TARGET = 16384, 1000, 512
"""LlamaGen's codebook and classes; width of the global target (CLIP-B's projection)."""
IMAGES = 64
"""Of the made-up dataset."""
CHAMELEON = LlamaConfig(
    vocab_size=65536,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
"""Chameleon's 7B (arXiv 2405.09818, table 1), without its norms of queries and keys."""


@dataclass(frozen=True)
class Size:
    """A model and the images that it is trained on, side x side codes."""

    model: ModelConfig
    side: int = 16
    chameleon: bool = False


def _llamagen(size: Any) -> Size:
    return Size(ModelConfig(architecture="llamagen", size=size, dropout=0.1))


_TINY = ModelConfig("llamagen", dropout=0.1, layers=2, hidden_size=64, heads=2, mlp_size=256)
SIZES = {
    "tiny": Size(_TINY, side=4),
    **{name: _llamagen(name) for name in ("B", "L", "XL")},
    "7B": Size(ModelConfig(dtype="auto"), side=32, chameleon=True),
}
"""Name -> model. tiny only shows that everything runs; 7B trains an adapter."""


def config_of(
    size: Size, batch_size: int, device: str, dtype: Any, engine: EngineConfig, *, aligned: bool
) -> TrainConfig:
    """LlamaGen's published protocol (recipes/imagenet.py) for another model and batch."""
    config = replace(
        RECIPES["imagenet"]("", ""),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        model=size.model,
        align=AlignConfig(weight=1.0 if aligned else 0.0),
        engine=engine,
    )
    return replace(config, lora=LoraConfig(rank=16), model_path="") if size.chameleon else config


def run_of(config: TrainConfig, size: Size) -> Run:
    """A run with fresh weights and made-up images, in memory."""
    dataset = made_up_images(size)
    world = World(torch.device(config.device))
    if size.chameleon:
        backbone = shaped(CHAMELEON, 8192, world.device)
        backbone.set_attention(config.model.attention)
        backbone, adapter = put_on(backbone, peft_config(backbone, config.lora), config.seed)
        return assemble(config, Path("."), world, backbone, dataset, None, "", adapter)
    backbone = load_for_training(
        None,
        config.model,
        codebook_KC=torch.zeros(CODES, 8),
        captions=dataset.texts,
        seed=config.seed,
        grid=(size.side, size.side),
        class_names=dataset.manifest.class_names,
    )
    return assemble(config, Path("."), world, backbone, dataset, None, "")


def shaped(config: LlamaConfig, codes: int, device: torch.device) -> Backbone:
    """In random weights, bfloat16; the last ids are codes, the two before them begin and end."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    first = config.vocab_size - codes
    ids = tuple(range(first, config.vocab_size))
    layout = Layout("chameleon", ids, pad=0, begin=first - 2, end=first - 1)
    return CausalLM.assemble(model, fit_text_tokenizer(captions(), 2048), layout)


def made_up_images(size: Size) -> Dataset:
    """Random codes, each with a class or a caption, and a random target."""
    chosen = np.random.default_rng(0)
    codes = 8192 if size.chameleon else CODES
    texts = captions(IMAGES) if size.chameleon else [str(i) for i in range(IMAGES)]
    none = [0.0] * TARGET
    manifest = Manifest(
        splits={"train": SplitInfo(IMAGES, [])},
        tokenizer=TokenizerInfo("", "", 1, codes),
        features={"clip": FeatureInfo(TARGET, "", "", "class", none, [1.0] * TARGET, none)},
        size=size.side,
        crop="none",
        class_names=[] if size.chameleon else [str(number) for number in range(CLASSES)],
    )
    targets = chosen.standard_normal(IMAGES * TARGET, np.float32).astype(np.float16)
    drawn = chosen.integers(0, codes, (IMAGES, size.side**2), np.int32)
    table = pa.table(
        {
            "id": [str(i) for i in range(IMAGES)],
            "sample": [str(i) for i in range(IMAGES)],
            "text": texts,
            "image_index": pa.array([0] * IMAGES, pa.int16()),
            "grid_height": pa.array([size.side] * IMAGES, pa.int16()),
            "grid_width": pa.array([size.side] * IMAGES, pa.int16()),
            "image_ids": pa.array(drawn.tolist(), pa.list_(pa.int32())),
            "feature.clip": pa.FixedSizeListArray.from_arrays(pa.array(targets), TARGET),
        }
    )
    return Dataset(Path("."), "train", manifest, table)


class Ours:
    """`arra train`'s own steps, one a call: batches made ahead, read by the log every 20 steps."""

    def __init__(self, config: TrainConfig, size: Size, until: ExitStack) -> None:
        self.run, self.done = run_of(config, size), 0
        self.tally = Tally(self.run.world)
        until.enter_context(self.run.loader.ahead(config.steps, self.run.world.device))

    def __call__(self) -> None:
        with deterministic(self.run.world.device):
            optimizer_step(self.run, self.done, self.tally)
        self.done += 1
        if self.done % self.run.config.log.every == 0:
            self.run.guard.inspect(self.tally.read())
            self.tally.clear()

    def waited_share(self, seconds: float) -> float:
        """Of `seconds`, how much was spent waiting for batches; counts anew from here."""
        waited, self.run.loader.waited = self.run.loader.waited, 0.0
        return waited / seconds

    def flops(self) -> float:
        """Operations of a step (`ModelFlops`)."""
        shapes = [micro.batch for micro in self.run.loader.step(self.done)]
        return ModelFlops.of(self.run.backbone).total(
            sum(batch.ids_BT.numel() for batch in shapes),
            sum(batch.ids_BT.numel() * batch.ids_BT.shape[1] for batch in shapes),
            sum(batch.trained_N.numel() for batch in shapes),
        )

    def peak_tflops(self) -> float | None:
        """What a GPU's data sheet promises, if it is known."""
        config, device = self.run.config, self.run.world.device
        return peak_tflops(torch.cuda.get_device_name(device), config.dtype)


def require_checkout(folder: Path) -> None:
    """Raises:
    ValueError: the folder is no checkout of LlamaGen.
    """
    if not (folder / "autoregressive/models/gpt.py").is_file():
        raise ValueError(f"--llamagen {folder} is no checkout of FoundationVision/LlamaGen")


def original_apart(
    checkout: Path, batch_size: int, device: torch.device, dtype: str, until: ExitStack
) -> Callable[[], object]:
    """LlamaGen's step in a process of its own, in which nothing is set for ours."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    chosen = (checkout, batch_size, device, dtype, torch.get_num_threads())
    until.enter_context(pool)
    return lambda: pool.submit(_original_step, *chosen).result()


def _original_step(
    checkout: Path, batch_size: int, device: torch.device, dtype: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    timed(original(checkout, batch_size, device, dtype), device)  # waits until it is done


@cache
def original(
    checkout: Path, batch_size: int, device: torch.device, dtype: str
) -> Callable[[], Any]:
    """LlamaGen's GPT-B and one step of its training, on random codes.

    FoundationVision/LlamaGen ce98ec4, autoregressive/train/train_c2i.py: its defaults (AdamW with
    fused=True, 0.9, 0.95, decay 0.05, clip 1, dropouts 0.1, bf16) and its order of calls, without
    DDP and compile.
    """
    sys.path.insert(0, str(checkout))
    try:
        models = importlib.import_module("autoregressive.models.gpt").GPT_models
    finally:
        sys.path.remove(str(checkout))
    torch.manual_seed(0)
    model = models["GPT-B"](vocab_size=CODES, block_size=256, num_classes=CLASSES, cls_token_num=1)
    model.to(device).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    codes_BT = torch.randint(0, CODES, (batch_size, 256), device=device)
    classes_B = torch.randint(0, CLASSES, (batch_size,), device=device)
    half = dtype == "bfloat16"

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            _, loss = model(cond_idx=classes_B, idx=codes_BT[:, :-1], targets=codes_BT)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
