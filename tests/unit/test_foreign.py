"""Foreign files: what is taken out of them, and that nothing in them is ever run."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arra.foreign import read_foreign, write_original

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


class Trap:
    """Unpickled by an ordinary reader, this writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def same(given: dict[str, torch.Tensor]) -> bool:
    return given.keys() == TENSORS.keys() and all(torch.equal(given[n], TENSORS[n]) for n in given)


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_foreign(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: expected a")
    assert "found" in sentence
    assert "\n" not in sentence


# ---- what is taken out ---------------------------------------------------------------------------

WRAPPED = {
    "bare": TENSORS,
    "model": {"model": TENSORS},
    "module": {"module": TENSORS, "ds_version": "0.1"},
    "state_dict": {"state_dict": TENSORS, "epoch": 3},
    "only ema": {"ema": TENSORS},
    "nested": {"state_dict": {"model": TENSORS}},
    "DDP": {"model": {f"module.{n}": t for n, t in TENSORS.items()}},
    "compiled": {"model": {f"module._orig_mod.{n}": t for n, t in TENSORS.items()}},
    "flat": {f"model.{n}": t for n, t in TENSORS.items()},
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("tree", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_and_prefixes(tree: dict, old: bool, tmp_path: Path) -> None:
    torch.save(tree, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    read = read_foreign(tmp_path / "x.pt")
    assert same(read.tensors)
    assert read.weights == ("ema" if "ema" in tree else "model")
    assert not read.both


def test_what_lies_beside(tmp_path: Path) -> None:
    options = argparse.Namespace(image_size=256, lr=1e-4, gpt_model="GPT-B", ema=True, sizes=[1, 2])
    state = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    tree = {"model": TENSORS, "optimizer": state, "steps": 5, "args": options}
    torch.save(tree, tmp_path / "x.pt")
    read = read_foreign(tmp_path / "x.pt")
    assert same(read.tensors)
    assert read.beside == {"steps": 5, "args": vars(options)}


@pytest.mark.parametrize("flat", [False, True])
def test_weights_are_chosen_explicitly(flat: bool, tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    tree: dict = {"ema": other, "model": TENSORS}
    if flat:
        tree = {f"{k}.{name}": t for k, inner in tree.items() for name, t in inner.items()}
    torch.save(tree, tmp_path / "x.pt")
    for asked, expected in ((None, TENSORS), ("model", TENSORS), ("ema", other)):
        read = read_foreign(tmp_path / "x.pt", asked)
        assert torch.equal(read.tensors["b"], expected["b"])
        assert read.weights == (asked or "model")
        assert read.both
    torch.save({"model": TENSORS}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="called 'ema', found no averaged weights"):
        read_foreign(tmp_path / "x.pt", "ema")
    torch.save({"ema": TENSORS}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="called 'model', found averaged weights"):
        read_foreign(tmp_path / "x.pt", "model")


def test_safetensors_by_content(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.pt", metadata={"format": "pt"})
    read = read_foreign(tmp_path / "x.pt")
    assert same(read.tensors)
    assert read.beside == {"format": "pt"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    torch.save({"model": TENSORS}, tmp_path / "x.pt")
    read = read_foreign(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in Path("/proc/self/maps").read_text()
    assert same(read.tensors)


def test_written_files_hold_no_more_than_their_tensors(tmp_path: Path) -> None:
    view = torch.zeros(1 << 20)[:4]
    write_original(tmp_path / "x.pt", {"model": {"view": view, "tied": view}})
    assert (tmp_path / "x.pt").stat().st_size < 4000
    assert read_foreign(tmp_path / "x.pt").tensors.keys() == {"view", "tied"}


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "before 1.6", "protocol 2", "protocol 4"])
def test_code_is_not_run(form: str, tmp_path: Path) -> None:
    file, mark = tmp_path / "x.pt", tmp_path / "mark"
    tree = {"model": {**TENSORS, "trap": Trap(mark)}}
    if form.startswith("protocol"):
        file.write_bytes(pickle.dumps(Trap(mark), protocol=int(form[-1])))
    else:
        torch.save(tree, file, _use_new_zipfile_serialization=form == "zip")
    named = r"a pickle with code in it, which asks for (posix|nt)\.system; nothing of it was run"
    # the restricted reader does not know protocol 4, which stops it before the name
    refused(file, "perhaps code; nothing of it was run" if form == "protocol 4" else named)
    assert not mark.exists()


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "path": Path("x")}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", r"asks for pathlib\S*Path")


@pytest.mark.parametrize("old", [False, True])
def test_cut_off_files(old: bool, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"model": {"x": torch.zeros(5000)}}, file, _use_new_zipfile_serialization=not old)
    whole = file.read_bytes()
    for share in (0.02, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        refused(file, "cut off|damaged")
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-4])
    refused(file, "cut off or damaged")


def test_damaged_pickle(tmp_path: Path) -> None:
    """Whatever byte is hit, the answer is a sentence or the tensors."""
    file = tmp_path / "x.pt"
    torch.save({"model": TENSORS}, file)
    whole = bytearray(file.read_bytes())
    start = whole.index(b"\x80\x02}")
    for place in range(start, start + 120):
        hurt = bytearray(whole)
        hurt[place] ^= 0x55
        file.write_bytes(hurt)
        try:
            read_foreign(file)
        except ValueError as error:
            assert str(error).startswith(f"{file}: expected a")  # noqa: PT017


FILES = {
    "nothing": (b"", "an empty file"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "text": (b'{"message": "Not found"}\n', "text that begins with '{\"message"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(600), "other data .first bytes 89 50 4e 47"),
    "zeros": (bytes(600), "other data"),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_no_checkpoint_at_all(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "vq.pt").write_bytes(content)
    refused(tmp_path / "vq.pt", words)


def test_other_archives_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    refused(file, r"a zip archive of something else \(word/document.xml")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), file)
    refused(file, "a TorchScript program")
    torch.save([1, 2], file)
    refused(file, "one without named tensors .a list")
    torch.save({"steps": 3}, file)
    refused(file, "one without named tensors .a dict of 'steps'")
    refused(tmp_path / "missing.pt", "found nothing")
    refused(tmp_path, "found a folder")
