"""Which rows make an optimizer step: functions of (seed, step) alone.

Nothing is carried from step to step, so a run resumes anywhere, and any number of ranks may share
the places ("slots") of one global batch.

Legend: N samples, S shards.
"""

from collections.abc import Sequence
from functools import lru_cache
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
