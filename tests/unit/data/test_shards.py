"""The format: deterministic bytes, what is written is read, every damage is named."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arra.data.manifest import (
    FeatureInfo,
    Manifest,
    SplitInfo,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from arra.data.shard_file import Row, bad_feature, shard_name, write_shard
from arra.data.shards import open_dataset
from arra.files import sha256_of

DIMS = {"clip": 5, "dino": 3}
COLUMNS = {"label": int, "score": float, "ok": bool, "note": str, "id": str}


def make_rows(start, count, *, dims=None):
    generator = np.random.default_rng(start)
    return [
        Row(
            id=f"r{i}",
            sample=f"s{i // 2}",
            image_index=i % 2,
            text=f"číslo {i}",
            codes_hw=generator.integers(0, 64, (2, 3 + i % 2)),
            features={
                name: generator.normal(size=dim).astype(np.float16)
                for name, dim in (DIMS if dims is None else dims).items()
            },
            extra={"label": i, "score": i / 3, "ok": i > 2, "note": None, "id": "own"},
        )
        for i in range(start, start + count)
    ]


def make_manifest(shards, **changes):
    infos = {
        name: FeatureInfo(dim, "fp-" + name, name, "class", [0.0] * dim, [0.1] * dim, [0.0] * dim)
        for name, dim in DIMS.items()
    }
    return dataclasses.replace(
        Manifest(
            splits={"train": SplitInfo(sum(s.rows for s in shards), shards)},
            tokenizer=TokenizerInfo("t", "fp", 64, 8),
            features=infos,
            size=16,
            crop="none",
            columns={"label": "int64"},
        ),
        **changes,
    )


@pytest.fixture
def dataset(tmp_path):
    shards = [
        write_shard(tmp_path / shard_name("train", k), make_rows(4 * k, 4), DIMS, COLUMNS)
        for k in range(2)
    ]
    write_manifest(tmp_path, make_manifest(shards))
    return tmp_path


def test_what_is_written_is_read(dataset):
    opened = open_dataset(dataset)
    rows = make_rows(0, 4) + make_rows(4, 4)
    assert len(opened) == 8
    assert opened.split == "train"
    assert opened.ids == [row.id for row in rows]
    assert opened.samples == [row.sample for row in rows]
    assert opened.texts == [row.text for row in rows]
    assert opened.image_index.dtype == np.int16
    assert opened.image_index.tolist() == [row.image_index for row in rows]
    assert opened.grids.dtype == np.int16
    assert opened.grids.tolist() == [list(row.codes_hw.shape) for row in rows]
    for ids, row in zip(opened.image_ids, rows, strict=True):
        assert ids.dtype == np.int32
        assert np.array_equal(ids, row.codes_hw.ravel())
    for name in DIMS:
        assert opened.features[name].dtype == np.float16
        assert np.array_equal(opened.features[name], [row.features[name] for row in rows])
    assert opened.column("label") == list(range(8))
    assert opened.column("source.id") == ["own"] * 8
    assert opened.column("note") == [None] * 8
    with pytest.raises(ValueError, match="no column 'nope'; it has id, sample"):
        opened.column("nope")


def test_column_types(dataset):
    schema = pq.read_schema(dataset / "train-00000.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        "id": "string",
        "sample": "string",
        "image_index": "int16",
        "text": "string",
        "image_ids": "list<element: int32>",
        "grid_height": "int16",
        "grid_width": "int16",
        "feature.clip": "fixed_size_list<element: halffloat>[5]",
        "feature.dino": "fixed_size_list<element: halffloat>[3]",
        "label": "int64",
        "score": "double",
        "ok": "bool",
        "note": "string",
        "source.id": "string",
    }


def test_some_features_or_none(dataset):
    assert list(open_dataset(dataset, features=("dino",)).features) == ["dino"]
    assert open_dataset(dataset, features=()).features == {}
    with pytest.raises(ValueError, match=r"no feature 'sam', it has clip, dino.*--encoder sam="):
        open_dataset(dataset, features=("sam",))
    with pytest.raises(ValueError, match="no split 'val'; it has train"):
        open_dataset(dataset, "val")


def test_bytes_depend_on_the_rows_only(tmp_path):
    first = write_shard(tmp_path / "a.parquet", make_rows(0, 4), DIMS, COLUMNS)
    second = write_shard(tmp_path / "b.parquet", make_rows(0, 4), DIMS, COLUMNS)
    assert first.sha256 == second.sha256
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert write_shard(tmp_path / "c.parquet", make_rows(1, 4), DIMS, COLUMNS).sha256 != (
        first.sha256
    )
    assert sorted(os.listdir(tmp_path)) == ["a.parquet", "b.parquet", "c.parquet"]


def test_every_flipped_byte_is_caught(dataset):
    path = dataset / "train-00001.parquet"
    good = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(good), 40):
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(position) % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-00001\.parquet is damaged.*arra prepare"):
            open_dataset(dataset)
    path.write_bytes(good)
    open_dataset(dataset)


def test_missing_and_cut_shards(dataset):
    path = dataset / "train-00001.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:-7])
    with pytest.raises(ValueError, match="damaged"):
        open_dataset(dataset)
    with pytest.raises(ValueError, match="damaged"):
        open_dataset(dataset, check=False)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001\.parquet is missing: run the same"):
        open_dataset(dataset)


def rewritten(dataset, change):
    """The dataset with one shard changed *and* declared in the manifest: only content is wrong."""
    path = dataset / "train-00000.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    manifest = read_manifest(dataset)
    shards = manifest.splits["train"].shards
    shards[0] = dataclasses.replace(shards[0], sha256=sha256_of(path))
    write_manifest(dataset, manifest)
    return dataset


def replaced(name, values, kind=None):
    def change(table):
        position = table.column_names.index(name)
        return table.set_column(position, name, pa.array(values, kind or table.column(name).type))

    return change


NAN = np.full(5, np.nan, np.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("id", ["r0", "r1", "r2", "r5"]), "holds an id twice"),
        (replaced("grid_width", [3, 4, 3, 3]), "id 'r3': 8 codes do not make a grid of 2x3"),
        (replaced("image_ids", [[1] * 6, [64] * 8, [0] * 6, [0] * 8]), r"outside .* 0\.\.63"),
        (replaced("image_ids", [[1] * 6, [-1] * 8, [0] * 6, [0] * 8]), r"outside .* 0\.\.63"),
        (replaced("feature.clip", [NAN] * 4), "id 'r0': feature 'clip' is NaN or infinite"),
        (replaced("feature.dino", [np.zeros(3, np.float16)] * 4), "zero everywhere"),
        (lambda table: table.slice(1), "has 3 rows, not 4"),
    ],
)
def test_content_that_cannot_be_trained_on(dataset, change, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(rewritten(dataset, change))


def test_features_of_another_width(dataset):
    manifest = read_manifest(dataset)
    manifest.features["clip"] = dataclasses.replace(manifest.features["clip"], dim=6)
    write_manifest(dataset, manifest)
    with pytest.raises(ValueError, match=r"feature 'clip' has shape \(8, 5\)"):
        open_dataset(dataset)


def test_manifest_round_trip_and_damage(dataset):
    path = dataset / "manifest.json"
    manifest = read_manifest(dataset)
    before = path.read_bytes()
    write_manifest(dataset, manifest)
    assert path.read_bytes() == before
    path.write_bytes(before.replace(b'"codebook_size": 64', b'"codebook_size": 65'))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or was edited"):
        open_dataset(dataset)
    path.write_bytes(before[:100])
    with pytest.raises(ValueError, match="not valid JSON"):
        open_dataset(dataset)
    content = json.loads(before)
    path.write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(ValueError, match="format version 2"):
        open_dataset(dataset)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not the manifest"):
        open_dataset(dataset)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="did not finish"):
        open_dataset(dataset)


def test_bad_feature():
    assert bad_feature(np.array([0, 1], np.float16)) is None
    assert bad_feature(np.array([0, np.inf], np.float16)) == "NaN or infinite"
    assert bad_feature(np.zeros(2, np.float16)) == "zero everywhere"


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def full(path: Path, mode: str):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arra.data.shard_file.open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "a.parquet", make_rows(0, 2), DIMS, COLUMNS)
    assert list(tmp_path.iterdir()) == []
