"""Data that has the sizes of the real one and no content: what the planned step is fed with.

Legend: D feature width, K codes.
"""

import dataclasses
import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from arra.data.loader import Loader, MicroBatch
from arra.data.manifest import FeatureInfo, Manifest, SplitInfo, TokenizerInfo
from arra.data.shards import Dataset
from arra.models.base import Backbone, Grid


def captions(count: int = 4000) -> list[str]:
    """Nonsense with enough different pairs of letters for a byte-level BPE of any usual size."""
    chosen = random.Random(0)
    letters = string.ascii_lowercase
    return [" ".join("".join(chosen.choices(letters, k=8)) for _ in range(4)) for _ in range(count)]


def caption_of(tokens: int, backbone: Backbone) -> str:
    """A caption of `tokens` text tokens."""
    text = ""
    for word in captions(max(1, tokens)):
        if len(backbone.text_ids(text)) >= tokens:
            break
        text = f"{text} {word}".strip()
    while text and len(backbone.text_ids(text)) > tokens:
        text = text[:-1]
    return text


def one_image(
    text: str, grid: Grid, codebook_size: int, feature_sizes: Mapping[str, int]
) -> Dataset:
    """A dataset of one image."""
    nothing = {
        name: FeatureInfo(dim, "", "", "class", [0.0] * dim, [0.0] * dim, [0.0] * dim)
        for name, dim in feature_sizes.items()
    }
    manifest = Manifest(
        splits={"train": SplitInfo(1, [])},
        tokenizer=TokenizerInfo("", "", codebook_size, 1),
        features=nothing,
        size=1,
        crop="none",
    )
    codes = np.zeros(grid[0] * grid[1], np.int32)
    features = {name: np.zeros((1, dim), np.float16) for name, dim in feature_sizes.items()}
    return _dataset(manifest, [text], [codes], [grid], features)


def longest_sample(dataset: Dataset, backbone: Backbone) -> Dataset:
    """The sample of a dataset that makes the longest sequence, as a dataset of its own.

    Of the hundred with most codes and letters, the one with most tokens.
    """
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(dataset.samples):
        rows.setdefault(sample, []).append(row)

    def letters(chosen: Sequence[int]) -> tuple[int, int]:
        codes = sum(len(dataset.image_ids[row]) for row in chosen)
        return codes, sum(len(dataset.texts[row]) for row in chosen)

    def tokens(chosen: Sequence[int]) -> tuple[int, int]:
        texts = [dataset.texts[row] for row in chosen]
        return letters(chosen)[0], sum(len(backbone.text_ids(text)) for text in texts if text)

    candidates = sorted(rows.values(), key=letters)[-100:]
    chosen = max(candidates, key=tokens)
    return _dataset(
        dataset.manifest,
        [dataset.texts[row] for row in chosen],
        [dataset.image_ids[row] for row in chosen],
        [tuple(int(n) for n in dataset.grids[row]) for row in chosen],
        {name: values[chosen] for name, values in dataset.features.items()},
    )


def _dataset(
    manifest: Manifest,
    texts: list[str],
    codes: list[np.ndarray],
    grids: Sequence[tuple[int, ...]],
    features: dict[str, np.ndarray],
) -> Dataset:
    count = len(texts)
    table = pa.table(
        {
            "id": [str(i) for i in range(count)],
            "sample": ["one"] * count,
            "text": texts,
            "image_index": pa.array(range(count), pa.int16()),
            "grid_height": pa.array([g[0] for g in grids], pa.int16()),
            "grid_width": pa.array([g[1] for g in grids], pa.int16()),
            "image_ids": pa.array([c.tolist() for c in codes], pa.list_(pa.int32())),
        }
    )
    dataset = Dataset(Path("."), "train", manifest, table)
    dataset.features = features
    return dataset


class Repeated(Loader):
    """The same micro-batches at every step."""

    def __init__(self, micros: Sequence[MicroBatch]) -> None:
        self.micros = list(micros)

    def step(self, step: int) -> list[MicroBatch]:
        return self.micros


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested dataclasses, lists and mappings."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, keep)
    return found


def with_tensors(value: Any, change: Any) -> Any:
    """`value` with `change` applied to every tensor in its nested dataclasses, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list):
        return [with_tensors(inner, change) for inner in value]
    if isinstance(value, Mapping):
        return {key: with_tensors(inner, change) for key, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: with_tensors(v, change) for k, v in fields.items()})
    return value
