"""From prepared rows to the micro-batches of one optimizer step.

The order is a function of (seed, step) only (order.py): nothing is carried from step to step, so a
run resumes anywhere, and ranks may take slices of the same global batch.

Legend: E images of a batch, D feature width, n tokens of a caption.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from arra.batch import Batch
from arra.contrastive import Contrast, partners
from arra.data.ahead import Ahead
from arra.data.sequences import PLACEHOLDER, Sequences
from arra.data.split import Captions, Split
from arra.data.targets import TargetValues, stored_targets
from arra.data.views import grids_among
from arra.models.base import Backbone, Grid
from arra.objective import Feature
from arra.text_features import TextFeatures

AHEAD = 2
"""Optimizer steps whose batches are made ahead of use."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes; `rows` are those of the dataset that its images are."""

    batch: Batch
    features: dict[str, Feature]
    text: TextFeatures | None = None  # captions, for a model that is prompted by their features
    rows: tuple[int, ...] = ()
    contrast: Contrast | None = None  # of a loader that contrasts prompts

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same with `change` applied to every tensor."""
        features = {name: feature.mapped(change) for name, feature in self.features.items()}
        text = self.text and self.text.mapped(change)
        contrast = self.contrast and self.contrast.mapped(change)
        return MicroBatch(self.batch.mapped(change), features, text, self.rows, contrast)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`; a GPU fetches it while this goes on."""
        aside = device.type == "cuda"
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=aside))

    def pinned(self) -> "MicroBatch":
        """The same in memory that a GPU can fetch from on its own."""
        return self.mapped(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Drawn:
    """A sample as it is used once: its rows, and whether its prompt is dropped."""

    rows: Sequence[int]
    dropped: bool


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
        predicting: only positions that predict something are used: batches come without the last
            column (`Batch.without_last`), 256 columns of LlamaGen's 257.
        contrasting: batches end with their images once more, behind prompts of other images of the
            same optimizer step (contrastive.py).

    Attributes:
        targets: by name, all that is aligned to.
        num_samples: samples of one epoch, without the views that `prepare --views` added.
        captions: the rows' features, for a backbone that is prompted by such.
        waited: seconds that `step` took since this was last set to 0: what training waits for.

    Raises:
        ValueError: the model is prompted by features of captions that the dataset does not have,
            or cannot take what it is given besides.
    """

    def __init__(
        self,
        dataset: Split,
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
        predicting: bool = False,
        contrasting: bool = False,
    ) -> None:
        self.dataset, self.backbone, self.predicting = dataset, backbone, predicting
        self.contrasting = contrasting
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.rank, self.ranks = rank, ranks
        self.prompt_dropout, self.centred = prompt_dropout, centred
        self.passages, self.text_rows = passages, text_rows
        self._order = dataset.order(seed, batch_size)
        self.num_samples = self._order.num_samples
        self._sequences = Sequences(dataset, backbone, train_text)
        self.captions = self._caption_column() if backbone.text_slots else None
        self._grids: set[Grid] = set()
        self._check_grids(grids_among(dataset.first.grids))
        self._stored, self._online = stored_targets(dataset), dict(online or {})
        self.targets = self._stored | self._online
        self._constants = {name: self._constant(t) for name, t in self.targets.items()}
        if self._order.several:
            self._check_several_images()
        if contrasting and self._order.several:
            raise ValueError(
                "a sample of the dataset has several images, but --objective cca contrasts the "
                "prompts of single ones"
            )
        self._ahead: Ahead[list[MicroBatch]] | None = None
        self.waited = 0.0

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `step` (counted from 0).

        The global batch is cut into ranks x accumulate slices that differ by one sample at most.
        """
        started = time.perf_counter()
        micros = self._ahead.take(step) if self._ahead else self._made(step)
        self.waited += time.perf_counter() - started
        return [self._with_online(micro) for micro in micros]

    @contextmanager
    def ahead(self, end: int, device: torch.device) -> Iterator[None]:
        """Within this, `step` gives what a thread has made ahead, up to step `end` - 1.

        The same batches, in pinned memory if the device is a GPU.
        """

        def made(step: int) -> list[MicroBatch]:
            micros = self._made(step)
            return [micro.pinned() for micro in micros] if device.type == "cuda" else micros

        self._ahead = Ahead(made, end, AHEAD)
        try:
            yield
        finally:
            self._ahead.stop()
            self.dataset.close()  # what the thread waits for
            self._ahead.close()
            self._ahead = None

    def ids(self, step: int) -> list[str]:
        """Ids of this rank's images of step `step`."""
        slots = np.concatenate(self._slices(self.batch_size))
        rows = [row for sample in self._order.rows_at(step, slots) for row in sample]
        return [self.dataset.ids[row] for row in rows]

    def in_order(self, limit: int) -> Iterator[MicroBatch]:
        """This rank's share of the first `limit` samples in the dataset's order, `batch_size` at a
        time and no prompt dropped: for validation."""
        end = min(limit, self.num_samples)
        others = self.others_of(self._order.rows_from(0, end))
        for i in range(self.rank * self.batch_size, end, self.ranks * self.batch_size):
            last = min(i + self.batch_size, end)
            part = self._order.rows_from(i, last)
            micro = self._collate(part, [False] * len(part), [], others[i:last])
            yield self._with_online(micro)

    def spare(self) -> MicroBatch:
        """One image, for a process that has no share but must compute along with the others."""
        (sample,) = self._order.rows_from(0, 1)
        return self._with_online(self._collate([sample], [False], []))

    # ---- for a driver that gathers its batches itself --------------------------------------------

    def at(self, position: int) -> Drawn:
        """The sample in a place of the run: that of step s and slot k is s * batch_size + k."""
        step, slot = divmod(position, self.batch_size)
        (rows,) = self._order.rows_at(step, np.array([slot]))
        return Drawn(rows, bool(self._dropped(step)[slot]))

    def sample(self, index: int, dropped: bool = False) -> Drawn:
        """Sample `index` of those in the dataset's order."""
        (rows,) = self._order.rows_from(index, index + 1)
        return Drawn(rows, dropped)

    def collate(self, samples: Sequence[Drawn]) -> MicroBatch:
        """These samples as what one forward pass takes."""
        rows = [sample.rows for sample in samples]
        return self._with_online(self._collate(rows, [sample.dropped for sample in samples], []))

    # ---- one batch ------------------------------------------------------------------------------

    def _dropped(self, step: int) -> np.ndarray:
        """For each slot of a step, whether its prompt is dropped."""
        generator = np.random.default_rng([self.seed, step])
        return generator.random(self.batch_size) < self.prompt_dropout

    def _slices(self, count: int) -> list[np.ndarray]:
        """This rank's share of `count` slots, micro-batch by micro-batch."""
        parts = np.array_split(np.arange(count), self.ranks * self.accumulate)
        return parts[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]

    def _made(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step but for what an encoder computes on the device. What it
        reads of the loader does not change: it runs in another thread."""
        dropped = self._dropped(step)
        others = self._others_at(step)
        micros = []
        for slots, texts in zip(
            self._slices(self.batch_size), self._slices(self.text_rows), strict=True
        ):
            samples = self._order.rows_at(step, slots)
            passages = [self._passage(step * self.text_rows + int(k)) for k in texts]
            chosen = [others[slot] for slot in slots] if others else []
            micros.append(self._collate(samples, dropped[slots].tolist(), passages, chosen))
        return micros

    def _collate(
        self,
        samples: Sequence[Sequence[int]],
        dropped: Sequence[bool],
        passages: Sequence[str],
        others: Sequence[int] = (),
    ) -> MicroBatch:
        """Args:
        others: of a loader that contrasts, for each sample the row whose prompt it is contrasted
            with; -1 = none.
        """
        rows = [row for sample in samples for row in sample]
        self._check_grids(set(self.dataset.grids_of(rows)) if rows else set())
        contrast, prompts = None, rows
        if self.contrasting:
            assert not passages, "refused by the config"
            contrast, prompts = self._contrast(rows, dropped, others or [-1] * len(rows))
            samples = [*samples, *([rows[i]] for i in contrast.pair_P.tolist())]
            dropped = [*dropped, *[False] * len(contrast.pair_P)]
        batch = self._sequences.batch(samples, dropped, passages, prompts)
        assert batch.num_images == len(prompts)
        batch = batch.without_last() if self.predicting else batch
        features = {
            name: Feature(target.of(rows), *self._constants[name])
            for name, target in self._stored.items()
        }
        text = self._text_features(prompts, dropped)
        return MicroBatch(batch, features, text, tuple(rows), contrast)

    def _contrast(
        self, rows: Sequence[int], dropped: Sequence[bool], others: Sequence[int]
    ) -> tuple[Contrast, list[int]]:
        """Which images come once more, and for every sequence the row of its prompt."""
        without = [d or not p for d, p in zip(dropped, self._prompts_of(rows), strict=True)]
        pairs = [i for i, other in enumerate(others) if other >= 0 and not without[i]]
        contrast = Contrast(torch.where(torch.tensor(without), 2, 1), torch.tensor(pairs).long())
        return contrast, [*rows, *(others[i] for i in pairs)]

    def _others_at(self, step: int) -> list[int]:
        """For each slot of a step, of all ranks, the row whose prompt it is contrasted with."""
        if not self.contrasting:
            return []
        return self.others_of(self._order.rows_at(step, np.arange(self.batch_size)))

    def others_of(self, samples: Sequence[Sequence[int]]) -> list[int]:
        """For each of some samples of one image the row whose prompt it is contrasted with."""
        if not self.contrasting:
            return []
        rows = [row for (row,) in samples]
        return [rows[i] if i >= 0 else -1 for i in partners(self._prompts_of(rows))]

    def _prompts_of(self, rows: Sequence[int]) -> list[str]:
        """What stands before the images of some rows."""
        return [text.partition(PLACEHOLDER)[0].strip() for text in self.dataset.texts_of(rows)]

    def _with_online(self, micro: MicroBatch) -> MicroBatch:
        """Encoders compute in the thread that trains, on the same device and in the same order."""
        if not self._online:
            return micro
        seen = {
            name: Feature(target.of(micro.rows), *self._constants[name])
            for name, target in self._online.items()
        }
        return replace(micro, features=micro.features | seen)

    def _passage(self, index: int) -> str:
        epoch, position = divmod(index, len(self.passages))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.passages))
        return self.passages[order[position]]

    def _text_features(self, rows: Sequence[int], dropped: Sequence[bool]) -> TextFeatures | None:
        """The captions of a batch that has one image a sequence."""
        if self.captions is None:
            return None
        texts = self.dataset.texts  # an empty one is the null caption, as in painting
        captions = [torch.tensor(self.captions[row]) if texts[row] else None for row in rows]
        slots, width = self.backbone.text_slots, self.backbone.text_width
        return TextFeatures.of(captions, dropped, slots, width)

    def _caption_column(self) -> Captions:
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
        if self._order.several:
            raise ValueError(
                "a sample of the dataset has several images, but a model prompted by text features "
                "takes one caption and one image"
            )
        return column

    def _check_grids(self, grids: set[Grid]) -> None:
        """Without row ends and size tokens the same sequence could be of several shapes.

        Raises:
            ValueError: the dataset has several grids, or one that the family cannot take.
        """
        if grids <= self._grids:
            return
        grids, family = self._grids | grids, type(self.backbone).__name__
        if len(grids) > 1 and self.backbone.layout.row_end is None:
            some = ", ".join(f"{height}x{width}" for height, width in sorted(grids)[:3])
            raise ValueError(
                f"the dataset's images have {len(grids)} grids ({some}, ...), but {family} paints "
                f"one grid: prepare the data with --framing crop or pad, or train a family or "
                f"layout that writes an image's size (docs/sources.md)"
            )
        for grid in grids:
            self.backbone.room(grid)
        self._grids = grids

    def _check_several_images(self) -> None:
        """A family that closes each prompt does so for one image; how it writes more is not known.

        Raises:
            ValueError: the rows of one sample cannot stand in one sequence of this family.
        """
        if self._sequences.ending(next(iter(self._grids))):
            raise ValueError(
                f"the dataset has samples of several images, but the prompts of "
                f"{type(self.backbone).__name__} belong to one image each: prepare one image a "
                f"sample, or train a family that takes several"
            )

    def _constant(self, target: TargetValues) -> tuple[torch.Tensor, torch.Tensor]:
        info = target.info
        direction = info.centred_unit_mean if self.centred else info.unit_mean
        return torch.tensor(info.mean), torch.tensor(direction)
