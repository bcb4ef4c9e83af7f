"""Prepared datasets as training and studies read them (docs/data-format.md).

With shard_file.py, which writes a shard, the only owner of the format. `open_dataset` verifies that
no byte has changed since.

Legend: N images, D feature width, K codebook size.
"""

import dataclasses
import hashlib
import os
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arra.data.grid_column import GridColumn, format_of
from arra.data.manifest import AGAIN, Manifest, ShardInfo, SplitInfo, read_manifest
from arra.data.order import Order, Shuffled
from arra.data.parquet_files import parquet_file
from arra.data.shard_file import FEATURE, bad_feature
from arra.data.text_column import TextColumn
from arra.data.views import choices_by_sample
from arra.files import is_local, place, sha256_of

_verified: set[tuple[str, int, int, str]] = set()
"""Shards whose SHA-256 this process has seen to be right: (path, bytes, mtime, sha256)."""


class Dataset:
    """One split of a prepared dataset, in memory but for the features of captions and of patches.

    Attributes:
        folder, split, manifest: what was opened.
        ids, samples, texts: N strings each.
        image_index: (N) int16, position of the image within its sample.
        grids: (N, 2) int16, code rows and columns.
        features: name -> (N, D) float16.
        text_features: name -> the captions' features, read row by row when asked for.
        patch_features: name -> a vector for each code, read row by row when asked for.
        view_of: of each row that is a view of another, that row's id; else None.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        manifest: Manifest,
        table: pa.Table,
        wanted: Collection[str] = (),
    ) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self.ids: list[str] = table.column("id").to_pylist()
        self.samples: list[str] = table.column("sample").to_pylist()
        self.texts: list[str] = table.column("text").to_pylist()
        self.image_index = table.column("image_index").to_numpy().astype(np.int16)
        self.grids = np.stack(
            [table.column(name).to_numpy() for name in ("grid_height", "grid_width")], axis=1
        ).astype(np.int16)
        chunks = table.column("image_ids").chunks  # together they may be too long for one array
        self._lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
        self._codes = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        self.features = {
            name.removeprefix(FEATURE): _fixed(table.column(name))
            for name in table.column_names
            if name.startswith(FEATURE)
        }
        self.kept: object = None  # what must live as long as this
        self.view_of: list[str | None] = [None] * len(self.ids)
        if "view_of" in table.column_names:
            self.view_of = table.column("view_of").to_pylist()
        shards = manifest.splits[split].shards
        self.text_features = {
            name: TextColumn(folder, shards, name, info.dim)
            for name, info in manifest.text_features.items()
        }
        self.patch_features = {
            name: GridColumn(folder, shards, name, format_of(info), self.grids)
            for name, info in manifest.grids.items()
            if name in wanted
        }

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def image_ids(self) -> list[np.ndarray]:
        """Of each row its codes, int32, in raster order."""
        return np.split(self._codes, self._ends[:-1])

    @property
    def first(self) -> "Dataset":
        """Itself: all rows are in memory."""
        return self

    def texts_of(self, rows: Sequence[int]) -> list[str]:
        """The captions of some rows."""
        return [self.texts[row] for row in rows]

    def codes(self, rows: Sequence[int]) -> np.ndarray:
        """The codes of some rows, one image after the other."""
        ends, lengths = self._ends[rows], self._lengths[rows]
        if (lengths == lengths[0]).all():
            places = (ends - lengths)[:, None] + np.arange(lengths[0])
            return self._codes[places.ravel()]
        return np.concatenate(
            [self._codes[b - n : b] for b, n in zip(ends.tolist(), lengths.tolist(), strict=True)]
        )

    def grids_of(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Code rows and columns of some rows."""
        return [(height, width) for height, width in self.grids[rows].tolist()]

    def order(self, seed: int, batch_size: int) -> Order:
        """Each epoch one permutation of all samples."""
        choices = choices_by_sample(self.ids, self.samples, self.view_of)
        if not choices:
            raise ValueError(f"the dataset's split {self.split!r} has no rows to train on")
        return Shuffled(choices, seed, batch_size)

    def close(self) -> None:
        """Nothing is read in the background."""

    def column(self, name: str) -> list[Any]:
        """The values of any column, an extra one such as `label` included.

        Raises:
            ValueError: no such column; the message lists those there are.
        """
        shards = self.manifest.splits[self.split].shards
        values: list[Any] = []
        for shard in shards:
            file = parquet_file(self.folder / shard.file)
            if name not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{self.folder} has no column {name!r}; it has {there}")
            values += file.read(columns=[name]).column(name).to_pylist()
        return values

    def check(self) -> None:
        """Verifies what training counts on; ValueError names what is wrong."""
        where = f"{self.folder} split {self.split}"
        expected = self.manifest.splits[self.split].rows
        if len(self.ids) != expected:
            raise ValueError(f"{where} has {len(self.ids)} rows, its manifest says {expected}")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{where} holds an id twice: prepare the data again")
        cells = self.grids.astype(np.int64).prod(axis=1)
        wrong = np.flatnonzero(cells != self._lengths)
        if wrong.size:
            row = int(wrong[0])
            height, width = self.grids[row]
            raise ValueError(
                f"{where}, id {self.ids[row]!r}: {self._lengths[row]} codes do not make a grid of "
                f"{height}x{width}: prepare the data again"
            )
        size = self.manifest.tokenizer.codebook_size
        if self._codes.size and (self._codes.min() < 0 or self._codes.max() >= size):
            raise ValueError(f"{where} has codes outside of the tokenizer's 0..{size - 1}")
        for name, value_ND in self.features.items():
            bad = np.flatnonzero(~np.isfinite(value_ND).all(axis=1) | ~value_ND.any(axis=1))
            if value_ND.shape != (len(self.ids), self.manifest.features[name].dim):
                raise ValueError(f"{where}: feature {name!r} has shape {value_ND.shape}")
            if bad.size:
                raise ValueError(
                    f"{where}, id {self.ids[int(bad[0])]!r}: feature {name!r} is "
                    f"{bad_feature(value_ND[int(bad[0])])}: prepare the data again"
                )


def _fixed(column: pa.ChunkedArray) -> np.ndarray:
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(flat).reshape(len(column), column.type.list_size)


def open_dataset(
    folder: Path | str,
    split: str = "train",
    features: Sequence[str] | None = None,
    check: bool = True,
) -> Dataset:
    """Opens one split of a prepared dataset.

    Args:
        folder: what `arra prepare --out` wrote.
        split: train, val, test, …
        features: names of the features and grids to read; None reads all, () none.
        check: verify SHA-256 (once per process and file), counts, ids, codes and features.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: no such split or feature, or damage; the message names the file and the remedy.
    """
    folder = place(folder)
    manifest = read_manifest(folder)
    known = None if features is None else list(features)
    wanted = wanted_features(folder, manifest, split, known)
    return read_part(folder, split, manifest, manifest.splits[split].shards, wanted, check, check)


def wanted_features(
    folder: Path, manifest: Manifest, split: str, features: Sequence[str] | None
) -> list[str]:
    """Names of the features and grids to read; None = all.

    Raises:
        ValueError: no such split or feature.
    """
    if split not in manifest.splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    known = manifest.aligned()
    wanted = list(known) if features is None else list(features)
    for name in wanted:
        if name not in known:
            there = ", ".join(known) or "none"
            raise ValueError(
                f"{folder} has no feature {name!r}, it has {there}: ask for one of these, or "
                f"prepare the data again with --encoder {name}=..."
            )
    return wanted


def read_part(
    folder: Path,
    split: str,
    manifest: Manifest,
    shards: Sequence[ShardInfo],
    wanted: Sequence[str],
    verify: bool = True,
    check: bool = True,
) -> Dataset:
    """Some shards of a split as a dataset of their own, rows numbered from 0.

    Args:
        wanted: names of features and grids.
        verify: their SHA-256.
        check: what they hold.

    Raises:
        FileNotFoundError, ValueError: as `open_dataset`.
    """
    columns = ["id", "sample", "image_index", "text", "image_ids", "grid_height", "grid_width"]
    columns += [FEATURE + name for name in wanted if name in manifest.features]
    columns += ["view_of"] if manifest.splits[split].views else []
    tables = [_read_shard(folder / shard.file, shard, columns, verify) for shard in shards]
    rows = sum(shard.rows for shard in shards)
    splits = {**manifest.splits, split: SplitInfo(rows, list(shards))}
    part = dataclasses.replace(manifest, splits=splits)
    dataset = Dataset(folder, split, part, pa.concat_tables(tables), wanted)
    if check:
        dataset.check()
    return dataset


def _read_shard(path: Path, shard: ShardInfo, columns: list[str], verify: bool) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing: {AGAIN}")
    try:
        if not verify:
            file = parquet_file(path)
        elif is_local(path):
            _verify(path, shard)
            file = pq.ParquetFile(path)
        else:  # fetched once
            whole = path.read_bytes()
            _compare(path, hashlib.sha256(whole).hexdigest(), shard)
            file = pq.ParquetFile(pa.BufferReader(whole))
        table = file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"shard {path} is damaged ({error}): {AGAIN}") from None
    if table.num_rows != shard.rows:
        raise ValueError(f"shard {path} has {table.num_rows} rows, not {shard.rows}: {AGAIN}")
    return table


def _verify(path: Path, shard: ShardInfo) -> None:
    status = os.stat(path)
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns, shard.sha256)
    if key in _verified:
        return
    _compare(path, sha256_of(path), shard)
    _verified.add(key)


def _compare(path: Path, sha256: str, shard: ShardInfo) -> None:
    if sha256 != shard.sha256:
        raise ValueError(f"shard {path} is damaged (its SHA-256 is another): {AGAIN}")


def read_features(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Features name -> (N, D) float16 of one shard, for statistics."""
    table = parquet_file(path).read(columns=[FEATURE + name for name in names])
    return {name: _fixed(table.column(FEATURE + name)) for name in names}
