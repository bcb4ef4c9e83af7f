"""The one place that reads and writes other people's files: .pt .pth .ckpt .bin .safetensors.

A checkpoint of PyTorch is a pickle, and a pickle is a program. Files are read with PyTorch's
restricted reader, which builds tensors and plain values and refuses everything else but
`argparse.Namespace`: training scripts keep their options in one. Nothing of a file is ever run.
"""

import argparse
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arra.files import atomic_write

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
"""What such files are called. What they hold is decided by their content, not by their name."""

Weights = Literal["model", "ema"]
"""The weights of the last step, or their moving average."""

WRAPPERS = ("model", "module", "state_dict", "ema")
"""Keys under which the tensors may lie, in the order of LlamaGen's autoregressive/sample scripts.

Those never read `ema`. LlamaGen's tokenizer demo and reconstruction scripts (tokenizer_image/
vq_demo.py, reconstruction_vq_ddp.py) prefer `ema` when there is one: ask for it.
"""
PREFIXES = (*WRAPPERS, "_orig_mod")
"""First parts of tensor names that wrappers leave: `module` (DDP), `_orig_mod` (torch.compile)."""

BROKEN = (
    *(RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError),
    *(AssertionError, OSError, struct.error, zipfile.BadZipFile),
)
"""What PyTorch's reader raises on files that are cut off or damaged, by where the damage is."""


@dataclass(frozen=True)
class Foreign:
    """A foreign file that was read.

    Attributes:
        path: the file.
        tensors: by name, without what wrapped them; mapped from the file where its format allows.
        beside: plain values that lay beside them (`args` as a dict, steps, a safetensors header).
        weights: "ema" if these are the averaged weights, else "model".
        both: whether the file holds the other ones as well.
    """

    path: Path
    tensors: dict[str, Tensor]
    beside: dict[str, Any]
    weights: Weights
    both: bool


def read_foreign(path: str | Path, weights: Weights | None = None) -> Foreign:
    """The named tensors of a checkpoint file, and the plain values beside them.

    Args:
        path: a file; its format is told from its first bytes.
        weights: which ones, where a file holds both. None: the model's, or the averaged ones if
            there are no others. Asking for some that are not there is an error.

    Raises:
        ValueError: it is no such file, is damaged, or asks for code; one sentence says what was
            expected and what was found.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ValueError(f"{path}: expected a checkpoint file, found {found}")
    kind = _kind(path)
    tree = _read_safetensors(path) if kind == "safetensors" else _read_torch(path, kind)
    return _unwrapped(path, tree, weights)


def write_original(path: str | Path, tree: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes {"model": {name: tensor}} or the like with torch.save: tensors and names, no code."""
    plain = {
        # a clone, or a view would bring all of the memory that it looks into
        outer: {name: tensor.detach().cpu().clone() for name, tensor in inner.items()}
        for outer, inner in tree.items()
    }
    with atomic_write(path) as temporary:
        torch.save(plain, temporary)


# ---- what a file is ------------------------------------------------------------------------------


def _refusal(path: Path, found: str) -> ValueError:
    return ValueError(f"{path}: expected a PyTorch checkpoint or a safetensors file, found {found}")


def _kind(path: Path) -> str:
    """ "zip" (torch.save since 1.6), "pickle" (before), or "safetensors"."""
    with open(path, "rb") as handle:
        head = handle.read(512)
    if not head:
        raise _refusal(path, "an empty file")
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path)
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    # eight bytes of length, then the JSON header
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    start = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    if re.match(r"<(!doctype html|html|head|body)", start, re.IGNORECASE):
        raise _refusal(path, "a web page, as failed downloads leave behind: get the file again")
    if start.startswith("version https://git-lfs"):
        raise _refusal(path, "a Git LFS pointer instead of the file: run `git lfs pull`")
    printable = sum(byte in b"\t\r\n" or byte >= 32 for byte in head)
    if printable == len(head) and len(start) > len(head) // 2:
        raise _refusal(path, f"text that begins with {start[:30]!r}")
    raise _refusal(path, f"other data (first bytes {head[:8].hex(' ')})")


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise _refusal(path, "a checkpoint that is cut off (its end is missing): get it again")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        raise _refusal(path, "a TorchScript program, which is code, not weights")
    if "data.pkl" not in inner:
        raise _refusal(path, f"a zip archive of something else ({', '.join(names[:2])} ...)")


# ---- reading -------------------------------------------------------------------------------------


def _read_torch(path: Path, kind: str) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual protocols, before it refuses them
            # An old file is one stream that cannot be mapped.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=kind == "zip")
    except UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise _refusal(
                path,
                "a pickle that is damaged or holds more than tensors, perhaps code; nothing of it "
                "was run",
            ) from None
        raise _refusal(
            path,
            f"a pickle with code in it, which asks for {asked[1]}; nothing of it was run. If you "
            f"know who made it, save its tensors alone as safetensors and use that file",
        ) from None
    except BROKEN as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise _refusal(path, f"one that is cut off or damaged ({reason}): get it again") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {**(file.metadata() or {}), **tensors}
    except SafetensorError as error:
        raise _refusal(path, f"one that is cut off or damaged ({error}): get it again") from None


# ---- unwrapping ----------------------------------------------------------------------------------


def _unwrapped(path: Path, tree: Any, weights: Weights | None) -> Foreign:
    """Descends to the tensors: through dicts that wrap them, then through prefixes of names."""
    beside: dict[str, Any] = {}
    chosen: list[str] = []
    left: set[str] = set()
    while isinstance(tree, dict):
        keys = [key for key in WRAPPERS if _holds_tensors(tree.get(key))]
        if not keys:
            break
        key = _choice(keys, weights)
        beside |= _plain_values({k: v for k, v in tree.items() if k not in keys})
        chosen.append(key)
        left |= set(keys)
        tree = tree[key]
    if not isinstance(tree, dict) or not any(isinstance(v, Tensor) for v in tree.values()):
        raise _refusal(path, f"one without named tensors ({_described(tree)})")
    beside |= _plain_values(tree)
    tensors = {str(k): v.detach() for k, v in tree.items() if isinstance(v, Tensor)}
    while all(name.partition(".")[0] in PREFIXES and "." in name for name in tensors):
        heads = [p for p in PREFIXES if any(name.startswith(p + ".") for name in tensors)]
        key = _choice(heads, weights)
        chosen.append(key)
        left |= set(heads)
        tensors = {
            name.removeprefix(key + "."): tensor
            for name, tensor in tensors.items()
            if name.startswith(key + ".")
        }
    averaged = "ema" in chosen
    if weights is not None and averaged != (weights == "ema"):
        has = "averaged weights (ema) only" if averaged else "no averaged weights (ema)"
        raise ValueError(f"{path}: expected the weights called {weights!r}, found {has}")
    return Foreign(
        path, tensors, beside, "ema" if averaged else "model", "ema" in left and left != {"ema"}
    )


def _choice(keys: list[str], weights: Weights | None) -> str:
    return "ema" if weights == "ema" and "ema" in keys else keys[0]


def _holds_tensors(tree: Any) -> bool:
    return isinstance(tree, Tensor) or (
        isinstance(tree, dict) and any(_holds_tensors(value) for value in tree.values())
    )


def _plain_values(tree: dict[Any, Any]) -> dict[str, Any]:
    """What JSON could hold of a dict; tensors and the optimizers' states are left out."""
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            if not _holds_tensors(value):
                plain[str(key)] = _plain_values(value)
        elif isinstance(value, list | tuple):
            if all(isinstance(item, bool | int | float | str | None) for item in value):
                plain[str(key)] = list(value)
        elif isinstance(value, bool | int | float | str | None):
            plain[str(key)] = value
    return plain


def _described(tree: Any) -> str:
    if isinstance(tree, dict):
        return f"a dict of {', '.join(map(repr, list(tree)[:4])) or 'nothing'}"
    return f"a {type(tree).__name__}"
