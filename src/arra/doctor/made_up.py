"""Data that has the sizes of the real one and no content: what the planned step is fed with.

Legend: D feature width, K codes.
"""

import dataclasses
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from arra.config import TrainConfig
from arra.data.grid_column import GridColumn, GridFormat
from arra.data.loader import Loader, MicroBatch
from arra.data.manifest import (
    FeatureInfo,
    Manifest,
    SplitInfo,
    TextFeatureInfo,
    TokenizerInfo,
)
from arra.data.shards import Dataset
from arra.data.text_column import TextColumn
from arra.data.views import rows_by_sample
from arra.image_tokenizers import load_image_tokenizer
from arra.models.base import Backbone, Grid
from arra.models.outline import ASSUMED_CODES


@dataclass(frozen=True)
class Material:
    """What a plan is fed with: a prepared dataset, or assumptions about one.

    Attributes:
        dataset: its training split; None = assume what follows.
        grid: codes of an image; None = the model's own, or 16 x 16, or 8 x 8 for a model that is
            too short for that.
        codebook_size: K; None = the model's own, or 16384, or 512 for a model as short as that.
        prompt_tokens: of every caption.
        feature_size: D of the one feature that is aligned to.
        classes: of the dataset; 0 = prompts are captions.
    """

    dataset: Dataset | None = None
    grid: Grid | None = None
    codebook_size: int | None = None
    prompt_tokens: int = 64
    feature_size: int = 512
    classes: int = 0

    @property
    def captions(self) -> list[str]:
        """What a fresh model's text tokenizer is fitted on."""
        return captions() if self.dataset is None else self.dataset.texts

    @property
    def class_names(self) -> list[str]:
        """The classes of a dataset that has some, or as many as are assumed."""
        if self.dataset is None:
            return [f"class {number}" for number in range(self.classes)]
        return self.dataset.manifest.class_names

    @property
    def text_features(self) -> list[TextFeatureInfo]:
        """What a dataset knows of its features of captions, if it has any."""
        return [] if self.dataset is None else [*self.dataset.manifest.text_features.values()]

    def sample(self, backbone: Backbone, names: Sequence[str]) -> Dataset:
        """The longest sample, as a dataset of its own.

        Args:
            names: of the features that are aligned to.
        """
        if self.dataset is not None:
            made = _longest_sample(self.dataset, backbone)
            widths = {name: c.dim for name, c in self.dataset.text_features.items()}
        else:
            grid = self.grid or default_grid(backbone)
            text = _caption_of(self.prompt_tokens, backbone)
            made = one_image(text, grid, dict.fromkeys(names, self.feature_size))
            widths = {"assumed": backbone.text_width} if backbone.text_slots else {}
        made.text_features = {
            name: _Slots(name, width, backbone.text_slots) for name, width in widths.items()
        }
        return made


SMALL_GRID, USUAL_GRID = (8, 8), (16, 16)
SMALL_CODEBOOK = 512
"""Codes of the bundled tokenizer of drawn scenes, for models too short for the usual images."""


def default_grid(backbone: Backbone) -> Grid:
    """The images that a model paints if nothing says otherwise."""
    if backbone.default_grid is not None:
        return backbone.default_grid
    fits = backbone.layout.image_length(*USUAL_GRID) < backbone.max_length
    return USUAL_GRID if fits else SMALL_GRID


def default_codebook(config: TrainConfig) -> int | None:
    """Codes of the image tokenizer, if nothing says how many; None = a painter's own."""
    if config.image_tokenizer is not None:
        return load_image_tokenizer(config.image_tokenizer).codebook_size
    if config.model_path is None:
        short = config.model.max_length < USUAL_GRID[0] * USUAL_GRID[1] + 64
        return SMALL_CODEBOOK if short else ASSUMED_CODES
    return None


def captions(count: int = 4000) -> list[str]:
    """Nonsense with enough different pairs of letters for a byte-level BPE of any usual size."""
    chosen = random.Random(0)
    letters = string.ascii_lowercase
    return [" ".join("".join(chosen.choices(letters, k=8)) for _ in range(4)) for _ in range(count)]


def _caption_of(tokens: int, backbone: Backbone) -> str:
    """A caption of `tokens` text tokens; a class, where prompts are such."""
    if backbone.text_tokenizer is None:
        return "" if backbone.text_slots else "0"
    text = ""
    for word in captions(max(1, tokens)):
        if len(backbone.text_ids(text)) >= tokens:
            break
        text = f"{text} {word}".strip()
    while text and len(backbone.text_ids(text)) > tokens:
        text = text[:-1]
    return text


def one_image(text: str, grid: Grid, feature_sizes: Mapping[str, int]) -> Dataset:
    """A dataset of one image."""
    nothing = {
        name: FeatureInfo(dim, "", "", "class", [0.0] * dim, [0.0] * dim, [0.0] * dim)
        for name, dim in feature_sizes.items()
    }
    manifest = Manifest(
        splits={"train": SplitInfo(1, [])},
        tokenizer=TokenizerInfo("", "", 1, 1),
        features=nothing,
        size=1,
        crop="none",
    )
    codes = np.zeros(grid[0] * grid[1], np.int32)
    features = {name: np.zeros((1, dim), np.float16) for name, dim in feature_sizes.items()}
    return _dataset(manifest, [text], [codes], [grid], features)


def _longest_sample(dataset: Dataset, backbone: Backbone) -> Dataset:
    """Of the hundred samples with most codes and letters, the one with most tokens."""
    samples = rows_by_sample(dataset.samples, dataset.view_of)

    def letters(chosen: Sequence[int]) -> tuple[int, int]:
        codes = sum(len(dataset.image_ids[row]) for row in chosen)
        return codes, sum(len(dataset.texts[row]) for row in chosen)

    def tokens(chosen: Sequence[int]) -> tuple[int, int]:
        texts = [dataset.texts[row] for row in chosen]
        return letters(chosen)[0], sum(len(backbone.text_ids(text)) for text in texts if text)

    candidates = sorted(samples, key=letters)[-100:]
    chosen = candidates[-1] if backbone.text_tokenizer is None else max(candidates, key=tokens)
    made = _dataset(
        dataset.manifest,
        [dataset.texts[row] for row in chosen],
        [dataset.image_ids[row] for row in chosen],
        [tuple(int(n) for n in dataset.grids[row]) for row in chosen],
        {name: values[chosen] for name, values in dataset.features.items()},
    )
    made.patch_features = {
        name: _Cells(name, column.form, [column[row] for row in chosen])
        for name, column in dataset.patch_features.items()
    }
    return made


class _Cells(GridColumn):
    """The grids of a few rows, in memory."""

    def __init__(self, name: str, form: GridFormat, cells: list[Tensor]) -> None:
        self.name, self.form, self._cells = name, form, cells

    def __getitem__(self, row: int) -> Tensor:
        return self._cells[row]


class _Slots(TextColumn):
    """Caption features that fill every slot."""

    def __init__(self, name: str, dim: int, slots: int) -> None:
        self.name, self.dim, self._values = name, dim, np.zeros((slots, dim), np.float16)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values


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
    unread = dataclasses.replace(manifest, splits={"train": SplitInfo(count, [])})
    dataset = Dataset(Path("."), "train", unread, table)
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
    """`value` with `change` applied to every tensor in nested dataclasses, lists and mappings."""
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
