"""DeepEyeNet in its official folders and keys; every description here is made up."""

import json

import pytest
from PIL import Image

from arra.data.images import load_rgb
from arra.data.sources import Reject, open_source

PARTS = {"train": "train_set", "valid": "val_set", "test": "test_set"}


def deepeyenet(folder, part="train", images=2):
    content = []
    for i in range(images):
        file = f"eyenet0420/{PARTS[part]}/a-disease-{i}.jpg"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / file)
        fields = {"keywords": f"word {i}, other", "clinical-description": f"{part} eye {i}. "}
        content.append({file: fields})
    write(folder, part, content)
    return content


def write(folder, part, content):
    (folder / f"DeepEyeNet_{part}.json").write_text(json.dumps(content))


def everything(source):
    return list(source.read(0, len(source)))


def test_official_layout(tmp_path):
    for part in PARTS:
        deepeyenet(tmp_path, part)
    source = open_source(tmp_path)
    assert (source.split, source.splits) == ("train", ("train", "val", "test"))
    records = everything(source)
    assert [r.text for r in records] == ["train eye 0.", "train eye 1."]
    assert records[1].id == "eyenet0420/train_set/a-disease-1.jpg"
    assert records[1].extra == {"keywords": "word 1, other"}
    assert load_rgb(records[1].image).getpixel((0, 0))[0] == pytest.approx(40, abs=3)
    assert list(source.read(1, 2)) == records[1:]
    words = open_source(tmp_path, split="val", text_column="keywords")
    assert everything(words)[0].text == "word 0, other"
    assert everything(words)[0].extra == {"clinical-description": "valid eye 0. "}
    with pytest.raises(ValueError, match=r"no column 'label'.*clinical-description, keywords"):
        open_source(tmp_path, text_column="label")


def test_bad_rows_and_files(tmp_path):
    content = deepeyenet(tmp_path, images=3)
    content[1] = {"../up.jpg": {"clinical-description": "x"}}
    content += [content[0], {"a.jpg": {"keywords": "k", "clinical-description": ""}}, [], {"b": 1}]
    write(tmp_path, "train", content)
    items = everything(open_source(tmp_path))
    assert [i.row for i in items] == list(range(7))
    reasons = {i.row: i.reason for i in items if isinstance(i, Reject)}
    for row, part in {
        1: "leaves",
        3: "duplicate id, first seen in row 0",
        4: "empty",
        5: "not an image path",
        6: "not an image path",
    }.items():
        assert part in reasons.pop(row)
    assert not reasons
    path = tmp_path / "DeepEyeNet_train.json"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not valid JSON"):
        open_source(tmp_path)
