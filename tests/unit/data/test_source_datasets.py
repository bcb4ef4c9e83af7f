"""Hugging Face data sets: folders of save_to_disk, and streaming from Parquet elsewhere.

There is no hub here: its place is taken by local files and by fsspec's filesystem in memory.
"""

import io
from types import SimpleNamespace

import pytest
from PIL import Image

from arra.data.captions import CaptionColumns
from arra.data.images import load_rgb
from arra.data.source_datasets import _converted, open_streamed
from arra.data.source_parquet import ParquetSource
from arra.data.sources import Record, Reject, open_source

datasets = pytest.importorskip("datasets")
UPath = pytest.importorskip("upath").UPath
TEXT = CaptionColumns()


def png(shade):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


def made(count, first=0):
    shades = range(first, first + count)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["even", "odd"]),
            "captions": datasets.Sequence(datasets.Value("string")),
        }
    )
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in shades],
        "text": [f"shade {i}" for i in shades],
        "label": [i % 2 for i in shades],
        "captions": [[f"a{i}", f"b{i}"] for i in shades],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def everything(source):
    return list(source.read(0, len(source)))


def shade_of(record):
    return load_rgb(record.image).getpixel((0, 0))[0]


def test_a_dataset_saved_to_disk(tmp_path):
    made(5).save_to_disk(tmp_path / "one")
    source = open_source(tmp_path / "one")
    records = everything(source)
    assert source.splits == ("train",)
    assert source.class_names == ("even", "odd")
    assert [shade_of(r) for r in records] == [0, 1, 2, 3, 4]
    assert [r.text for r in records] == [f"shade {i}" for i in range(5)]
    assert list(source.read(1, 3)) == records[1:3]
    (tmp_path / "one").rename(tmp_path / "two")
    assert open_source(tmp_path / "two").fingerprint == source.fingerprint
    by_list = open_source(tmp_path / "two", text_column="captions", captions="join")
    assert [r.text for r in everything(by_list)][1] == "a1 b1"
    by_label = open_source(tmp_path / "two", text_column="label")
    assert [r.text for r in everything(by_label)][:2] == ["even", "odd"]


def test_splits_of_a_dataset_dict_and_damage(tmp_path):
    there = datasets.DatasetDict({"train": made(3), "validation": made(2, first=7)})
    there.save_to_disk(tmp_path / "d")
    assert open_source(tmp_path / "d").splits == ("train", "val")
    val = open_source(tmp_path / "d", split="val")
    assert [shade_of(r) for r in everything(val)] == [7, 8]
    (tmp_path / "d" / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        open_source(tmp_path / "d")


@pytest.fixture
def remote(tmp_path):
    """Two Parquet files of three row groups each, in memory, as paths of an object store."""
    root = UPath("memory:///streamed")
    for number in range(2):
        file = tmp_path / f"{number}.parquet"
        made(6, first=6 * number).to_parquet(file, batch_size=2)
        path = root / "default" / "train" / f"{number:04d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())
    yield root
    root.fs.rm("/streamed", recursive=True)


def builder(files, name="parquet", config="default"):
    return SimpleNamespace(name=name, config=SimpleNamespace(data_files=files, name=config))


def test_streaming_reads_only_the_row_groups_of_a_range(remote, monkeypatch):
    files = {"train": [str(p) for p in sorted(remote.glob("default/train/*.parquet"), key=str)]}
    read = []
    plain = ParquetSource._read_group

    def recorded(self, number, group, columns):
        read.append((number, group))
        return plain(self, number, group, columns)

    monkeypatch.setattr(ParquetSource, "_read_group", recorded)
    source = open_streamed("owner/name", builder(files), None, TEXT, "image")
    assert len(source) == 12
    assert read == []  # the footers alone say how many rows there are
    assert [shade_of(r) for r in source.read(7, 9)] == [7, 8]
    assert read == [(1, 0), (1, 1)]
    assert [r.text for r in source.read(0, 1)] == ["shade 0"]
    assert [shade_of(r) for r in everything(source)] == list(range(12))
    again = open_streamed("owner/name", builder(files), None, TEXT, "image")
    assert again.fingerprint == source.fingerprint


def test_streaming_of_other_formats_goes_through_the_hubs_copy(remote):
    found = _converted(remote, "default")
    assert {split: [p.name for p in files] for split, files in found.items()} == {
        "train": ["0000.parquet", "0001.parquet"]
    }
    (remote / "default" / "partial-test").mkdir()
    (remote / "default" / "partial-test" / "0000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only the beginning \(partial-test\)"):
        _converted(remote, "default")


def test_streaming_of_local_files_is_the_same_source(tmp_path):
    made(4).to_parquet(tmp_path / "train.parquet", batch_size=2)
    real = datasets.load_dataset_builder(
        "parquet", data_files={"train": str(tmp_path / "train.parquet")}
    )
    source = open_streamed("local", real, "train", TEXT, "image")
    plain = open_source(tmp_path / "train.parquet")
    assert source.fingerprint == plain.fingerprint
    assert everything(source) == everything(plain)
    assert all(isinstance(item, Record) for item in everything(source))


def test_a_lost_connection_stops_the_work_with_a_word(remote):
    files = {"train": [str(remote / "default" / "train" / "0000.parquet")]}
    source = open_streamed("owner/name", builder(files), None, TEXT, "image")

    def broken(*_, **__):
        raise OSError("connection reset")

    source._files[0] = SimpleNamespace(read_row_group=broken)
    with pytest.raises(ValueError, match=r"connection reset.*the same command again goes on"):
        everything(source)


def test_what_cannot_be_streamed(monkeypatch):
    with pytest.raises(ValueError, match=r"streaming=no is not one of yes"):
        open_source("owner/name?streaming=no")
    with pytest.raises(ValueError, match=r"has no option 'rows'; .*streaming, config"):
        open_source("owner/name?rows=3")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names: builder({}))
    with pytest.raises(ValueError, match="cannot be streamed"):
        open_source("owner/name?streaming=yes&config=small")


def test_an_undecodable_caption_in_a_list_rejects_its_row_alone(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.ListArray.from_arrays(
        [0, 1, 3],
        pa.StringArray.from_buffers(
            3,
            pa.py_buffer(b"\x00\x00\x00\x00\x04\x00\x00\x00\x06\x00\x00\x00\x07\x00\x00\x00"),
            pa.py_buffer(b"fine\xff\xfex"),
        ),
    )
    images = pa.array([{"bytes": png(1), "path": None}] * 2)
    pq.write_table(pa.table({"image": images, "text": bad}), tmp_path / "d.parquet")
    items = everything(open_source(tmp_path / "d.parquet"))
    assert items[0].text == "fine"
    assert items[1] == Reject(1, "train/1", "the caption is not valid UTF-8")
