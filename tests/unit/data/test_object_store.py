"""Sources and datasets in an object store: the bytes of local ones, ranges instead of downloads."""

import io
import json
import sys
import tarfile

import bucket_store
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket_store import BucketStore, fill, stored
from PIL import Image
from red_models import RedEncoder, RedTokenizer, config, content, make_source

from arra.cli import main
from arra.data import job as module
from arra.data.images import BadImage, load_rgb
from arra.data.manifest import read_manifest
from arra.data.prepare import prepare
from arra.data.shards import open_dataset
from arra.data.sources import open_source
from arra.files import atomic_write, place, read_json, sha256_of, write_sealed


@pytest.fixture(autouse=True)
def empty_store(monkeypatch):
    pytest.importorskip("upath")
    BucketStore.objects.clear()
    BucketStore.fetched.clear()
    monkeypatch.setattr(module, "load_encoder", lambda spec, device, grids, dtype: RedEncoder())


def png(level, size=20):
    data = io.BytesIO()
    Image.new("RGB", (size, size), (level, 0, 7)).save(data, "PNG")
    return data.getvalue()


def table_source(folder):
    return make_source(folder, 24)


def parquet_source(folder):
    """Images in the tables, and one as a path beside them."""
    folder.mkdir()
    (folder / "beside.png").write_bytes(png(99))
    for name, first in (("train-0", 0), ("train-1", 12), ("val-0", 24)):
        rows = [
            {"image": {"bytes": png(first + i), "path": None}, "text": f"red {first + i}"}
            for i in range(12)
        ]
        rows[3]["image"] = {"bytes": None, "path": "beside.png"}
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=5)
    return folder


def tar_source(folder):
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in range(10):
                meta = json.dumps({"caption": f"red {i}", "seen": i}).encode()
                for part, data in (("png", png(10 * number + i)), ("json", meta)):
                    info = tarfile.TarInfo(f"{i:04d}.{part}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def class_source(folder):
    for name in ("cats", "small_dogs"):
        (folder / name / "more").mkdir(parents=True)
        for i in range(6):
            (folder / name / ("more" if i % 2 else "") / f"{i}.png").write_bytes(png(i))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "0.png").write_bytes(png(0))
    return folder


def caption_source(folder):
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.png").write_bytes(png(i))
        (folder / f"{i}.txt").write_text(f"red {i}")
    return folder


SOURCES = [table_source, parquet_source, tar_source, class_source, caption_source]


@pytest.mark.parametrize("make", SOURCES)
def test_the_bytes_of_a_local_preparation(tmp_path, make):
    source = make(tmp_path / "in")
    local = content(prepare(config(source, tmp_path / "out"), RedTokenizer()))
    url = fill("mine/in", source)
    out = prepare(config(url, place("bucket://mine/out")), RedTokenizer())
    assert str(out) == "bucket://mine/out"
    remote = stored("mine/out")
    assert list(remote) == list(local)
    for name in local:
        if name != "manifest.json":
            assert remote[name] == local[name], name
    manifest = read_manifest("bucket://mine/out")
    assert manifest.source["name"] == url
    assert manifest.splits == read_manifest(tmp_path / "out").splits
    there, here = open_dataset("bucket://mine/out"), open_dataset(tmp_path / "out")
    assert (there.ids, there.texts) == (here.ids, here.texts)
    assert np.array_equal(there.features["red"], here.features["red"])
    assert all(map(np.array_equal, there.image_ids, here.image_ids))
    assert there.column("text") == here.column("text")


def test_what_is_finished_stays_and_what_is_damaged_is_made_anew(tmp_path):
    source = table_source(tmp_path / "in")
    asked = config(source, place("bucket://b/out"))
    prepare(asked, RedTokenizer())
    whole = stored("b/out")
    tokenizer = RedTokenizer()
    prepare(asked, tokenizer)
    assert tokenizer.batches == []
    del BucketStore.objects["b/out/train-00000.parquet"]
    BucketStore.objects["b/out/train-00001.parquet"] += b"?"
    with pytest.raises(FileNotFoundError, match=r"bucket://b/out/train-00000\.parquet is missing"):
        open_dataset("bucket://b/out")
    BucketStore.objects["b/out/val-00000.parquet"] += b"?"
    with pytest.raises(ValueError, match=r"bucket://b/out/val-.* is damaged"):
        open_dataset("bucket://b/out", "val")
    prepare(asked, tokenizer)
    assert stored("b/out") == whole
    assert sum(map(len, tokenizer.batches)) == 10 + 10 + 2
    with pytest.raises(ValueError, match="bucket://b/out was begun with other settings: --size"):
        prepare(config(source, place("bucket://b/out"), size=24), RedTokenizer())


def test_a_range_is_fetched_not_the_file(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0).bytes(2_000_000)
    rows = [{"image": noise, "text": f"red {i}"} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=1)
    url = fill("b/in", folder)
    source = open_source(url)
    BucketStore.fetched.clear()
    (record,) = source.read(4, 5)
    assert record.text == "red 4"
    assert record.image == noise
    assert sum(size for _, size in BucketStore.fetched) < 2_200_000


def test_a_missing_image_is_a_reject_with_its_url():
    with pytest.raises(BadImage, match=r"missing file bucket://b/0\.png"):
        load_rgb(place("bucket://b/0.png"))


def test_nothing_there_is_told_as_for_paths():
    with pytest.raises(FileNotFoundError, match="source bucket://b/in does not exist"):
        open_source("bucket://b/in")
    with pytest.raises(FileNotFoundError, match="bucket://b/in is no prepared dataset"):
        open_dataset("bucket://b/in")


# ---- files ---------------------------------------------------------------------------------------


def test_a_put_is_whole_or_not_at_all(tmp_path):
    url = "bucket://b/a.json"
    write_sealed(url, {"x": 1}, only_new=True)
    with pytest.raises(FileExistsError):
        write_sealed(url, {"x": 2}, only_new=True)
    with pytest.raises(ZeroDivisionError), atomic_write(url) as temporary:
        temporary.write_text(str(1 / 0))
    assert read_json(url)["x"] == 1
    assert list(BucketStore.objects) == ["b/a.json"]
    write_sealed(url, {"x": 3})
    assert read_json(url)["x"] == 3
    local = tmp_path / "same"
    local.write_bytes(BucketStore.objects["b/a.json"])
    assert sha256_of(url) == sha256_of(local)


def test_paths_stay_paths(tmp_path):
    assert place(tmp_path) is tmp_path
    assert place(f"file://{tmp_path}") == tmp_path
    assert place("a/b") == place("file://a/b")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://b/x", "nosuch://b/x cannot be opened"),
        ("sftp://me:secret@host/x", "a sftp:// URL holds a password"),
        ("s3://b/x", r"s3://b/x: s3:// needs a package .* pip install s3fs"),
        ("gs://b/x", r"pip install gcsfs"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence_without_secrets(url, words, monkeypatch, capsys):
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=words) as error:
        place(url)
    assert "secret" not in str(error.value)
    code = main(["prepare", url, "--image-tokenizer", "builtin:scenes", "--out", "out"])
    assert code == 1
    assert "secret" not in capsys.readouterr().err


def test_a_signed_url_is_not_repeated(tmp_path, capsys):
    fill("b/in", table_source(tmp_path / "in"))
    signed = "bucket://b/in?X-Signature=secret"
    with pytest.raises(ValueError, match="bucket://b/in has no option 'X-Signature'") as error:
        open_source(signed)
    assert "secret" not in str(error.value)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ValueError, match=r"pip install 'arra\[store\]'"):
        place("bucket://b/x")


def test_a_store_that_does_not_answer_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(BucketStore, "answers", False)
    asked = ["prepare", "bucket://b/in", "--image-tokenizer", "builtin:scenes"]
    assert main([*asked, "--out", "bucket://b/out"]) == 1
    said = capsys.readouterr().err
    assert "bucket://b/in cannot be reached (ConnectionAbortedByPeer: no credentials found)" in said
    assert len(said.splitlines()) == 1


def test_the_command_takes_urls(tmp_path, capsys):
    url = fill("b/in", table_source(tmp_path / "in"))
    flags = "--image-tokenizer builtin:scenes --size 32 --val-fraction 0 --workers 0"
    assert main(["prepare", url, *flags.split(), "--out", "bucket://b/out"]) == 0
    assert capsys.readouterr().out == "bucket://b/out\n"
    assert open_dataset("bucket://b/out").ids == [f"id{i}" for i in range(24)]
    assert bucket_store.stored("b/out")["plan.json"]
