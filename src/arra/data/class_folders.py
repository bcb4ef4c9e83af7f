"""What folders of classes are called: ImageNet's WordNet ids by the names that lie beside them."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from arra.files import read_json

NAME_FILES = (
    "LOC_synset_mapping.txt",
    "synset_words.txt",
    "imagenet_class_index.json",
    "classes.py",
    "words.txt",
)
"""Kaggle's, Caffe's, Keras', the hub's (imagenet-1k) and WordNet's; the first one that is there."""

VAL_LABELS = "LOC_val_solution.csv"
"""Kaggle's classes of the validation images, which lie in no class folder there."""

_UP = 3
"""Kaggle's pictures are in ILSVRC/Data/CLS-LOC, three folders below its tables."""

_ID = re.compile(r"n\d{8}")
_LINE = re.compile(r"^(n\d{8})[ \t]+(\S.*?)\s*$", re.MULTILINE)
_PYTHON = re.compile(r"""(["'])(n\d{8})\1\s*:\s*(["'])(.+?)\3\s*[,})]""")


def are_wordnet_ids(folders: Sequence[str]) -> bool:
    """Whether folders are called n01440764 and the like, as ImageNet's are."""
    return bool(folders) and all(_ID.fullmatch(name) for name in folders)


def class_texts(folder: Path, folders: Sequence[str]) -> dict[str, str]:
    """Folder -> what a class is called.

    It is the folder's own name with `_` as a space; of WordNet ids the first of its names, if a
    list of those lies in the folder or up to three above. Where two classes have the same one
    ("crane", "maillot"), all of a class's names stand, and where those agree its id as well: a
    class-conditional model knows classes by their names.

    Raises:
        ValueError: a list of names that cannot be read.
    """
    texts = {name: name.replace("_", " ") for name in folders}
    path = _beside(folder, NAME_FILES) if are_wordnet_ids(folders) else None
    if path is None:
        return texts
    named = {id_: all_ for id_, all_ in _read(path).items() if id_ in texts}
    short = {id_: all_.split(",")[0].strip() for id_, all_ in named.items()}
    counts, counts_all = Counter(short.values()), Counter(named.values())
    for id_, all_ in named.items():
        if counts[short[id_]] == 1:
            texts[id_] = short[id_]
        else:
            texts[id_] = all_ if counts_all[all_] == 1 else f"{all_} ({id_})"
    return texts


def classes_of_images(folder: Path, folders: Sequence[str]) -> dict[str, str]:
    """File name without suffix -> class folder, for ImageNet's validation images from Kaggle."""
    path = _beside(folder, (VAL_LABELS,)) if are_wordnet_ids(folders) else None
    if path is None:
        return {}
    rows = csv.reader(io.StringIO(_text(path), newline=""))
    known = set(folders)
    return {
        row[0]: row[1].split()[0]
        for row in rows
        if len(row) > 1 and row[1].strip() and row[1].split()[0] in known
    }


def _beside(folder: Path, names: Iterable[str]) -> Path | None:
    folder = folder.resolve()
    places = [folder, *list(folder.parents)[:_UP]]
    found = (place / name for place in places for name in names)
    return next((path for path in found if path.is_file()), None)


def _read(path: Path) -> dict[str, str]:
    """WordNet id -> all names of a class, `tench, Tinca tinca`."""
    if path.suffix == ".json":
        content = read_json(path)
        pairs = content.values() if isinstance(content, Mapping) else ()
        found = {
            str(pair[0]): str(pair[1])
            for pair in pairs
            if isinstance(pair, list) and len(pair) == 2
        }
    elif path.suffix == ".py":
        found = {match[2]: match[4] for match in _PYTHON.finditer(_text(path))}
    else:
        found = {match[1]: match[2] for match in _LINE.finditer(_text(path))}
    if not any(_ID.fullmatch(id_) for id_ in found):
        raise ValueError(f"{path} lists no names of classes: repair it, or move it away")
    return {id_: all_.replace("_", " ") for id_, all_ in found.items()}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid UTF-8: repair it, or move it away") from None
