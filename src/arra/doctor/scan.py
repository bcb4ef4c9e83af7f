"""One pass over the shards of a dataset: what its checks need of every row, and nothing more.

A row leaves two or three hundred bytes behind, whatever its codes and features weigh: numbers are
summed, and ids, codes, features and captions are kept as 64-bit digests, which is enough to find
equals (among 10^7 rows two digests agree by chance once in 400,000 datasets). What a finding shows
of a row is read again.

Legend: N rows, B rows of a batch, D feature width, K codebook size.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from arra.data.grid_column import GRID, bad_cells, format_of
from arra.data.manifest import Manifest, ShardInfo
from arra.data.parquet_files import parquet_file
from arra.data.shard_file import FEATURE, bad_feature
from arra.data.text_column import TEXT_FEATURE, text_type

BATCH = 1024
"""Rows that are in memory at a time."""

VECTOR_BATCH = 16
"""The same of columns with many vectors a row, which may be megabytes each."""

GROUPS = ("patient", "subject_id", "sample")
"""Columns whose values must not be in two splits."""

VIEW_OF, PICTURE_OF = "view_of", "image_id"
"""Columns that say which rows show one picture: augmented views name their main row, captions of
one picture (COCO) its number."""

_FIXED = ("id", "sample", "text", "image_ids", "grid_height", "grid_width")


@dataclass
class SplitScan:
    """What one split's readable shards hold.

    Attributes:
        split, shards: whose rows these are, in order.
        keys: what -> (N) uint64 digests, 0 = no value. `id`; `main`, the row that this one is a
            view of, else itself; `owner`, rows with one owner show one picture; `codes`;
            `features`; `caption`; and the columns of GROUPS that there are.
        caption_lengths: (N) characters.
        norms: feature -> (N) lengths.
        unit_sums: feature -> (D) sum of the features scaled to length 1.
        grids: (rows, columns) of codes -> images.
        uses_K: how often each code occurs.
        wrong: what is wrong -> rows.
        views: rows that are views of others.
    """

    split: str
    shards: list[ShardInfo]
    keys: dict[str, Any] = field(default_factory=dict)
    caption_lengths: Any = None
    norms: dict[str, Any] = field(default_factory=dict)
    unit_sums: dict[str, np.ndarray] = field(default_factory=dict)
    grids: Counter[tuple[int, int]] = field(default_factory=Counter)
    uses_K: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    wrong: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    views: int = 0

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def pictures(self) -> np.ndarray:
        """(N) digests of codes and features together: equal pictures have equal ones."""
        codes_N, features_N = self.keys["codes"], self.keys["features"]
        return codes_N ^ (features_N * np.uint64(0x9E3779B97F4A7C15))


def key(value: bytes) -> bytes:
    """Eight bytes that stand for a value."""
    return blake2b(value, digest_size=8).digest()


def keys_of(values: Iterable[object]) -> np.ndarray:
    """(N) uint64 digests of values as text; 0 for None."""
    nothing = bytes(8)
    digests = (
        nothing if value is None else key(str(value).encode("utf-8", "surrogatepass"))
        for value in values
    )
    return np.frombuffer(b"".join(digests), np.uint64)


class UnreadableShard(ValueError):
    """A shard whose bytes are right but which does not hold what the manifest says."""


def scan(
    folder: Path,
    manifest: Manifest,
    split: str,
    shards: Sequence[ShardInfo],
    progress: Callable[[int], None],
) -> tuple[SplitScan, list[tuple[str, str]]]:
    """Reads the shards of a split.

    Args:
        folder, manifest: the dataset.
        split: which.
        shards: those whose bytes are right.
        progress: is told how many more rows are done.

    Returns:
        The scan, and (file, why) of shards that do not hold what the manifest says.
    """
    made = SplitScan(split, [], uses_K=np.zeros(manifest.tokenizer.codebook_size, np.int64))
    parts: dict[str, list[np.ndarray]] = {}
    unreadable: list[tuple[str, str]] = []
    rows = 0
    for shard in shards:
        try:
            names = _columns(folder / shard.file, manifest, shard)
        except UnreadableShard as error:
            unreadable.append((shard.file, str(error)))
            continue
        made.shards.append(shard)
        for batch in batches(folder / shard.file, names):
            _add(made, parts, batch, rows, manifest)
            rows += batch.num_rows
            progress(batch.num_rows)
        _check_vectors(folder / shard.file, manifest, made, rows - shard.rows)
    empty = np.zeros(0, np.uint64)
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    made.caption_lengths = joined.pop("length", empty)
    made.norms = {n: joined.pop(f"norm {n}", empty) for n in manifest.features}
    made.keys = joined or dict.fromkeys(
        ("id", "main", "owner", "codes", "features", "caption"), empty
    )
    return made, unreadable


def batches(path: Path, columns: Sequence[str], rows: int = BATCH) -> Iterator[pa.RecordBatch]:
    """The rows of a shard, some at a time."""
    with parquet_file(path) as file:
        yield from file.iter_batches(batch_size=rows, columns=list(columns))


def feature_of(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """(B, D) float16 of a batch's feature."""
    column = batch.column(FEATURE + name)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def values_of(
    folder: Path, shards: Sequence[ShardInfo], column: str, rows: Iterable[int]
) -> dict[int, Any]:
    """row -> value of a column, for a few rows of a split."""
    wanted = sorted(set(rows))
    found: dict[int, Any] = {}
    start = 0
    for shard in shards:
        mine = [row - start for row in wanted if start <= row < start + shard.rows]
        if mine:
            with parquet_file(folder / shard.file) as file:
                values = file.read(columns=[column]).column(column)
            found |= {start + row: values[row].as_py() for row in mine}
        start += shard.rows
    return found


def _columns(path: Path, manifest: Manifest, shard: ShardInfo) -> list[str]:
    """The columns to read, all of the types that the format says."""
    try:
        with parquet_file(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UnreadableShard(f"is no readable Parquet file ({error})") from None
    if rows != shard.rows:
        raise UnreadableShard(f"has {rows} rows, the manifest says {shard.rows}")
    expected: dict[str, pa.DataType] = {
        "image_ids": pa.list_(pa.int32()),
        **{FEATURE + n: pa.list_(pa.float16(), i.dim) for n, i in manifest.features.items()},
        **{TEXT_FEATURE + n: text_type(i.dim) for n, i in manifest.text_features.items()},
        **{GRID + n: format_of(i).type for n, i in manifest.grids.items()},
    }
    for name in [*_FIXED, *expected]:
        if name not in schema.names:
            raise UnreadableShard(f"has no column {name}")
        if name in expected and not schema.field(name).type.equals(expected[name]):
            raise UnreadableShard(
                f"column {name} is {schema.field(name).type}, not {expected[name]}"
            )
    wanted = {*_FIXED, *expected, *GROUPS, VIEW_OF, PICTURE_OF}
    return [n for n in schema.names if n in wanted and not n.startswith((TEXT_FEATURE, GRID))]


def _add(
    made: SplitScan,
    parts: dict[str, list[np.ndarray]],
    batch: pa.RecordBatch,
    start: int,
    manifest: Manifest,
) -> None:
    """Takes what is needed of a batch whose first row is row `start` of the split."""
    ids = batch.column("id").to_pylist()
    own = keys_of(ids)
    there = set(batch.schema.names)
    main = own
    if VIEW_OF in there:
        named = keys_of(batch.column(VIEW_OF).to_pylist())
        main = np.where(named == 0, own, named)
        made.views += int((named != 0).sum())
    owner = main
    if PICTURE_OF in there:
        number = keys_of(batch.column(PICTURE_OF).to_pylist())
        owner = np.where(number == 0, main, number)
    texts = [text or "" for text in batch.column("text").to_pylist()]
    new = {
        "id": own,
        "main": main,
        "owner": owner,
        "codes": _codes(made, batch, start, manifest.tokenizer.codebook_size),
        "features": _features(made, parts, batch, start, manifest),
        "caption": keys_of(text.strip() or None for text in texts),
        "length": np.array([len(text) for text in texts], np.int32),
    }
    for name in GROUPS:
        if name in there:
            new[name] = keys_of(batch.column(name).to_pylist())
    if "sample" in new:  # a row that stands alone is its own sample
        new["sample"] = np.where((new["sample"] == own) | (new["sample"] == main), 0, new["sample"])
    for name, value in new.items():
        parts.setdefault(name, []).append(value)


def _codes(made: SplitScan, batch: pa.RecordBatch, start: int, size: int) -> np.ndarray:
    column = batch.column("image_ids")
    offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
    codes, lengths = column.flatten().to_numpy(), np.diff(offsets)
    heights, widths = (batch.column(n).to_numpy() for n in ("grid_height", "grid_width"))
    made.grids.update(zip(heights.tolist(), widths.tolist(), strict=True))
    _note(
        made, "codes", "codes do not fill the grid", start, heights.astype(int) * widths != lengths
    )
    inside = (codes >= 0) & (codes < size)
    outside = np.zeros(len(lengths), bool)
    outside[np.repeat(np.arange(len(lengths)), lengths)[~inside]] = True
    _note(made, "codes", f"codes outside of 0..{size - 1}", start, outside)
    made.uses_K += np.bincount(codes[inside], minlength=size)
    shapes = np.stack([heights, widths], axis=1).astype(np.int16)
    digests = [
        key(codes[a:b].tobytes() + shape.tobytes())
        for a, b, shape in zip(offsets[:-1], offsets[1:], shapes, strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def _features(
    made: SplitScan,
    parts: dict[str, list[np.ndarray]],
    batch: pa.RecordBatch,
    start: int,
    manifest: Manifest,
) -> np.ndarray:
    seen = []
    for name in manifest.features:
        feature_BD = feature_of(batch, name)
        seen.append(np.ascontiguousarray(feature_BD).view(np.uint8))
        bad = ~np.isfinite(feature_BD).all(axis=1) | ~feature_BD.any(axis=1)
        for row in np.flatnonzero(bad):
            reason = str(bad_feature(feature_BD[row]))
            made.wrong.setdefault((name, reason), []).append(start + int(row))
        exact_BD = feature_BD.astype(np.float64)
        norm_B = np.linalg.norm(exact_BD, axis=1)
        good = ~bad
        unit_D = (exact_BD[good] / norm_B[good, None]).sum(axis=0)
        made.unit_sums[name] = made.unit_sums.get(name, 0.0) + unit_D
        parts.setdefault(f"norm {name}", []).append(np.where(bad, np.nan, norm_B))
    if not seen:
        return np.zeros(batch.num_rows, np.uint64)
    joined = np.concatenate(seen, axis=1)
    return np.frombuffer(b"".join(key(row.tobytes()) for row in joined), np.uint64)


def _check_vectors(path: Path, manifest: Manifest, made: SplitScan, start: int) -> None:
    """Columns of many vectors a row: finite, and as many of them as there may be."""
    for name, text in manifest.text_features.items():
        for row, packed in _packed(path, TEXT_FEATURE + name, start):
            values = np.frombuffer(packed, "<f2")
            if not np.isfinite(values).all():
                made.wrong.setdefault((f"text {name}", "NaN or infinite"), []).append(row)
            if values.size > text.length * text.dim:
                why = f"longer than {text.length} tokens"
                made.wrong.setdefault((f"text {name}", why), []).append(row)
    for name, info in manifest.grids.items():
        form = format_of(info)
        codes = _grid_sizes(path)
        for row, packed in _packed(path, GRID + name, start):
            height, width = form.stored_shape(codes[row - start])
            if len(packed) != height * width * form.width:
                why = f"not of {height} x {width} cells"
            else:
                stored_pb = np.frombuffer(packed, np.uint8).reshape(-1, form.width)
                why = bad_cells(form.unpack(stored_pb)) or ""
            if why:
                made.wrong.setdefault((f"grid {name}", why), []).append(row)


def _packed(path: Path, column: str, start: int) -> Iterator[tuple[int, bytes]]:
    """Row of the split, and the bytes of all its vectors."""
    row = start
    for batch in batches(path, [column], rows=VECTOR_BATCH):
        for vectors in batch.column(0):
            packed = vectors.values
            yield row, b"" if packed is None else b"".join(packed.to_pylist())
            row += 1


def _grid_sizes(path: Path) -> list[tuple[int, int]]:
    with parquet_file(path) as file:
        table = file.read(columns=["grid_height", "grid_width"])
    heights, widths = (table.column(name).to_pylist() for name in table.column_names)
    return list(zip(heights, widths, strict=True))


def _note(made: SplitScan, what: str, why: str, start: int, wrong: np.ndarray) -> None:
    rows = np.flatnonzero(wrong)
    if rows.size:
        made.wrong.setdefault((what, why), []).extend((start + rows).tolist())


def joined_unit_sum(scans: Mapping[str, SplitScan], name: str) -> tuple[np.ndarray, int]:
    """(D) sum of unit features over all splits, and how many rows that are."""
    total = sum(scan.unit_sums.get(name, np.zeros(1)) for scan in scans.values())
    rows = sum(int(np.isfinite(scan.norms[name]).sum()) for scan in scans.values())
    return np.asarray(total), rows
