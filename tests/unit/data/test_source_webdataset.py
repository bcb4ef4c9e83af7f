"""WebDataset tars and img2dataset's output: rows by offsets, nothing extracted, damage named."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from arra.data.images import load_rgb
from arra.data.sources import Record, Reject, open_source


def png(shade=0):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                out.addfile(info)
            else:
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


def everything(source):
    return list(source.read(0, len(source)))


def shade_of(record):
    return load_rgb(record.image).getpixel((0, 0))[0]


def img2dataset(folder, shards=2, per_shard=3):
    """The files that img2dataset writes with output_format=webdataset: tar, parquet, stats."""
    for shard in range(shards):
        members, table = [], []
        for i in range(per_shard):
            key = f"{shard:05d}{i:04d}"
            meta = {
                "url": f"https://x.test/{key}.jpg",
                "caption": f"caption {key}",
                "similarity": 0.5 if i else 1,
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 8,
                "height": 8,
                "original_width": 80,
                "original_height": 80,
                "exif": "{}",
                "sha256": "00",
            }
            table.append(meta)
            members += [
                (f"{key}.jpg", png(10 * shard + i)),
                (f"{key}.json", json.dumps(meta).encode()),
                (f"{key}.txt", meta["caption"].encode()),
            ]
        failed = {**table[0], "key": f"{shard:05d}9999", "status": "failed_to_download"}
        failed["error_message"] = "HTTP Error 404: Not Found\nmore"
        tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(pa.Table.from_pylist([*table, failed]), folder / f"{shard:05d}.parquet")
        stats = {"count": per_shard + 1, "successes": per_shard, "failed_to_download": 1}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


def test_img2dataset_output(tmp_path):
    img2dataset(tmp_path)
    source = open_source(tmp_path)
    assert source.splits == ("train",)
    assert len(source) == 8
    assert source.columns["similarity"] is float
    assert source.columns["width"] is int
    assert "caption" not in source.columns
    items = everything(source)
    assert [i.row for i in items] == list(range(8))
    reason = "failed_to_download (HTTP Error 404: Not Found)"
    assert items[3] == Reject(3, "00000/000009999", reason)
    assert items[7] == Reject(7, "00001/000019999", reason)
    records = [item for item in items if isinstance(item, Record)]
    assert [r.id for r in records][2:4] == ["00000/000000002", "00001/000010000"]
    assert [shade_of(r) for r in records] == [0, 1, 2, 10, 11, 12]
    assert [r.text for r in records][3] == "caption 000010000"
    assert records[0].extra["similarity"] == 1.0
    assert records[0].extra["error_message"] is None
    assert list(source.read(2, 6)) == items[2:6]
    assert open_source(tmp_path / "00001.tar").splits == ("train",)


def test_img2dataset_shard_that_lost_samples_is_refused(tmp_path):
    img2dataset(tmp_path, shards=1)
    (tmp_path / "00000_stats.json").write_text('{"successes": 4}')
    with pytest.raises(ValueError, match=r"00000\.tar holds 3 samples.*counts 4"):
        open_source(tmp_path)


def test_a_sample_that_img2dataset_wrote_and_the_tar_has_not_is_a_reject(tmp_path):
    img2dataset(tmp_path, shards=1)
    tar(tmp_path / "00000.tar", [("000000001.jpg", png(1)), ("000000001.txt", b"only this")])
    before = open_source(tmp_path)
    items = everything(before)
    assert [type(i) for i in items] == [Record, Reject, Reject, Reject]
    assert items[1].id == "00000/000000000"
    assert items[1].reason == "img2dataset wrote the image, but it is not in the tar"
    table = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    table[-1]["error_message"] = None
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "00000.parquet")
    assert everything(open_source(tmp_path))[3].reason == "failed_to_download (no reason given)"
    assert open_source(tmp_path).fingerprint != before.fingerprint
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"00000\.parquet is damaged"):
        open_source(tmp_path)


def test_laion_cocos_columns(tmp_path):
    """Captions of LAION-COCO: `top_caption`, and all of them as a list."""
    meta = {"top_caption": "best", "all_captions": ["best", "second"], "punsafe": 0.1}
    meta |= {"LANGUAGE": "en", "similarity": 0.31, "TEXT": "alt text", "key": "0"}
    tar(tmp_path / "0.tar", [("0.jpg", png(1)), ("0.json", json.dumps(meta).encode())])
    for column, which, text in (
        ("top_caption", "first", "best"),
        ("all_captions", "first", "best"),
        ("all_captions", "join", "best second"),
        ("missing_there,TEXT", "first", "alt text"),
        ("top_caption,TEXT", "join", "best alt text"),
    ):
        source = open_source(tmp_path, text_column=column, captions=which)
        assert everything(source)[0].text == text
        assert source.columns["punsafe"] is float
    (record,) = everything(open_source(tmp_path, text_column="top_caption"))
    assert json.loads(record.extra["all_captions"]) == ["best", "second"]


def test_splits_of_names_and_folders(tmp_path):
    tar(tmp_path / "a" / "train-0000.tar", [("x.png", png(1)), ("x.txt", b"one")])
    tar(tmp_path / "a" / "val-0000.tar", [("x.png", png(2)), ("x.txt", b"two")])
    assert open_source(tmp_path / "a").splits == ("train", "val")
    assert everything(open_source(tmp_path / "a", split="val"))[0].text == "two"
    tar(tmp_path / "b" / "test" / "0000.tar", [("x.webp", png(1)), ("x.txt", b"three")])
    source = open_source(tmp_path / "b")
    assert source.split == "test"
    assert everything(source)[0].id == "test/0000/x"


def test_caption_from_json_or_a_named_part(tmp_path):
    meta = json.dumps({"caption": "from json", "alt": "other", "n": 3}).encode()
    path = tar(
        tmp_path / "data.tar",
        [("s/a.left.png", png(1)), ("s/a.right.png", png(2)), ("s/a.json", meta)],
    )
    source = open_source(path, image_column="right.png")
    (record,) = everything(source)
    assert (record.text, shade_of(record), record.id) == ("from json", 2, "data/s/a")
    assert record.extra == {"alt": "other", "n": 3}
    assert source.groups is None
    assert everything(open_source(path, text_column="alt", image_column="left.png"))[0].text == (
        "other"
    )
    with pytest.raises(ValueError, match=r"no column 'title'.*alt, caption, n"):
        open_source(path, text_column="title", image_column="left.png")
    with pytest.raises(ValueError, match=r"no column 'image'.*left\.png, right\.png"):
        open_source(path)


def test_bad_samples_become_rejects_with_reasons(tmp_path):
    good = [("ok.png", png(7)), ("ok.txt", b"fine")]
    members = [
        ("noimage.txt", b"words"),
        ("empty.png", png()),
        ("empty.txt", b"  "),
        ("nothing.png", png()),
        ("two.png", png()),
        ("two.jpg", png()),
        ("two.txt", b"x"),
        ("latin.png", png()),
        ("latin.txt", b"\xff\xfe\xfd"),
        ("broken.png", png()),
        ("broken.json", b"{"),
        ("link.png", "/etc/passwd"),
        ("link.txt", b"x"),
        ("../../up.png", png()),
        ("../../up.txt", b"x"),
        ("/abs.png", png()),
        ("/abs.txt", b"x"),
        *good,
        ("between.png", png()),
        ("between.txt", b"x"),
        *good,
        ("key.png", png()),
        ("key.json", b'{"caption": "x", "\\ud800": 1}'),
    ]
    source = open_source(tar(tmp_path / "data.tar", members))
    items = everything(source)
    reasons = {i.row: i.reason for i in items if isinstance(i, Reject)}
    for row, part in {
        0: "image is missing",
        1: "caption is empty",
        2: "caption is missing",
        3: "several images",
        4: "not valid UTF-8",
        5: "not valid JSON",
        6: "link",
        7: "no plain relative path",
        8: "no plain relative path",
        11: "duplicate id, first seen in row 9",
        12: "key of the JSON part",
    }.items():
        assert part in reasons.pop(row)
    assert not reasons
    assert [i.text for i in items if isinstance(i, Record)] == ["fine", "x"]
    assert list(tmp_path.iterdir()) == [tmp_path / "data.tar"]  # nothing was extracted


def test_damaged_tars_are_named(tmp_path):
    members = [(f"{i}.{part}", data) for i in range(3) for part, data in (("png", png(i)),)]
    path = tar(tmp_path / "data.tar", [(f"{n}", d) for n, d in members] + [("2.txt", b"x")])
    whole = path.read_bytes()
    cuts = [0, 100, 512, 700, 1024, 1500, 2048, 3000, 4096]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"data\.tar is (damaged|cut)"):
            open_source(path)
    for at in (0, 1024, 2048, 3072):  # every header
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"data\.tar is damaged"):
            open_source(path)
    with tarfile.open(tmp_path / "z.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="compressed"):
        open_source(tmp_path / "z.tar")


def test_fingerprint_sees_captions_and_parquet_beside_other_tars_stays_parquet(tmp_path):
    path = tmp_path / "data.tar"
    tar(path, [("x.png", png()), ("x.txt", b"one")])
    before = open_source(path).fingerprint
    assert open_source(path).fingerprint == before
    tar(path, [("x.png", png()), ("x.txt", b"two")])
    assert open_source(path).fingerprint != before
    pq.write_table(pa.table({"image": [png()], "text": ["t"]}), tmp_path / "other.parquet")
    assert everything(open_source(tmp_path))[0].text == "t"


def test_options_are_refused_where_there_are_none(tmp_path):
    tar(tmp_path / "data.tar", [("x.png", png()), ("x.txt", b"one")])
    with pytest.raises(ValueError, match="no option 'a'"):
        open_source(f"{tmp_path}/data.tar?a=b")
    with pytest.raises(ValueError, match="NAME=VALUE"):
        open_source(f"{tmp_path}/data.tar?a")
