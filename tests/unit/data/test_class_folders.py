"""ImageNet as it is published: folders of WordNet ids, and the lists of names beside them."""

import json

import pytest
from PIL import Image

from arra.data.sources import Record, Reject, open_source

NAMES = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
    "n02951585": "carpenter's kit, tool kit",
}
CALLED = {
    "n01440764": "tench",
    "n02012849": "crane (n02012849)",
    "n03126707": "crane (n03126707)",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
    "n02951585": "carpenter's kit",
}


def pictures(folder, ids=tuple(NAMES)):
    for id_ in ids:
        (folder / id_).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / id_ / f"{id_}_1.JPEG")
    return folder


def everything(source):
    return list(source.read(0, len(source)))


def texts_of(source):
    return {record.id.split("/")[0]: record.text for record in everything(source)}


FILES = {
    "LOC_synset_mapping.txt": "\n".join(f"{id_} {name}" for id_, name in NAMES.items()),
    "synset_words.txt": "\n".join(f"{id_} {name}" for id_, name in NAMES.items()) + "\n",
    "words.txt": "n00001740\tentity\n" + "\n".join(f"{i}\t{n}" for i, n in NAMES.items()),
    "classes.py": "from collections import OrderedDict\nIMAGENET2012_CLASSES = OrderedDict(\n  {\n"
    + "".join(f"        {json.dumps(id_)}: {json.dumps(name)},\n" for id_, name in NAMES.items())
    + "    }\n)\n",
}


@pytest.mark.parametrize("file", FILES)
def test_lists_of_names(tmp_path, file):
    pictures(tmp_path / "train")
    before = open_source(tmp_path)
    assert texts_of(before) == {id_: id_ for id_ in NAMES}
    (tmp_path / file).write_text(FILES[file])
    source = open_source(tmp_path)
    assert texts_of(source) == CALLED
    assert source.class_names == tuple(CALLED[id_] for id_ in sorted(NAMES))
    assert len(set(source.class_names)) == len(NAMES)  # a model knows classes by their names
    assert source.fingerprint != before.fingerprint
    assert {r.extra["label"] for r in everything(source)} == set(range(6))


def test_keras_index(tmp_path):
    pictures(tmp_path, ("n01484850", "n03710637", "n03710721"))
    index = {"2": ["n01484850", "great_white_shark"], "638": ["n03710637", "maillot"]}
    index["639"] = ["n03710721", "maillot"]
    (tmp_path / "imagenet_class_index.json").write_text(json.dumps(index))
    assert texts_of(open_source(tmp_path)) == {
        "n01484850": "great white shark",
        "n03710637": "maillot (n03710637)",
        "n03710721": "maillot (n03710721)",
    }


def test_the_layout_of_kaggle(tmp_path):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    pictures(root / "train")
    (root / "val").mkdir()
    for number in (1, 2, 3):
        Image.new("RGB", (8, 8)).save(root / "val" / f"ILSVRC2012_val_0000000{number}.JPEG")
    (tmp_path / "LOC_synset_mapping.txt").write_text(FILES["LOC_synset_mapping.txt"])
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n01440764 85 1 499 272 n01440764 1 1 2 2 \n"
        "ILSVRC2012_val_00000001,n02951585 1 1 2 2 \n"
    )
    source = open_source(root, split="val")
    first, second, third = everything(source)
    assert isinstance(first, Record)
    assert (first.text, second.text) == ("carpenter's kit", "tench")
    assert second.extra == {"label": 0}
    assert third == Reject(2, "ILSVRC2012_val_00000003.JPEG", "the image lies in no class folder")
    assert texts_of(open_source(root, split="train")) == CALLED


def test_other_folders_keep_their_names(tmp_path):
    for kind in ("n01440764", "blue_bird"):
        pictures(tmp_path / "d", (kind,))
    (tmp_path / "words.txt").write_text(FILES["words.txt"])
    assert texts_of(open_source(tmp_path / "d")) == {
        "n01440764": "n01440764",
        "blue_bird": "blue bird",
    }
    assert open_source(tmp_path / "d").class_names == ("blue_bird", "n01440764")


def test_a_list_that_says_nothing(tmp_path):
    pictures(tmp_path, ("n01440764",))
    (tmp_path / "words.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=r"words\.txt lists no names"):
        open_source(tmp_path)
