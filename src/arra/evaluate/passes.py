"""Once through a set of images: every network sees each picture while it is decoded.

Legend: N images, D feature width.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from arra.data.builtin import parse
from arra.data.images import square
from arra.data.progress import Meter
from arra.evaluate.collected import Collected
from arra.evaluate.features import Extractor, finite
from arra.evaluate.finding import Finding
from arra.evaluate.image_set import ImageSet, Picture
from arra.evaluate.inception_network import LOGITS
from arra.evaluate.inception_score import StreamedInceptionScore
from arra.evaluate.intervals import bootstrap_mean
from arra.evaluate.scenes import scene_verdicts


class Pass(Protocol):
    """What looks at the pictures."""

    def see(self, pictures: Sequence[Picture]) -> None: ...


class Judge(Pass, Protocol):
    """What has an answer about each picture, and from these a value of the set.

    Attributes:
        described: by the key of its value, what a report must say of the network that judges.
    """

    @property
    def described(self) -> Mapping[str, Mapping[str, Any]]: ...

    def findings(self) -> dict[str, Finding]: ...

    def scores(self) -> dict[str, np.ndarray]: ...


class FeaturePass:
    """Features under one extractor.

    Args:
        extractor: the network.
        keep: the streams that are looked at, of those that it has, each with how many rows are
            kept as they are, for measures that compare rows.
        seeds: whose pictures are also looked at apart; together they keep no more rows.

    Attributes:
        streams: what is kept of each; of logits nothing but the Inception Score's sums.
        classified: these, where logits are looked at.
        by_seed: the same of each seed's pictures.
    """

    def __init__(
        self, extractor: Extractor, keep: Mapping[str, int], seeds: Collection[int] = ()
    ) -> None:
        self.extractor = extractor
        seen = {name: dim for name, dim in extractor.streams.items() if name in keep}
        classes = seen.pop(LOGITS, None)
        self.streams = {name: Collected(dim, keep[name]) for name, dim in seen.items()}
        self.classified = None if classes is None else StreamedInceptionScore(classes)
        part = {name: -(-rows // max(len(seeds), 1)) for name, rows in keep.items()}
        self.by_seed = {seed: FeaturePass(extractor, part) for seed in seeds}

    def see(self, pictures: Sequence[Picture]) -> None:
        """Adds their features."""
        if not self.streams and self.classified is None:
            return
        keys_N = np.array([picture.key for picture in pictures], np.uint64)
        names = [picture.name for picture in pictures]
        rows = {
            name: finite(each, names, self.extractor.name)
            for name, each in self.extractor([picture.image for picture in pictures]).items()
        }
        self._add(rows, keys_N)
        run_N = np.array([picture.run for picture in pictures])
        for seed, part in self.by_seed.items():
            mine_N = run_N == seed
            if mine_N.any():
                part._add({name: each[mine_N] for name, each in rows.items()}, keys_N[mine_N])

    def _add(self, rows: Mapping[str, np.ndarray], keys_N: np.ndarray) -> None:
        for name, collected in self.streams.items():
            collected.add(rows[name], keys_N)
        if self.classified is not None:
            self.classified.add(rows[LOGITS], keys_N)


class ScenePass:
    """Scenes read back from their pixels, against their captions.

    Args:
        captions: of the whole set, so that one that nobody can judge is told before a long look.

    Raises:
        ValueError: a caption outside the scenes' grammar.
    """

    described: Mapping[str, Mapping[str, Any]] = {}

    def __init__(self, captions: Sequence[str]) -> None:
        for caption in dict.fromkeys(captions):
            parse(caption)
        self._parts: list[dict[str, np.ndarray]] = []
        self._indices: list[int] = []
        self._keys: list[int] = []

    def see(self, pictures: Sequence[Picture]) -> None:
        """Judges them."""
        captions = [picture.caption or "" for picture in pictures]
        self._indices += [picture.index for picture in pictures]
        self._keys += [picture.key for picture in pictures]
        self._parts.append(scene_verdicts([picture.image for picture in pictures], captions))

    def findings(self) -> dict[str, Finding]:
        """{"scenes": the share of pictures that are all right, "scenes/shape": ..., ...}"""
        found = {}
        for name, values_N in self._verdicts(self._keys).items():  # resampling depends on order
            answered = int((~np.isnan(values_N)).sum())
            interval = bootstrap_mean(values_N, proportion=name != "scenes/fragments")
            found[name] = (
                Finding(None, answered, reason="no caption says anything about it")
                if interval is None
                else Finding(
                    interval.mean, interval.n, interval.low, interval.high, "bootstrap over images"
                )
            )
        return found

    def scores(self) -> dict[str, np.ndarray]:
        """Verdict (N,) of each picture by index: 1 right, 0 wrong, NaN not asked for."""
        return self._verdicts(self._indices)  # pictures come in any order

    def _verdicts(self, rising: Sequence[int]) -> dict[str, np.ndarray]:
        order_N = np.argsort(np.array(rising, np.uint64), kind="stable")
        names = sorted(self._parts[0], key=lambda name: name != "all_right")
        return {
            "scenes" if name == "all_right" else f"scenes/{name}": np.concatenate(
                [part[name] for part in self._parts]
            )[order_N]
            for name in names
        }


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
