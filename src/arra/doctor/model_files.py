"""What lies in a model's folder, tensor by tensor: nothing is loaded, files are read one by one."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from arra.doctor.findings import Check, Finding, counted, first
from arra.files import read_json

INDEX = "model.safetensors.index.json"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
"""Suffixes of files that run code when they are opened without care."""
AT_ONCE = 1 << 24
"""Values of a tensor that are looked at at once: 64 MB as float32."""
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of types, and torch's."""


@dataclass
class Stored:
    """The weights in a folder.

    Attributes:
        counts, sizes: values and bytes by type, as safetensors calls it.
        tensors: how many there are.
        broken: values that are not finite, by tensor.
        findings: what is wrong with the files.
    """

    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    tensors: int = 0
    broken: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def weights_check(folder: Path) -> Check:
    """Parameters and bytes by type, shards that are missing or too many, values not finite.

    Args:
        folder: a standard folder of transformers, the one with config.json.
    """
    found = Stored()
    files = _weight_files(folder, found)
    for file in files:
        _scan(file, found)
    if found.broken:
        bad = sum(found.broken.values())
        what = f"{counted(bad, 'weight')} not finite in {counted(len(found.broken), 'tensor')}"
        remedy = "whoever wrote them saved a broken model: take an earlier checkpoint of it"
        names = first(found.broken)
        count = len(found.broken)
        found.findings.append(Finding("damage", what, folder.name, count, names, remedy))
    by_type = ", ".join(
        f"{NAMES.get(kind, kind)} {_millions(count)} in {found.sizes[kind] / 1e9:.3g} GB"
        for kind, count in found.counts.most_common()
    )
    summary = f"{counted(found.tensors, 'tensor')} in {counted(len(files), 'file')}: {by_type}"
    facts = {
        "tensors": found.tensors,
        "files": len(files),
        "parameters": {NAMES.get(kind, kind): n for kind, n in found.counts.items()},
        "bytes": {NAMES.get(kind, kind): n for kind, n in found.sizes.items()},
    }
    return Check("weights", summary if files else "", found.findings, facts)


def files_check(folder: Path, ours: bool) -> Check:
    """What a folder holds besides, that is never read or should not be there.

    Args:
        ours: an export, whose files are known; else only what may carry code is looked for.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file: str(file.relative_to(folder)) for file in files}
    findings = []
    pickled = [names[file] for file in files if file.suffix in PICKLED]
    if pickled:
        what = f"{counted(len(pickled), 'pickled file')}, which can run code when opened"
        remedy = "nothing here opens them; weights are read from safetensors"
        findings.append(Finding("warning", what, folder.name, len(pickled), first(pickled), remedy))
    code = [names[file] for file in files if file.suffix == ".py"]
    code += [names[file] for file in files if file.suffix == ".json" and _asks_for_code(file)]
    if code:
        what = "code of its own (trust_remote_code)"
        remedy = "it is never run here; others who open the folder may be asked to"
        findings.append(Finding("warning", what, folder.name, len(code), first(code), remedy))
    if ours:
        known = ("model/", "tokenizer/", "image_tokenizer/", "pipeline.json", "README.md")
        others = [name for name in names.values() if not name.startswith(known)]
        others = [name for name in others if name not in (*pickled, *code)]
        if others:
            what = f"{counted(len(others), 'file')} that an export does not have"
            findings.append(Finding("note", what, folder.name, len(others), first(others)))
    size = sum(file.stat().st_size for file in files) / 1e9
    return Check("files", f"{counted(len(files), 'file')}, {size:.3g} GB", findings)


def _weight_files(folder: Path, found: Stored) -> list[Path]:
    """The shards that the index names, or all there are; what does not agree is a finding."""
    there = sorted(folder.glob("*.safetensors"))
    if not (folder / INDEX).is_file():
        if not there:
            remedy = "expected weights as safetensors: convert pickled ones with `arra convert`"
            found.findings.append(Finding("damage", "no weights", folder.name, remedy=remedy))
        return there
    try:
        named = {folder / str(name) for name in read_json(folder / INDEX)["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        found.findings.append(Finding("damage", f"cannot be read ({error})", INDEX))
        return there
    for what, level, files in (
        ("named by the index, but missing", "damage", named - set(there)),
        ("not named by the index, so never read", "warning", set(there) - named),
    ):
        if files:
            names = first(file.name for file in sorted(files))
            what = f"{counted(len(files), 'file')} {what}"
            found.findings.append(Finding(level, what, folder.name, len(files), names))  # type: ignore[arg-type]
    return sorted(named & set(there))


def _scan(file: Path, found: Stored) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                kind, count = part.get_dtype(), math.prod(part.get_shape())
                found.tensors += 1
                found.counts[kind] += count
                found.sizes[kind] += count * BYTES.get(kind, 1)
                bad = _not_finite(opened.get_tensor(name))
                if bad:
                    found.broken[name] = bad
    except (SafetensorError, OSError) as error:
        what = f"cut off or damaged ({error})"
        found.findings.append(Finding("damage", what, file.name, remedy="get it again"))


def _not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    return sum(int((~part.float().isfinite()).sum()) for part in _pieces(tensor))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().flatten()
    yield from (flat[i : i + AT_ONCE] for i in range(0, len(flat), AT_ONCE))


def _asks_for_code(file: Path) -> bool:
    """Whether a JSON file of the top folders names classes in code beside it."""
    if file.stat().st_size > 1 << 20 or not re.search("config", file.name):
        return False
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "auto_map" in content


def _millions(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
