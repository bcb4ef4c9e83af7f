"""COCO captions: one row per caption or per image, in the official folders."""

import json

import pytest
from PIL import Image

from arra.data.images import load_rgb
from arra.data.sources import Record, Reject, open_source


def coco(folder, split="train", year="2017", place="{split}{year}", images=2, captions=3):
    """Folders and keys as in the official annotations_trainval2017.zip and train2017.zip."""
    root = folder / place.format(split=split, year=year)
    root.mkdir(parents=True, exist_ok=True)
    listed, annotations = [], []
    for i in range(images):
        number = 100 + i
        file = f"{number:012d}.jpg"
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(root / file)
        listed.append(
            {
                "license": 3,
                "file_name": file,
                "coco_url": f"http://images.cocodataset.org/{split}{year}/{file}",
                "height": 16,
                "width": 16,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": "http://farm.test/1.jpg",
                "id": number,
            }
        )
    for k in range(captions):  # captions of one image do not follow each other in the file
        for i in range(images):
            annotations.append({"image_id": 100 + i, "id": 10 * i + k, "caption": f"c{k} of {i}. "})
    content = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"url": "", "id": 3, "name": ""}],
        "images": listed,
        "annotations": annotations,
    }
    write(folder, content, split, year)
    return content


def write(folder, content, split="train", year="2017"):
    (folder / "annotations").mkdir(exist_ok=True)
    path = folder / "annotations" / f"captions_{split}{year}.json"
    path.write_text(json.dumps(content))


def everything(source):
    return list(source.read(0, len(source)))


@pytest.mark.parametrize("place", ["{split}{year}", "images/{split}{year}", "images"])
def test_one_row_per_caption(tmp_path, place):
    coco(tmp_path, place=place)
    source = open_source(tmp_path)
    records = everything(source)
    assert [r.text for r in records] == [f"c{k} of {i}." for i in range(2) for k in range(3)]
    assert [r.id for r in records] == ["0", "1", "2", "10", "11", "12"]
    assert records[4].extra == {"image_id": 101, "caption_index": 1}
    assert records[4].row == 4
    assert source.groups == ["group 100"] * 3 + ["group 101"] * 3
    assert load_rgb(records[4].image).getpixel((0, 0))[0] == pytest.approx(40, abs=3)
    assert list(source.read(2, 4)) == records[2:4]


def test_first_caption_only_and_splits(tmp_path):
    coco(tmp_path)
    coco(tmp_path, "val", images=1)
    source = open_source(f"{tmp_path}?captions=first")
    assert source.splits == ("train", "val")
    assert [r.text for r in everything(source)] == ["c0 of 0.", "c0 of 1."]
    assert source.fingerprint != open_source(tmp_path).fingerprint
    assert len(open_source(tmp_path, split="val")) == 3
    with pytest.raises(ValueError, match="captions=some is not one of all, first"):
        open_source(f"{tmp_path}?captions=some")


def test_one_of_several_captions_of_an_image(tmp_path):
    coco(tmp_path, captions=5)
    joined = everything(open_source(f"{tmp_path}?captions=join"))
    assert [r.text for r in joined] == [" ".join(f"c{k} of {i}." for k in range(5)) for i in (0, 1)]
    assert [r.id for r in joined] == ["0", "10"]
    drawn = set()
    for seed in range(12):
        source = open_source(tmp_path, captions="random", seed=seed)
        records = everything(source)
        assert [r.extra["image_id"] for r in records] == [100, 101]
        for i, record in enumerate(records):
            assert record.text == f"c{record.extra['caption_index']} of {i}."
        assert everything(open_source(tmp_path, captions="random", seed=seed)) == records
        drawn.add(tuple(r.text for r in records))
    assert len(drawn) > 5


def test_years(tmp_path):
    coco(tmp_path)
    coco(tmp_path, year="2014", images=1)
    with pytest.raises(ValueError, match="2014, 2017; choose with"):
        open_source(tmp_path)
    assert len(open_source(f"{tmp_path}?year=2014")) == 3


def test_bad_rows(tmp_path):
    content = coco(tmp_path, images=5, captions=1)
    content["images"][0]["file_name"] = "../../x.jpg"
    content["annotations"][1]["caption"] = " "
    content["annotations"][2]["image_id"] = 7
    content["annotations"][4]["id"] = content["annotations"][3]["id"]
    content["images"].append(17)
    write(tmp_path, content)
    items = everything(open_source(tmp_path))
    assert [type(i) for i in items] == [Reject, Reject, Reject, Record, Reject, Reject, Reject]
    assert [i.row for i in items] == list(range(7))
    for item, part in zip(
        [*items[:3], *items[4:]],
        ["leaves", "empty", "no caption", "duplicate", "no number", "not listed"],
        strict=True,
    ):
        assert part in item.reason


def test_captions_without_a_number(tmp_path):
    content = coco(tmp_path, images=1, captions=2)
    content["annotations"][0]["id"] = "\ud800"
    write(tmp_path, content)
    reject, record = everything(open_source(tmp_path))
    assert (reject.id, reject.reason) == (None, "the caption has no number")
    assert record.text == "c1 of 0."


def test_files_that_are_no_captions(tmp_path):
    coco(tmp_path)
    path = tmp_path / "annotations" / "captions_train2017.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not valid JSON"):
        open_source(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no lists `images`"):
        open_source(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="none of the folders train2017"):
        open_source(tmp_path)
