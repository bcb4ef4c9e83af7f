"""Which rows make an optimizer step: functions of (seed, step) alone.

Nothing is carried from step to step, so a run resumes anywhere, and any number of ranks may share
the places ("slots") of one global batch.

Legend: N samples, S shards.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Protocol

import numpy as np

from arra.data.views import EachAlone


class Order(Protocol):
    """The order of one split.

    Attributes:
        num_samples: samples of one epoch.
        several: whether there are samples of several images.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def several(self) -> bool: ...

    def rows_at(self, step: int, slots: np.ndarray) -> list[Sequence[int]]:
        """The rows of the samples in some slots (0 .. batch size - 1) of step `step`."""
        ...

    def rows_from(self, start: int, stop: int) -> list[Sequence[int]]:
        """The rows of samples start .. stop-1 as they lie in the dataset."""
        ...


class Shuffled:
    """A dataset in memory: each epoch is one permutation of all its samples.

    Args:
        choices: for each sample what may be shown (views.py); the first are its own rows.
        seed: of order and choice.
        batch_size: of all ranks together.
    """

    def __init__(
        self, choices: Sequence[Sequence[Sequence[int]]], seed: int, batch_size: int
    ) -> None:
        self._choices, self._seed, self._batch_size = choices, seed, batch_size
        self._permuted = lru_cache(maxsize=2)(self._shuffled)
        self._draws = lru_cache(maxsize=2)(self._drawn)

    @property
    def num_samples(self) -> int:
        return len(self._choices)

    @property
    def several(self) -> bool:
        alone = isinstance(self._choices, EachAlone)
        return not alone and any(len(own) > 1 for own, *_ in self._choices)

    def rows_at(self, step: int, slots: np.ndarray) -> list[Sequence[int]]:
        """Of a sample with views one is drawn, its own rows among them, as LlamaGen does."""
        epochs, positions = np.divmod(step * self._batch_size + slots, self.num_samples)
        rows: list[Sequence[int]] = []
        for epoch, position in zip(epochs.tolist(), positions.tolist(), strict=True):
            choices = self._choices[self._permuted(epoch)[position]]
            first = choices[0]
            if len(choices) > 1:
                first = choices[int(self._draws(epoch)[position] * len(choices))]
            rows.append(first)
        return rows

    def rows_from(self, start: int, stop: int) -> list[Sequence[int]]:
        return [self._choices[i][0] for i in range(start, min(stop, self.num_samples))]

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(self.num_samples)

    def _drawn(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 2, epoch]).random(self.num_samples)


@dataclass(frozen=True)
class Place:
    """Where a sample is.

    Attributes:
        shard: its number within the split.
        position: of the sample within the shard, views not counted.
        draw: from [0, 1), chooses one of the sample's views.
    """

    shard: int
    position: int
    draw: float


@dataclass(frozen=True)
class _Window:
    """Part of a lane whose samples are shuffled with one another: places start .. stop-1 of the
    epoch's row of samples, in shards `pieces` of its row of shards."""

    epoch: int
    number: int
    start: int
    stop: int
    pieces: range


class Lanes:
    """The order of a split that is read shard by shard.

    An epoch is a permutation of the shards, drawn from (seed, epoch). Their samples, one shard
    after the other, are cut into L equal lanes; lane l feeds B/L slots of every batch, so that
    whoever makes these slots reads one L-th of the data. A lane's shards are taken `window` at a
    time, and the samples of a window are shuffled. No lane waits for another, none ends early: a
    lane of n samples is in its epoch e from its place e n on.

    Args:
        counts: samples of each shard; views are not counted.
        batch_size: B, of all ranks together; a multiple of `lanes`.
        lanes: L.
        window: shards that are mixed.

    Raises:
        ValueError: there are more lanes than samples, or B is no multiple of L.
    """

    def __init__(
        self, counts: Sequence[int], *, seed: int, batch_size: int, lanes: int, window: int
    ) -> None:
        self.counts, self._counts_S = list(counts), np.array(counts, dtype=np.int64)
        self._seed, self._batch_size, self.window = seed, batch_size, window
        self._lanes = lanes
        self.num_samples = int(self._counts_S.sum())
        if batch_size % lanes:
            raise ValueError(
                f"--batch-size {batch_size} is no multiple of --data.lanes {lanes}: each lane "
                f"feeds as many images to every batch"
            )
        if self.num_samples < lanes:
            raise ValueError(
                f"--data.lanes {lanes} are more than the {self.num_samples} samples of the "
                f"dataset: choose fewer"
            )
        self._epoch = lru_cache(maxsize=4)(self._shuffled)
        self._mixed = lru_cache(maxsize=4 * lanes)(self._mixed_window)

    def at(self, step: int, slots: np.ndarray) -> list[Place]:
        """Where the samples in some slots of a step are."""
        places = []
        of, window = -1, _Window(-1, 0, 0, 0, range(0))
        for slot in slots.tolist():
            lane, epoch, place = self._found(step, slot)
            same = (of, window.epoch) == (lane, epoch)
            if not same or not window.start <= place < window.stop:
                of, window = lane, self._window(lane, epoch, place)
                mixed, draws = self._mixed(lane, window)
            inside = place - window.start
            shards, ends = self._epoch(epoch)
            sample = window.start + int(mixed[inside])
            piece = bisect_right(ends, sample)
            shard = shards[piece]
            first = ends[piece] - self.counts[shard]
            places.append(Place(shard, sample - first, float(draws[inside])))
        return places

    def shards_after(self, step: int, slots: np.ndarray) -> list[int]:
        """The shards of the windows that follow those of some slots, in the order of their need."""
        lanes = {self._found(step, slot)[0]: slot for slot in slots.tolist()}
        found: list[list[int]] = []
        for lane, slot in lanes.items():
            _, epoch, place = self._found(step, slot)
            following = self._window(lane, epoch, place).stop
            begin, end = self._range(lane)
            if following == end:
                epoch, following = epoch + 1, begin
            pieces = self._window(lane, epoch, following).pieces
            found.append(self._epoch(epoch)[0][pieces.start : pieces.stop])
        return [shard for each in zip_longest(*found) for shard in each if shard is not None]

    def feeding(self, slots: np.ndarray) -> set[int]:
        """The lanes that feed some slots."""
        return {self._found(0, slot)[0] for slot in slots.tolist()}

    def _found(self, step: int, slot: int) -> tuple[int, int, int]:
        """(lane, epoch, place within the epoch's row of samples)."""
        share = self._batch_size // self._lanes
        lane, within = divmod(slot, share)
        begin, end = self._range(lane)
        epoch, place = divmod(step * share + within, end - begin)
        return lane, epoch, begin + place

    def _range(self, lane: int) -> tuple[int, int]:
        total = self.num_samples
        return total * lane // self._lanes, total * (lane + 1) // self._lanes

    def _window(self, lane: int, epoch: int, place: int) -> _Window:
        ends = self._epoch(epoch)[1]
        begin, end = self._range(lane)
        first, here, last = (bisect_right(ends, each) for each in (begin, place, end - 1))
        number = (here - first) // self.window
        pieces = range(
            first + number * self.window, min(first + (number + 1) * self.window, last + 1)
        )
        start = max(begin, ends[pieces.start - 1]) if pieces.start else begin
        return _Window(epoch, number, start, min(end, ends[pieces.stop - 1]), pieces)

    def _shuffled(self, epoch: int) -> tuple[list[int], list[int]]:
        """The epoch's row of shards, and where each ends in its row of samples."""
        random = np.random.default_rng([self._seed, 0, epoch])
        shards = random.permutation(len(self._counts_S))
        return shards.tolist(), np.cumsum(self._counts_S[shards]).tolist()

    def _mixed_window(self, lane: int, window: _Window) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([self._seed, 3, window.epoch, lane, window.number])
        count = window.stop - window.start
        return random.permutation(count), random.random(count)
