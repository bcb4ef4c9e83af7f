"""Does a generator copy its training pictures? Each picture's nearest one, by features and pixels.

A picture near a training picture is no copy by itself: real pictures have near ones too. What is
near is said by real pictures that were not trained on: 1 % of them are closer to a training picture
than the threshold. A generator that copies nothing has about as many there, or fewer.

Legend: M generated, N held-out and T training pictures, n of a batch, D feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arra.data.images import square
from arra.evaluate.features import FEATURES, Extractor, finite
from arra.evaluate.finding import Finding
from arra.evaluate.gallery import Gallery
from arra.evaluate.image_set import ImageSet, Picture, digest_of, key_of
from arra.evaluate.intervals import bootstrap_mean
from arra.evaluate.nearest import Nearest
from arra.evaluate.passes import go_through
from arra.pages.sheet import Cell

PERCENTILE = 1.0
"""Of held-out pictures that are closer to a training picture than the threshold."""
FEWEST = 100
"""Held-out pictures below which their first percentile is not known."""
SHOWN = 24
EXACT = "exact_copies"


@dataclass
class _Seen:
    """Pictures and their features. Keys are of the pixels as they were measured, cropped."""

    extractor: Extractor
    indices: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)

    def see(self, pictures: Sequence[Picture]) -> None:
        self.indices += [picture.index for picture in pictures]
        self.keys += _keys(pictures)
        self.parts.append(_features(self.extractor, pictures))

    @property
    def rows_MD(self) -> np.ndarray:
        return np.concatenate(self.parts)


class _Training:
    """Training pictures going past: compared, and forgotten."""

    def __init__(self, extractor: Extractor, queries: Sequence[_Seen]) -> None:
        self.extractor, self.keys = extractor, set[int]()
        self.nearest = [Nearest(each.rows_MD) for each in queries]

    def see(self, pictures: Sequence[Picture]) -> None:
        keys = _keys(pictures)
        self.keys.update(keys)
        rows_nD = _features(self.extractor, pictures)
        number_n = np.array([picture.index for picture in pictures], np.int64)
        for each in self.nearest:
            each.add(rows_nD, number_n, np.array(keys, np.uint64))


class CopiesPass:
    """Looks for training pictures among generated ones.

    Args:
        extractor: its features say what is near.
        generated, training: the sets.
        held_out: real pictures that were not trained on; None where there are none.
        size: pixels that pictures are cropped to.
        batch_size: training pictures at a time.
    """

    def __init__(
        self,
        extractor: Extractor,
        generated: ImageSet,
        training: ImageSet,
        held_out: ImageSet | None,
        size: int,
        batch_size: int,
    ) -> None:
        self._generated, self._training, self._held_out = generated, training, held_out
        self._size, self._batch_size = size, batch_size
        self._extractor, self._seen = extractor, _Seen(extractor)
        self._compared: _Compared | None = None
        self._key = f"copies@{extractor.name}"
        of_training = training.described()
        said = {"training": {name: of_training[name] for name in ("source", "n", "sha256")}}
        self.described: dict[str, dict[str, Any]] = {self._key: extractor.described | said}

    def see(self, pictures: Sequence[Picture]) -> None:
        """Keeps their features."""
        self._seen.see(pictures)

    def findings(self) -> dict[str, Finding]:
        """`copies@NAME`: the share of generated pictures closer to a training picture than all but
        1 % of held-out ones; `exact_copies`: the share that are training pictures to the pixel."""
        found = self._compare()
        exact = bootstrap_mean(found.exact_M[found.order_M], proportion=True)
        assert exact is not None
        method = "bootstrap over images"
        details = {"exact": int(found.exact_M.sum()), "training": len(self._training)}
        return {
            self._key: share_closer(
                found.distance_M[found.order_M],
                found.held_out_N,
                in_training=found.in_training,
                same_set=self._held_out is None,
            ),
            EXACT: Finding(exact.mean, exact.n, exact.low, exact.high, method, details=details),
        }

    def scores(self) -> dict[str, np.ndarray]:
        """Distance (M,) of each picture to its nearest training picture, by index."""
        return {f"nearest_training@{self._extractor.name}": self._compare().distance_M}

    def gallery(self) -> Gallery:
        """The generated pictures nearest to a training picture, beside it, the nearest first."""
        found = self._compare()
        nearest = np.argsort(found.distance_M, kind="stable")[:SHOWN].tolist()
        own = self._generated.at(nearest)
        others = self._training.at([int(found.number_M[index]) for index in nearest])
        cells = []
        for index, mine, other in zip(nearest, own, others, strict=True):
            pictures = (square(mine.image, self._size), square(other.image, self._size))
            same = ", the same pixels" if found.exact_M[index] else ""
            said = f"distance {found.distance_M[index]:.4g}{same}"
            cells.append(Cell(pictures, (mine.name, f"training: {other.name}"), said))
        note = (
            f"The {len(cells)} of {len(found.distance_M):,} generated pictures that are nearest to "
            f"one of {len(self._training):,} training pictures, by {self._extractor.name}."
        )
        limit = threshold(found.held_out_N)
        if limit is not None:
            note += f" 1 % of held-out real pictures are closer than {limit:.4g}."
        name = "copies-" + "".join(c if c.isalnum() else "-" for c in self._extractor.name)
        return Gallery(name, "Nearest training pictures", note, "", cells)

    def _compare(self) -> "_Compared":
        if self._compared is None:
            held_out = _Seen(self._extractor)
            if self._held_out is not None:
                go_through(self._held_out, [held_out], self._size, self._batch_size)
            queries = [self._seen, *([held_out] if held_out.parts else [])]
            training = _Training(self._extractor, queries)
            go_through(self._training, [training], self._size, self._batch_size)
            self._compared = _compared(training, self._seen, held_out)
        return self._compared


@dataclass(frozen=True)
class _Compared:
    """Of the generated pictures, by index: distances, numbers of the nearest training pictures,
    whether they are such to the pixel, and their order by keys. Of the held-out ones, those that
    are no training pictures: distances; and how many are."""

    distance_M: np.ndarray
    number_M: np.ndarray
    exact_M: np.ndarray
    order_M: np.ndarray
    held_out_N: np.ndarray
    in_training: int


def _compared(training: _Training, seen: _Seen, held_out: _Seen) -> _Compared:
    by_index = np.argsort(seen.indices)
    nearest = training.nearest[0]
    distance_M, number_M = nearest.distance_Q[by_index], nearest.number_Q[by_index]
    exact_M = np.array([key in training.keys for key in seen.keys])[by_index]
    distance_M[exact_M] = 0.0  # in another batch the same pixels have features that round otherwise
    order_M = np.argsort(np.array(seen.keys, np.uint64)[by_index], kind="stable")
    if not held_out.parts:
        return _Compared(distance_M, number_M, exact_M, order_M, np.zeros(0), 0)
    trained_N = np.array([key in training.keys for key in held_out.keys])
    others_N = training.nearest[1].distance_Q[~trained_N]
    return _Compared(distance_M, number_M, exact_M, order_M, others_N, int(trained_N.sum()))


def threshold(held_out_N: np.ndarray) -> float | None:
    """The distance below which 1 % of held-out pictures are; None where they are too few."""
    return float(np.percentile(held_out_N, PERCENTILE)) if len(held_out_N) >= FEWEST else None


def share_closer(
    distance_M: np.ndarray, held_out_N: np.ndarray, *, in_training: int = 0, same_set: bool = False
) -> Finding:
    """The share of distances below the first percentile of those of held-out pictures.

    The interval resamples generated pictures; the threshold stays.

    Args:
        distance_M: of generated pictures to their nearest training pictures; the interval depends
            on their order, so give them in the order of keys.
        held_out_N: of held-out pictures.
        in_training: how many more held-out pictures were training pictures.
        same_set: whether there were no held-out pictures at all.
    """
    details: dict[str, Any] = {
        "distances": _quartiles(distance_M),
        "held_out_distances": _quartiles(held_out_N) if len(held_out_N) else None,
        "held_out": len(held_out_N),
        "held_out_in_training": in_training,
        "percentile": PERCENTILE,
    }
    left_out = f"{in_training} of the held-out pictures are training pictures and do not count"
    limit = threshold(held_out_N)
    if limit is None:
        reason = (
            "what is near is told by real pictures that were not trained on: give these as --real "
            "and the others as --training; there are distances only"
            if same_set
            else f"the threshold takes {FEWEST} held-out pictures, and --real has "
            f"{len(held_out_N)}{f' ({left_out})' if in_training else ''}"
        )
        return Finding(None, len(distance_M), reason=reason, details=details)
    interval = bootstrap_mean((distance_M < limit).astype(np.float64), proportion=True)
    assert interval is not None
    return Finding(
        interval.mean,
        interval.n,
        interval.low,
        interval.high,
        "bootstrap over images, threshold fixed",
        left_out if in_training else None,
        details | {"threshold": limit},
    )


def _quartiles(values: np.ndarray) -> list[float]:
    """Minimum, quartiles, maximum."""
    return [float(value) for value in np.percentile(values, (0, 25, 50, 75, 100))]


def _keys(pictures: Sequence[Picture]) -> list[int]:
    return [key_of(digest_of(picture.image)) for picture in pictures]


def _features(extractor: Extractor, pictures: Sequence[Picture]) -> np.ndarray:
    rows_nD = extractor([picture.image for picture in pictures])[FEATURES]
    return finite(rows_nD, [picture.name for picture in pictures], extractor.name)
