"""Sources: rows in a fixed order, bad ones as rejects with a reason, errors that say why."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from arra.data.images import load_rgb
from arra.data.sources import FIRST_SPLIT, Record, Reject, Rows, open_source, split_of


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    return path


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")


def everything(source):
    return list(source.read(0, len(source)))


def shade_of(record):
    return load_rgb(record.image).getpixel((0, 0))[0]


def only_reasons(source):
    return {item.row: item.reason for item in everything(source) if isinstance(item, Reject)}


# ---- tables -------------------------------------------------------------------------------------


def test_jsonl_rows_in_order_with_typed_extras(tmp_path):
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", i)
    rows = [
        {"image": f"images/{i}.png", "text": f"täxt {i}", "label": i, "score": i / 2, "ok": i > 0}
        for i in range(3)
    ]
    rows[1]["tags"] = ["a", "b"]
    rows[2]["score"] = 1
    jsonl(tmp_path / "data.jsonl", rows)
    source = open_source(tmp_path / "data.jsonl")
    assert source.columns == {"label": int, "score": float, "ok": bool, "tags": str}
    records = everything(source)
    assert [r.id for r in records] == [f"images/{i}.png" for i in range(3)]
    assert [r.text for r in records] == ["täxt 0", "täxt 1", "täxt 2"]
    assert [r.row for r in records] == [0, 1, 2]
    assert [shade_of(r) for r in records] == [0, 1, 2]
    assert records[1].extra == {"label": 1, "score": 0.5, "ok": True, "tags": '["a", "b"]'}
    assert records[2].extra["tags"] is None
    assert [r.id for r in source.read(1, 2)] == ["images/1.png"]


@pytest.mark.parametrize("column", ["image", "file_name", "path", "image_path", "photo"])
def test_image_columns(tmp_path, column):
    picture(tmp_path / "a.png")
    jsonl(tmp_path / "data.jsonl", [{column: "a.png", "caption": "x"}])
    options = {"image_column": "photo"} if column == "photo" else {}
    source = open_source(tmp_path / "data.jsonl", text_column="caption", **options)
    assert shade_of(everything(source)[0]) == 0


def test_csv(tmp_path):
    rows = b'file_name,text,age,code\na.png,"one, two",3,007\nb.png,three,,12\n'
    (tmp_path / "data.csv").write_bytes(b"\xef\xbb\xbf" + rows)
    source = open_source(tmp_path / "data.csv")
    assert source.columns == {"age": int, "code": str}
    records = everything(source)
    assert [r.text for r in records] == ["one, two", "three"]
    assert [r.extra for r in records] == [{"age": 3, "code": "007"}, {"age": None, "code": "12"}]


def test_bad_rows_of_a_jsonl_are_rejected_one_by_one(tmp_path):
    absolute = str(tmp_path / "a.png")
    jsonl(
        tmp_path / "data.jsonl",
        [
            {"path": "a.png", "text": "good"},
            {"path": "a.png", "text": "again"},
            {"path": "b.png", "text": ""},
            {"path": "c.png", "text": " \n"},
            {"path": "d.png"},
            {"path": "e.png", "text": 5},
            b'{"path": "f.png", "text": "\xff\xfe"}',
            b'{"path": "g.png", "text": "lone \\ud800"}',
            b'{"path": "h.png", "text": "cut of',
            b"[1]",
            {"path": "../out.png", "text": "x"},
            {"path": "sub/../../out.png", "text": "x"},
            {"path": absolute, "text": "x"},
            {"path": "", "text": "x"},
            {"path": "sub/../b.png", "text": "inside"},
        ],
    )
    reasons = only_reasons(open_source(tmp_path / "data.jsonl"))
    assert reasons.pop(8).startswith("line 9 is not valid JSON")
    assert reasons == {
        1: "duplicate id, first seen in row 0",
        2: "the caption is empty",
        3: "the caption is empty",
        4: "the caption is missing",
        5: "the caption is not text but int",
        6: "line 7 is not valid UTF-8",
        7: "the caption is not valid UTF-8",
        9: "line 10 is not a JSON object",
        10: "the image path '../out.png' leaves the folder of the table",
        11: "the image path 'sub/../../out.png' leaves the folder of the table",
        12: f"the image path {absolute!r} is absolute: write it relative to the table",
        13: "the image path is missing",
    }


def test_bad_rows_of_a_csv(tmp_path):
    lines = [
        b"file_name,text,id",
        b"a.png,good,1",
        b"b.png,caf\xe9,2",
        b"c.png,one, two,3",
        b"d.png,twice,1",
        b"e.png,,5",
    ]
    (tmp_path / "data.csv").write_bytes(b"\n".join(lines))
    source = open_source(tmp_path / "data.csv")
    assert only_reasons(source) == {
        1: "the caption is not valid UTF-8",
        2: "line 4 has more fields than the header: quote commas",
        3: "duplicate id, first seen in row 0",
        4: "the caption is missing",
    }


def test_missing_columns_list_what_there_is(tmp_path):
    jsonl(tmp_path / "data.jsonl", [{"path": "a.png", "caption": "x", "label": 1}])
    with pytest.raises(ValueError, match=r"no column 'text'.*path, caption, label.*--text-column"):
        open_source(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"no column 'photo' for the image"):
        open_source(tmp_path / "data.jsonl", text_column="caption", image_column="photo")


# ---- folders ------------------------------------------------------------------------------------


def test_folder_with_metadata(tmp_path):
    picture(tmp_path / "x" / "1.png", 1)
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "x/1.png", "text": "one"}])
    (record,) = everything(open_source(tmp_path))
    assert (record.id, record.text, shade_of(record)) == ("x/1.png", "one", 1)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="keep one"):
        open_source(tmp_path)


def test_metadata_per_split_and_at_the_root(tmp_path):
    jsonl(tmp_path / "a" / "train" / "metadata.jsonl", [{"file_name": "1.png", "text": "one"}])
    jsonl(tmp_path / "a" / "test" / "metadata.jsonl", [{"file_name": "2.png", "text": "two"}])
    rows = [{"file_name": f"{s}/{i}.png", "text": s} for i, s in enumerate(("train", "validation"))]
    jsonl(tmp_path / "b" / "metadata.jsonl", rows)
    a = open_source(tmp_path / "a", split="test")
    assert a.splits == ("train", "test")
    assert [r.id for r in everything(a)] == ["2.png"]
    b = open_source(tmp_path / "b", split="validation")
    assert (b.splits, b.split) == (("train", "val"), "val")
    assert [r.id for r in everything(b)] == ["validation/1.png"]


def test_folder_with_caption_files(tmp_path):
    for name, text in {"b": b"two\n", "a": b"one", "c": b"\xff", "e": b" "}.items():
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(text)
    picture(tmp_path / "d.jpg")
    picture(tmp_path / ".hidden.png")
    items = everything(open_source(tmp_path))
    assert [item.id for item in items] == ["a.png", "b.png", "c.png", "d.jpg", "e.png"]
    assert [item.text for item in items[:2]] == ["one", "two"]
    reasons = [item.reason for item in items[2:]]
    assert "not valid UTF-8" in reasons[0]
    assert "missing caption file" in reasons[1]
    assert reasons[2] == "the caption is empty"


def test_folder_with_class_folders(tmp_path):
    for split in ("train", "test"):
        for kind in ("train", "blue_bird"):  # a class may be called train
            picture(tmp_path / split / kind / "1.png")
    picture(tmp_path / "train" / "loose.png")
    source = open_source(tmp_path)
    assert source.splits == ("train", "test")
    assert source.class_names == ("blue_bird", "train")
    first, loose, last = everything(source)
    assert (first.text, first.extra) == ("blue bird", {"label": 0})
    assert (last.text, last.extra) == ("train", {"label": 1})
    assert loose.reason == "the image lies in no class folder"


def test_a_class_called_train_is_no_split(tmp_path):
    for kind in ("car", "train"):
        picture(tmp_path / kind / "1.png")
    assert open_source(tmp_path).splits == ("train",)
    assert [r.text for r in everything(open_source(tmp_path))] == ["car", "train"]


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no captions: add metadata\.jsonl"):
        open_source(tmp_path)


# ---- Parquet ------------------------------------------------------------------------------------


def parquet(path, rows, *, metadata=None, types=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {}
    for name in rows[0]:
        kind = (types or {}).get(name)
        columns[name] = pa.array([row[name] for row in rows], kind)
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, **options)


def cell(tmp_path, shade):
    data = picture(tmp_path / "tmp.png", shade).read_bytes()
    return {"bytes": data, "path": f"{shade}.png"}


def test_parquet_folder_with_splits_and_row_groups(tmp_path):
    rows = [{"image": cell(tmp_path, i), "text": f"t{i}", "n": i} for i in range(10)]
    data = tmp_path / "data"
    parquet(data / "train-00000-of-00002.parquet", rows[:4], row_group_size=3)
    parquet(data / "train-00001-of-00002.parquet", rows[4:7], row_group_size=2)
    parquet(data / "validation-00000.parquet", rows[7:9])
    parquet(data / "test.parquet", rows[9:])
    for folder in (data, tmp_path):  # hub repositories keep them in `data`
        source = open_source(folder)
        assert source.splits == ("train", "val", "test")
        assert len(source) == 7
        assert [shade_of(r) for r in everything(source)] == list(range(7))
        assert [r.id for r in source.read(2, 5)] == ["train/2", "train/3", "train/4"]
        assert [r.extra["n"] for r in source.read(5, 99)] == [5, 6]
        assert len(open_source(folder, split="val")) == 2
    with pytest.raises(ValueError, match="no split 'dev2'; it has train, val, test"):
        open_source(data, split="dev2")
    assert open_source(data, split=FIRST_SPLIT).split == "train"
    assert len(open_source(data / "test.parquet")) == 1


def test_parquet_class_labels_name_classes_and_can_be_captions(tmp_path):
    rows = [{"image": cell(tmp_path, i), "text": "x", "label": i % 2} for i in range(3)]
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    parquet(tmp_path / "d" / "a.parquet", rows, metadata={"info": {"features": features}})
    assert open_source(tmp_path / "d").class_names == ("cat", "dog")
    source = open_source(tmp_path / "d", text_column="label")
    assert [r.text for r in everything(source)] == ["cat", "dog", "cat"]


def test_parquet_bad_rows(tmp_path):
    good = cell(tmp_path, 1)
    rows = [
        {"id": "a", "image": good, "text": b"fine"},
        {"id": "a", "image": good, "text": b"again"},
        {"id": "b", "image": good, "text": b"\xff\xfe"},
        {"id": "c", "image": good, "text": b""},
        {"id": "d", "image": good, "text": None},
        {"id": "e", "image": {"bytes": None, "path": None}, "text": b"x"},
        {"id": "f", "image": None, "text": b"x"},
        {"id": "g", "image": {"bytes": None, "path": "../x.png"}, "text": b"x"},
        {"id": None, "image": good, "text": b"no id"},
    ]
    parquet(tmp_path / "a.parquet", rows, types={"text": pa.binary()})
    table = pq.read_table(tmp_path / "a.parquet")
    column = table.column("text").combine_chunks()
    as_text = pa.StringArray.from_buffers(len(column), *column.buffers()[1:], column.buffers()[0])
    pq.write_table(table.set_column(2, "text", as_text), tmp_path / "b.parquet")
    for name in ("a", "b"):  # binary captions, and a string column that is not UTF-8 at all
        source = open_source(tmp_path / f"{name}.parquet")
        assert only_reasons(source) == {
            1: "duplicate id, first seen in row 0",
            2: "the caption is not valid UTF-8",
            3: "the caption is empty",
            4: "the caption is missing",
            5: "the image is missing",
            6: "the image is missing",
            7: "the image path '../x.png' leaves the folder of the table",
        }
        assert [r.id for r in everything(source) if isinstance(r, Record)] == ["a", "train/8"]


def test_parquet_paths_and_plain_bytes(tmp_path):
    picture(tmp_path / "p.png", 9)
    data = (tmp_path / "p.png").read_bytes()
    parquet(tmp_path / "a.parquet", [{"image": "p.png", "text": "x"}])
    parquet(tmp_path / "b.parquet", [{"image": data, "text": "x"}])
    parquet(tmp_path / "c.parquet", [{"image": {"bytes": None, "path": "p.png"}, "text": "x"}])
    for name in "abc":
        assert shade_of(everything(open_source(tmp_path / f"{name}.parquet"))[0]) == 9


def test_parquet_errors(tmp_path):
    rows = [{"image": cell(tmp_path, 1), "caption": "x", "texts": [1, 2]}]
    parquet(tmp_path / "d" / "a.parquet", rows)
    with pytest.raises(ValueError, match=r"no column 'text'.*image, caption, texts"):
        open_source(tmp_path / "d")
    with pytest.raises(ValueError, match=r"holds list.*not captions"):
        open_source(tmp_path / "d", text_column="texts")
    (tmp_path / "d" / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable Parquet file"):
        open_source(tmp_path / "d", text_column="caption")
    parquet(tmp_path / "d" / "b.parquet", [{"image": b"", "caption": "x"}])
    with pytest.raises(ValueError, match="other columns or types"):
        open_source(tmp_path / "d", text_column="caption")


# ---- all kinds ----------------------------------------------------------------------------------


def test_scenes():
    source = open_source("builtin:scenes", limit=3)
    assert source.splits == ("train", "val", "test", "compositional")
    first = everything(source)
    assert len(first) == 3
    assert first[2].image.size == (64, 64)
    again = next(open_source("builtin:scenes").read(2, 3))
    assert (again.id, again.text) == (first[2].id, first[2].text)
    assert np.array_equal(again.image, first[2].image)
    other = next(open_source("builtin:scenes:1-4", seed=1).read(2, 3))
    assert not np.array_equal(other.image, first[2].image)
    assert len(open_source("builtin:scenes", limit=30_000)) == 30_000
    assert len(open_source("builtin:scenes", split="test", limit=30_000)) == 2_000
    for bad in ("builtin:scenes:0-2", "builtin:scenes:x", "builtin:other"):
        with pytest.raises(ValueError, match=bad):
            open_source(bad)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_source("nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"\.parquet, \.jsonl or \.csv"):
        open_source(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="limit is 0"):
        open_source("builtin:scenes", limit=0)


def test_hub_id_while_offline():
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*cannot be had.*pass their folder"):
        open_source("nobody/nothing")


def test_hub_id_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"install 'arra\[data\]'"):
        open_source("nobody/nothing")


def test_hub_dataset(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [cell(tmp_path, i) for i in range(4)], "text": list("abcd"), "label": [0] * 4}
    names = datasets.ClassLabel(names=["only"])
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": names}
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    there = datasets.DatasetDict({"train": made, "validation": made.select([1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: there)
    source = open_source("owner/name", limit=3)
    assert source.splits == ("train", "val")
    assert source.class_names == ("only",)
    assert [shade_of(r) for r in everything(source)] == [0, 1, 2]
    assert [r.text for r in source.read(1, 3)] == ["b", "c"]
    assert [shade_of(r) for r in everything(open_source("owner/name", split="val"))] == [1]


def test_rows_of_a_source(tmp_path):
    jsonl(tmp_path / "d.jsonl", [{"path": f"{i}.png", "text": str(i)} for i in range(9)])
    source = open_source(tmp_path / "d.jsonl")
    some = Rows(source, [0, 1, 4, 7, 8])
    assert [r.text for r in everything(some)] == ["0", "1", "4", "7", "8"]
    assert [r.row for r in some.read(1, 4)] == [1, 4, 7]
    assert some.fingerprint != source.fingerprint
    limited = open_source(tmp_path / "d.jsonl", limit=2)
    assert [r.text for r in everything(limited)] == ["0", "1"]


def test_fingerprints_follow_the_content(tmp_path):
    rows = [{"path": "a.png", "text": "x"}, {"path": "b.png", "text": "y"}]
    jsonl(tmp_path / "1" / "d.jsonl", rows)
    jsonl(tmp_path / "2" / "d.jsonl", rows)
    first, second = (open_source(tmp_path / n / "d.jsonl") for n in "12")
    assert first.fingerprint == second.fingerprint
    jsonl(tmp_path / "2" / "d.jsonl", rows[::-1])
    assert open_source(tmp_path / "2" / "d.jsonl").fingerprint != first.fingerprint
    for i in range(2):
        parquet(tmp_path / f"{i}.parquet", [{"image": cell(tmp_path, 1), "text": str(i)}])
    a, b = (open_source(tmp_path / f"{i}.parquet") for i in range(2))
    assert a.fingerprint != b.fingerprint


def test_split_names():
    named = {name: split_of(name) for name in ("train-00000-of-1", "Validation", "dev_1", "x")}
    assert named == {"train-00000-of-1": "train", "Validation": "val", "dev_1": "val", "x": None}
