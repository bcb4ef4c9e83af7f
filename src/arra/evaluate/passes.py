"""Once through a set of images: every network sees each picture while it is decoded.

Legend: N images, D feature width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from arra.data.images import square
from arra.data.progress import Meter
from arra.evaluate.collected import Collected
from arra.evaluate.distances import GROUPS
from arra.evaluate.features import Extractor
from arra.evaluate.image_set import ImageSet, Picture
from arra.evaluate.scenes import scene_verdicts, summarise


class Pass(Protocol):
    """What looks at the pictures."""

    def see(self, pictures: Sequence[Picture]) -> None: ...


class FeaturePass:
    """Features under one extractor.

    Args:
        extractor: the network.
        keep: rows kept as they are, for measures that compare rows.
        grouped: keep groups apart, for a jackknife.
    """

    def __init__(self, extractor: Extractor, keep: int, *, grouped: bool = False) -> None:
        self.extractor = extractor
        groups = GROUPS if grouped else 1
        self.streams = {
            name: Collected(dim, keep, groups) for name, dim in extractor.streams.items()
        }

    def see(self, pictures: Sequence[Picture]) -> None:
        """Adds their features."""
        keys_N = np.array([picture.key for picture in pictures], np.uint64)
        features = self.extractor([picture.image for picture in pictures])
        for name, rows_ND in features.items():
            self.streams[name].add(rows_ND, keys_N)


class ScenePass:
    """Scenes read back from their pixels, against their captions."""

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []

    def see(self, pictures: Sequence[Picture]) -> None:
        """Judges them."""
        captions = [picture.caption or "" for picture in pictures]
        self._parts.append(scene_verdicts([picture.image for picture in pictures], captions))

    def summary(self) -> dict[str, Any]:
        """Shares of all pictures so far, with intervals."""
        names = self._parts[0]
        return summarise({n: np.concatenate([part[n] for part in self._parts]) for n in names})


def go_through(images: ImageSet, passes: Iterable[Pass], size: int, batch_size: int) -> np.ndarray:
    """Shows every picture, cropped to a square of `size` pixels, to every pass.

    Returns:
        The pictures' keys (N,) uint64, by index.
    """
    passes = list(passes)
    keys_N = np.zeros(len(images), np.uint64)
    batch: list[Picture] = []

    def flush() -> None:
        for each in passes:
            each.see(batch)
        batch.clear()

    with Meter("measure", len(images)) as meter:
        for picture in images:
            keys_N[picture.index] = picture.key
            batch.append(replace(picture, image=square(picture.image, size)))
            if len(batch) == batch_size:
                flush()
            meter.add(1)
        if batch:
            flush()
    return keys_N
