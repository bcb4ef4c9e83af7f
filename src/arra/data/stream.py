"""A split that is read shard by shard while training, from a disk or an object store.

The order is that of `Lanes` (order.py): a function of the manifest's row counts, the seed and the
step, so that a run begins anywhere without reading what came before. In memory are the shards of
the windows that feed this process' slots and of the windows after them, which are fetched and
decoded in the background. Nothing else of the split is read, but for its first shard.

Legend: N rows, D feature width.
"""

import dataclasses
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from arra.data.cache import Held, ShardCache
from arra.data.manifest import Manifest, ShardInfo, read_manifest
from arra.data.order import Lanes, Order, Place
from arra.data.shards import Dataset, read_part, wanted_features
from arra.data.split import Captions, Cells, Vectors
from arra.data.vector_column import CACHE_BYTES
from arra.data.views import choices_by_sample
from arra.files import is_local, place

_WORKERS = 4
"""Shards that are fetched and decoded at the same time."""


@dataclass(frozen=True)
class _Part:
    """One shard in memory."""

    dataset: Dataset
    choices: Sequence[Sequence[Sequence[int]]]
    held: Held

    def close(self) -> None:
        self.held.close()


class Stream:
    """One split; see `split.Split` for what a loader reads of it.

    Args:
        folder: a prepared dataset, local or a URL.
        split: its name.
        features: names of the features and grids to read.
        window: shards of a lane that are mixed.
        lanes: that feed a batch.
        cache: where the shards of an object store are kept.

    Raises:
        ValueError: what cannot be streamed: samples of several images may lie in two shards.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        features: Sequence[str],
        *,
        window: int,
        lanes: int,
        cache: ShardCache,
    ) -> None:
        self.folder, self.split = place(folder), split
        self.manifest: Manifest = read_manifest(self.folder)
        self._wanted = wanted_features(self.folder, self.manifest, split, features)
        self._shards = self.manifest.splits[split].shards
        self._first_row = np.cumsum([0, *(shard.rows for shard in self._shards)]).tolist()
        self._window, self._lanes, self._cache = window, lanes, cache
        self._guard = threading.Lock()
        self._parts: OrderedDict[int, Future[_Part]] = OrderedDict()
        self._capacity = 1
        self._pool: ThreadPoolExecutor | None = None
        self.first = self._opened(0).dataset
        self.ids, self.texts = _Strings(self, "ids"), _Strings(self, "texts")
        self.features: Mapping[str, Vectors] = {
            name: _Vectors(self, name) for name in self.first.features
        }
        self.patch_features: Mapping[str, Cells] = {
            name: _Cells(self, name) for name in self.first.patch_features
        }
        self.text_features: Mapping[str, Captions] = {
            name: _Captions(self, name, column.dim)
            for name, column in self.first.text_features.items()
        }

    def __len__(self) -> int:
        return self._first_row[-1]

    def codes(self, rows: Sequence[int]) -> np.ndarray:
        """The codes of some rows, one image after the other."""
        found: list[np.ndarray] = [np.zeros(0)] * len(rows)
        for part, places, own in self.shards_of(rows):
            cells = part.grids[own].astype(np.int64).prod(axis=1)
            each = np.split(part.codes(own), np.cumsum(cells)[:-1])
            for at, codes in zip(places, each, strict=True):
                found[at] = codes
        return np.concatenate(found)

    def texts_of(self, rows: Sequence[int]) -> list[str]:
        """The captions of some rows."""
        found = [""] * len(rows)
        for part, places, own in self.shards_of(rows):
            for at, text in zip(places, part.texts_of(own), strict=True):
                found[at] = text
        return found

    def grids_of(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Code rows and columns of some rows."""
        found = [(0, 0)] * len(rows)
        for part, places, own in self.shards_of(rows):
            for at, grid in zip(places, part.grids_of(own), strict=True):
                found[at] = grid
        return found

    def order(self, seed: int, batch_size: int) -> Order:
        """Window by window, in lanes."""
        counts = [shard.rows - shard.views for shard in self._shards]
        lanes = Lanes(
            counts, seed=seed, batch_size=batch_size, lanes=self._lanes, window=self._window
        )
        return _StreamOrder(self, lanes)

    def shards_of(self, rows: Sequence[int]) -> Iterator[tuple[Dataset, list[int], list[int]]]:
        """The shards that hold some rows: each, which of the rows are in it, and where."""
        of: dict[int, tuple[list[int], list[int]]] = {}
        for at, row in enumerate(rows):
            shard = bisect_right(self._first_row, row) - 1
            places, own = of.setdefault(shard, ([], []))
            places.append(at)
            own.append(row - self._first_row[shard])
        for shard, (places, own) in of.items():
            yield self.part(shard).dataset, places, own

    def found(self, row: int) -> tuple[Dataset, int]:
        """The shard that holds a row, and where in it."""
        shard = bisect_right(self._first_row, row) - 1
        return self.part(shard).dataset, row - self._first_row[shard]

    def part(self, shard: int) -> _Part:
        """A shard, waited for if it is not there."""
        return self._asked(shard).result()

    def rows_of(self, places: Sequence[Place]) -> list[Sequence[int]]:
        """The rows of samples; of the views of one, one is drawn."""
        parts = {shard: self.part(shard) for shard in {each.shard for each in places}}
        rows: list[Sequence[int]] = []
        for each in places:
            choices, first = parts[each.shard].choices[each.position], self._first_row[each.shard]
            rows.append([first + row for row in choices[int(each.draw * len(choices))]])
        return rows

    def expect(self, now: Sequence[int], soon: Sequence[int], keep: int) -> None:
        """Begins to fetch shards; `keep` of them stay in memory."""
        self._capacity = max(self._capacity, keep)
        for shard in (*soon, *now):  # what is used now goes last
            self._asked(shard)

    def close(self) -> None:
        """Gives up what is on its way and drops what is in memory; what is asked for later is
        fetched again."""
        with self._guard:
            pool, self._pool = self._pool, None
            parts, self._parts = list(self._parts.values()), OrderedDict()
        self._cache.stopping.set()
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for part in parts:
            _let_go(part)
        self._cache.stopping.clear()

    def _asked(self, shard: int) -> "Future[_Part]":
        with self._guard:
            found = self._parts.get(shard)
            if found is None or (found.done() and (found.cancelled() or found.exception())):
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="shards")
                found = self._parts[shard] = self._pool.submit(self._opened, shard)
            self._parts.move_to_end(shard)
            dropped = [
                self._parts.popitem(last=False)[1]
                for _ in range(len(self._parts) - max(self._capacity, 1))
            ]
        for part in dropped:
            _let_go(part)
        return found

    def _opened(self, number: int) -> _Part:
        shard = self._shards[number]
        held, dataset = _read(
            self.folder, self.split, self.manifest, [shard], self._wanted, self._cache
        )
        for row, (id_, sample, whole) in enumerate(
            zip(dataset.ids, dataset.samples, dataset.view_of, strict=True)
        ):
            if whole is None and (id_ != sample or dataset.image_index[row]):
                raise ValueError(
                    f"{self.folder} has samples of several images ({sample!r}), which may lie in "
                    f"two shards: leave out --data.stream"
                )
        for column in (*dataset.text_features.values(), *dataset.patch_features.values()):
            column.cache_bytes = CACHE_BYTES // max(self._capacity, 1)
        choices = choices_by_sample(dataset.ids, dataset.samples, dataset.view_of)
        return _Part(dataset, choices, held[0])


def open_beginning(
    folder: Path | str, split: str, features: Sequence[str], cache: ShardCache, samples: int
) -> Dataset:
    """The first shards of a split that together hold so many samples, in memory.

    Raises:
        FileNotFoundError, OSError, ValueError: as `open_dataset`, and as `ShardCache.hold`.
    """
    folder = place(folder)
    manifest = read_manifest(folder)
    wanted = wanted_features(folder, manifest, split, features)
    shards: list[ShardInfo] = []
    for shard in manifest.splits[split].shards:
        if sum(each.rows - each.views for each in shards) >= samples:
            break
        shards.append(shard)
    held, dataset = _read(folder, split, manifest, shards, wanted, cache)
    dataset.kept = held
    return dataset


def _read(
    folder: Path,
    split: str,
    manifest: Manifest,
    shards: Sequence[ShardInfo],
    wanted: Sequence[str],
    cache: ShardCache,
) -> tuple[list[Held], Dataset]:
    """Shards as a dataset; those of an object store through the cache, where they stay while a
    column of theirs is read row by row."""
    if is_local(folder):
        return [Held(folder)] * len(shards), read_part(folder, split, manifest, shards, wanted)
    held = [cache.hold(folder / shard.file, shard) for shard in shards]
    named = [
        dataclasses.replace(shard, file=each.path.name)
        for shard, each in zip(shards, held, strict=True)
    ]
    dataset = read_part(cache.folder, split, manifest, named, wanted, verify=False)
    dataset.folder = folder
    if not dataset.text_features and not dataset.patch_features:
        for each in held:
            each.close()
    return held, dataset


def _let_go(part: "Future[_Part]") -> None:
    """Frees a shard, now or when it is there."""
    if not part.cancel():
        part.add_done_callback(_closed)


def _closed(part: "Future[_Part]") -> None:
    if not part.cancelled() and part.exception() is None:
        part.result().close()


class _StreamOrder:
    """The order of a stream; it also says which shards are needed."""

    several = False

    def __init__(self, stream: Stream, lanes: Lanes) -> None:
        self._stream, self._lanes = stream, lanes
        self._fed: set[int] = set()
        self.num_samples = lanes.num_samples
        self._ends = np.cumsum(lanes.counts).tolist()

    def rows_at(self, step: int, slots: np.ndarray) -> list[Sequence[int]]:
        places = self._lanes.at(step, slots)
        self._fed |= self._lanes.feeding(slots)
        keep = len(self._fed) * (2 * self._lanes.window + 1)
        now = list(dict.fromkeys(each.shard for each in places))
        self._stream.expect(now, self._lanes.shards_after(step, slots), keep)
        return self._stream.rows_of(places)

    def rows_from(self, start: int, stop: int) -> list[Sequence[int]]:
        places = []
        for sample in range(start, min(stop, self.num_samples)):
            shard = bisect_right(self._ends, sample)
            first = self._ends[shard] - self._lanes.counts[shard]
            places.append(Place(shard, sample - first, 0.0))
        return self._stream.rows_of(places)


# ---- columns by row number -----------------------------------------------------------------------


class _Strings:
    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name

    def __getitem__(self, row: int) -> str:
        part, at = self._stream.found(row)
        return (part.ids if self._name == "ids" else part.texts)[at]


class _Vectors:
    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name

    def __getitem__(self, rows: Sequence[int]) -> np.ndarray:
        dim = self._stream.first.features[self._name].shape[1]
        found_ED = np.empty((len(rows), dim), np.float16)
        for part, places, own in self._stream.shards_of(rows):
            found_ED[places] = part.features[self._name][own]
        return found_ED


class _Cells:
    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name

    def __getitem__(self, row: int) -> Tensor:
        part, at = self._stream.found(row)
        return part.patch_features[self._name][at]


class _Captions:
    def __init__(self, stream: Stream, name: str, dim: int) -> None:
        self._stream, self.name, self.dim = stream, name, dim

    def __getitem__(self, row: int) -> np.ndarray:
        part, at = self._stream.found(row)
        return part.text_features[self.name][at]
