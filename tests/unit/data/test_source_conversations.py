"""Conversations in the format of the paper's release: one row per image, taken whole or not."""

import json

import pytest
from PIL import Image

from arra.data.images import load_rgb
from arra.data.sources import Record, Reject, open_source


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


def turns(*values):
    speakers = ("human", "gpt")
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


def write(path, items):
    path.write_text(json.dumps(items))
    return path


def everything(source):
    return list(source.read(0, len(source)))


def test_as_the_release_writes_it(tmp_path):
    file = "./datasets/MIMIC-CXR/files/p19/p19000001/s50000001/a-b.png"
    picture(tmp_path / file, 5)
    caption = "AP view chest x-ray image, No acute cardiopulmonary process."
    item = {"conversations": turns(caption, "<|image|>"), "image": [file]}
    source = open_source(write(tmp_path / "in_filename.json", [item]))
    (record,) = everything(source)
    assert (source.splits, source.split) == (("train",), "train")
    assert (record.id, record.text) == ("0", caption)
    assert record.extra == {"sample": "0", "image_index": 0}
    assert load_rgb(record.image).getpixel((0, 0))[0] == 5


def test_several_images_share_a_sample(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    items = [
        {
            "id": "talk",
            "conversations": turns("first<|image|>", "answer <|image|>then", "<|image|> bye"),
            "image": ["0.png", "1.png", "2.png"],
        },
        {"conversations": turns("<|image|>what is it?", "a cat"), "image": "0.png"},
        {"conversations": turns("<image>\nwhat?", "a dog"), "image": "0.png"},
        {"conversations": turns("<|image|><|image|>", "two"), "image": ["0.png", "1.png"]},
    ]
    source = open_source(write(tmp_path / "val.json", items))
    records = everything(source)
    assert source.split == "val"
    assert [r.text for r in records] == [
        "first",
        "answer",
        "then <image> bye",
        "<image> what is it?\na cat",
        "<image> what?\na dog",
        "<image>",
        "<image> two",
    ]
    assert [r.extra["sample"] for r in records] == ["talk"] * 3 + ["1", "2", "3", "3"]
    assert [r.extra["image_index"] for r in records] == [0, 1, 2, 0, 0, 0, 1]
    assert [r.id for r in records][:4] == ["talk/0", "talk/1", "talk/2", "1"]
    assert [r.row for r in records] == list(range(7))
    assert list(source.read(1, 3)) == records[1:3]
    assert source.groups[:4] == ["group talk"] * 3 + ["group 1"]


def test_bad_conversations_are_rejected_whole(tmp_path):
    picture(tmp_path / "0.png")
    two = turns("a<|image|>", "b<|image|>")
    items = [
        {"conversations": two, "image": ["0.png", "missing.png"]},
        {"conversations": two, "image": ["0.png"]},
        {"conversations": two, "image": ["0.png", "../0.png"]},
        {"conversations": turns("words", "only")},
        {"conversations": [{"from": "human"}], "image": ["0.png"]},
        {"image": ["0.png"]},
        {"conversations": turns("", "<|image|>"), "image": ["0.png"]},
        {"conversations": turns("an <image>", "<|image|>"), "image": ["0.png"]},
        7,
        {"id": "x", "conversations": turns("fine", "<|image|>"), "image": ["0.png"]},
        {"id": "x", "conversations": turns("again", "<|image|>"), "image": ["0.png"]},
    ]
    got = everything(open_source(write(tmp_path / "data.json", items)))
    assert [i.text for i in got if isinstance(i, Record)] == ["fine"]
    expected = ["missing", "missing", "2 times", "leaves", "leaves", "no image", "no text"]
    expected += ["no conversation", "no words", "<image>", "not a JSON object", "duplicate"]
    rejects = [i for i in got if isinstance(i, Reject)]
    assert [i.row for i in got] == list(range(13))
    for item, part in zip(rejects, expected, strict=True):
        assert part in item.reason


def test_jsonl_and_another_folder_of_images(tmp_path):
    picture(tmp_path / "pictures" / "0.png", 9)
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "test.jsonl"
    item = {"conversations": turns("x", "<|image|>"), "image": ["0.png"]}
    path.write_text(json.dumps(item) + "\n{oh\n")
    source = open_source(f"{path}?images={tmp_path}/pictures")
    record, reject = everything(source)
    assert load_rgb(record.image).getpixel((0, 0))[0] == 9
    assert "not valid JSON" in reject.reason
    with pytest.raises(ValueError, match="no folder"):
        open_source(f"{path}?images={tmp_path}/nowhere")


def test_cut_file_and_tables_that_are_no_conversations(tmp_path):
    item = {"conversations": turns("x", "<|image|>"), "image": ["0.png"]}
    path = write(tmp_path / "data.json", [item, item])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not valid JSON"):
        open_source(path)
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "text": "t"}\n')
    assert everything(open_source(tmp_path / "t.jsonl"))[0].text == "t"
