"""From prepared rows to the micro-batches of one optimizer step.

The order is a function of (seed, step) only: nothing is carried from step to step, so a run resumes
anywhere, and ranks may take slices of the same global batch.

Legend: N rows (images), D feature width, E images of a batch, n tokens of a caption.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from arra.data.shards import Dataset
from arra.data.targets import TargetValues, stored_targets
from arra.data.text_column import TextColumn
from arra.data.views import choices_by_sample
from arra.layout import Batch, Image, Sample, Text
from arra.models.base import Backbone
from arra.objective import Feature
from arra.text_features import TextFeatures

PLACEHOLDER = "<image>"
"""Where an image stands within its row's text; without it the image follows the text."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes."""

    batch: Batch
    features: dict[str, Feature]
    text: TextFeatures | None = None  # captions, for a model that is prompted by their features

    def to(self, device: torch.device) -> "MicroBatch":
        features = {name: feature.to(device) for name, feature in self.features.items()}
        text = self.text and self.text.to(device)
        return MicroBatch(self.batch.to(device), features, text)


@dataclass(frozen=True)
class Drawn:
    """A sample as it is used once."""

    rows: Sequence[int]  # its own, or those of one of its views
    dropped: bool  # whether its prompt is


class Loader:
    """Rows of a prepared dataset as micro-batches for one backbone.

    Args:
        dataset: one split; its `features` and `patch_features` are those that are aligned to.
        batch_size: samples per optimizer step, of all ranks together.
        accumulate: micro-batches per optimizer step on each rank.
        rank, ranks: which slices of the global batch are made, and of how many.
        centred: whether the constant answer is that of centred features.
        passages: plain text that is mixed in, `text_rows` of them per step.
        online: further targets, which the dataset does not hold.

    Attributes:
        targets: by name, all that is aligned to.
        samples: rows of each sample, without the views that `prepare --views` added.
        captions: the rows' features, for a backbone that is prompted by such.

    Raises:
        ValueError: the model is prompted by features of captions that the dataset does not have,
            or cannot take what it is given besides.
    """

    def __init__(
        self,
        dataset: Dataset,
        backbone: Backbone,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        ranks: int = 1,
        seed: int,
        prompt_dropout: float = 0.0,
        train_text: bool = False,
        centred: bool = False,
        passages: Sequence[str] = (),
        text_rows: int = 0,
        online: Mapping[str, TargetValues] | None = None,
    ) -> None:
        self.dataset, self.backbone = dataset, backbone
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.rank, self.ranks = rank, ranks
        self.prompt_dropout, self.train_text, self.centred = prompt_dropout, train_text, centred
        self.passages, self.text_rows = passages, text_rows
        self._choices = choices_by_sample(dataset.ids, dataset.samples, dataset.view_of)
        self.samples: list[list[int]] = [own for own, *_ in self._choices]
        if not self.samples:
            raise ValueError(f"the dataset's split {dataset.split!r} has no rows to train on")
        self.captions = self._caption_column() if backbone.text_slots else None
        self._order = lru_cache(maxsize=2)(self._shuffled)
        self._draws = lru_cache(maxsize=2)(self._drawn)
        self._dropped = lru_cache(maxsize=2)(self._chance)
        self._check_grids()
        self._ending = lru_cache(maxsize=64)(lambda grid: len(backbone.wrapping(grid)[1]))
        self.targets = stored_targets(dataset) | dict(online or {})
        self._constants = {name: self._constant(t) for name, t in self.targets.items()}
        if max(map(len, self.samples)) > 1:
            self._check_several_images()

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `step` (counted from 0).

        The global batch is cut into ranks x accumulate slices that differ by one sample at most.
        """
        parts = self.ranks * self.accumulate
        first = step * self.batch_size
        slices = np.array_split(np.arange(first, first + self.batch_size), parts)
        texts = np.array_split(np.arange(self.text_rows) + step * self.text_rows, parts)
        return [
            self.collate([self.at(int(position)) for position in part], passages)
            for part, passages in list(zip(slices, texts, strict=True))[self._own]
        ]

    def ids(self, step: int) -> list[str]:
        """Ids of this rank's images of step `step`."""
        slices = np.array_split(np.arange(self.batch_size), self.ranks * self.accumulate)
        places = step * self.batch_size + np.concatenate(slices[self._own])
        return [self.dataset.ids[row] for place in places for row in self.at(int(place)).rows]

    def at(self, position: int) -> Drawn:
        """The sample at a position of the run: that of step s and place k is s * batch_size + k."""
        step, place = divmod(position, self.batch_size)
        return Drawn(self._sample_at(position), bool(self._dropped(step)[place]))

    def draw(self, index: int, view: float, prompt: float) -> Drawn:
        """Sample `index` of `samples`, for a driver with an order of its own.

        Args:
            view, prompt: uniform in [0, 1): which view is used, and whether the prompt is dropped.
        """
        choices = self._choices[index]
        return Drawn(choices[int(view * len(choices))], prompt < self.prompt_dropout)

    @property
    def _own(self) -> slice:
        return slice(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)

    def in_order(self, limit: int) -> Iterator[MicroBatch]:
        """This rank's share of the first `limit` samples in the dataset's order, `batch_size` at a
        time and no prompt dropped: for validation."""
        samples = self.samples[:limit]
        for i in range(self.rank * self.batch_size, len(samples), self.ranks * self.batch_size):
            yield self.collate([Drawn(rows, False) for rows in samples[i : i + self.batch_size]])

    # ---- one batch ------------------------------------------------------------------------------

    def collate(
        self, samples: Sequence[Drawn], texts: Sequence[int] | np.ndarray = ()
    ) -> MicroBatch:
        """These samples, and these of the passages of plain text, as what one forward takes."""
        rows = [self._lay_out(sample.rows, sample.dropped) for sample in samples]
        rows += [self._passage(int(i)) for i in texts]
        batch = self.backbone.layout.collate(rows)
        indices = [row for sample in samples for row in sample.rows]
        features = {
            name: Feature(target.of(indices), *self._constants[name])
            for name, target in self.targets.items()
        }
        assert batch.num_images == len(indices)
        dropped = [sample.dropped for sample in samples]
        return MicroBatch(batch, features, self._text_features(indices, dropped))

    def _text_features(self, rows: Sequence[int], dropped: Sequence[bool]) -> TextFeatures | None:
        """The captions of a batch that has one image a sequence."""
        if self.captions is None:
            return None
        texts = self.dataset.texts  # an empty one is the null caption, as in painting
        captions = [torch.tensor(self.captions[row]) if texts[row] else None for row in rows]
        slots, width = self.backbone.text_slots, self.backbone.text_width
        return TextFeatures.of(captions, dropped, slots, width)

    def _caption_column(self) -> TextColumn:
        """The one text encoder's features; checks that they fit the model and the samples."""
        columns, width = self.dataset.text_features, self.backbone.text_width
        if len(columns) != 1:
            raise ValueError(
                f"the model is prompted by a text encoder's features of captions, but the dataset "
                f"has {'none' if not columns else 'several: ' + ', '.join(columns)}: prepare it "
                f"with --text-encoder (one that gives {width} values a token)"
            )
        (column,) = columns.values()
        if column.dim != width:
            raise ValueError(
                f"the dataset's text features {column.name!r} have {column.dim} values a token, "
                f"the model takes {width}: prepare the data with --text-encoder, the model's own"
            )
        if self.passages:
            raise ValueError("--data.text: a model prompted by text features reads no plain text")
        if any(len(rows) > 1 for rows in self.samples):
            raise ValueError(
                "a sample of the dataset has several images, but a model prompted by text features "
                "takes one caption and one image"
            )
        return column

    def _lay_out(self, rows: Sequence[int], dropped: bool) -> Sample:
        segments: list[Text | Image] = []
        for row in rows:
            height, width = (int(side) for side in self.dataset.grids[row])
            image = Image(tuple(self.dataset.image_ids[row].tolist()), height, width)
            before, _, after = self.dataset.texts[row].partition(PLACEHOLDER)
            after = after if self.captions is None else ""  # the whole caption is in its features
            grid = (height, width)
            condition = [] if segments else self.backbone.condition(before, grid)
            if dropped:
                condition = condition and self.backbone.without_prompt(condition, grid)
                before = after = ""
            ending = min(len(condition), self._ending(grid))
            prompt = self._text(before) if segments else Text(tuple(condition), ending)
            segments += [prompt, image, self._text(after)]
        return self.backbone.layout.sample(
            [s for s in segments if isinstance(s, Image) or s.ids],
            max_length=self.backbone.max_length,
            train_text=self.train_text,
        )

    def _check_grids(self) -> None:
        """Without row ends and size tokens the same sequence could be of several shapes.

        Raises:
            ValueError: the dataset has several grids, or one that the family cannot take.
        """
        grids = sorted({(int(height), int(width)) for height, width in self.dataset.grids})
        family = type(self.backbone).__name__
        if len(grids) > 1 and self.backbone.layout.row_end is None:
            some = ", ".join(f"{height}x{width}" for height, width in grids[:3])
            raise ValueError(
                f"the dataset's images have {len(grids)} grids ({some}, ...), but {family} paints "
                f"one grid: prepare the data with --framing crop or pad, or train a family or "
                f"layout that writes an image's size (docs/sources.md)"
            )
        for grid in grids:
            self.backbone.room(grid)

    def _check_several_images(self) -> None:
        """A family that closes each prompt does so for one image; how it writes more is not known.

        Raises:
            ValueError: the rows of one sample cannot stand in one sequence of this family.
        """
        height, width = (int(side) for side in self.dataset.grids[0])
        if self._ending((height, width)):
            raise ValueError(
                f"the dataset has samples of several images, but the prompts of "
                f"{type(self.backbone).__name__} belong to one image each: prepare one image a "
                f"sample, or train a family that takes several"
            )

    def _text(self, text: str) -> Text:
        return Text(tuple(self.backbone.text_ids(text)) if text else ())

    def _passage(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self.passages))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.passages))
        passage = self.passages[order[position]]
        ids = [*self.backbone.opening(), *self.backbone.text_ids(passage)]
        return self.backbone.layout.sample(
            [Text(tuple(ids))], max_length=self.backbone.max_length, train_text=True
        )

    # ---- order and constants --------------------------------------------------------------------

    def _sample_at(self, index: int) -> Sequence[int]:
        """Of a sample with views one is drawn, its own rows among them, as LlamaGen does."""
        epoch, position = divmod(index, len(self.samples))
        return self.draw(self._order(epoch)[position], self._draws(epoch)[position], 1.0).rows

    def _chance(self, step: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, step])
        return generator.random(self.batch_size) < self.prompt_dropout

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.samples))

    def _drawn(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 2, epoch]).random(len(self.samples))

    def _constant(self, target: TargetValues) -> tuple[torch.Tensor, torch.Tensor]:
        info = target.info
        direction = info.centred_unit_mean if self.centred else info.unit_mean
        return torch.tensor(info.mean), torch.tensor(direction)
