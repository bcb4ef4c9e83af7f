"""plan.json: what was resolved once, so that every shard of a dataset is made in the same way.

A unit of work is one shard, made of a fixed range of source rows. Its bytes depend on the plan and
on those rows only; whatever stops the work, the same command goes on and ends at the same bytes.
"""

import contextlib
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow
import torch
import transformers

from arra.data.shard_file import shard_name
from arra.data.sources import Rows, Source
from arra.data.text_column import TEXT_FEATURE
from arra.files import reached, read_sealed, write_sealed

FILE = "plan.json"
PLAN_VERSION = 1


@dataclass(frozen=True)
class Unit:
    """Rows start..stop-1 of a split, which become one shard."""

    split: str
    number: int
    source: Source
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Name of the shard."""
        return shard_name(self.split, self.number)


def split_off(sources: Mapping[str, Source], val_fraction: float, seed: int) -> dict[str, Source]:
    """The dataset's splits: the source's, and `val` taken from `train` if there is none.

    Rows of one group (`Source.groups`: a patient, a sample of several images) stay together.
    """
    parts = dict(sources)
    if "train" not in parts or "val" in parts:
        return parts
    rows = len(parts["train"])
    count = int(rows * val_fraction)
    if count == 0:
        return parts
    train, random = parts["train"], np.random.default_rng([seed, rows])
    groups = train.groups
    if groups is None:
        val = set(random.permutation(rows)[:count].tolist())
    else:
        val = _whole_groups(groups, count, random)
        if not val:
            return parts
    parts["train"] = Rows(train, [row for row in range(rows) if row not in val])
    parts["val"] = Rows(train, sorted(val))
    order = [name for name in ("train", "val") if name in parts]
    return {name: parts[name] for name in [*order, *(n for n in parts if n not in order)]}


def _whole_groups(groups: Sequence[str], count: int, random: np.random.Generator) -> set[int]:
    """Rows of groups drawn at random until there are `count`; one group always stays in train."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    each = list(members.values())
    chosen: set[int] = set()
    for number in random.permutation(len(each))[:-1]:
        if len(chosen) >= count:
            break
        chosen.update(each[number])
    return chosen


def units_of(parts: Mapping[str, Source], shard_rows: int) -> list[Unit]:
    """Every split cut into shards."""
    return [
        Unit(split, number, source, start, min(start + shard_rows, len(source)))
        for split, source in parts.items()
        for number, start in enumerate(range(0, len(source), shard_rows))
    ]


def versions() -> dict[str, str]:
    """What else decides the last bit of a feature or the bytes of a file."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "pyarrow": pyarrow.__version__,
        "machine": platform.machine(),
    }


def make_plan(
    options: Mapping[str, Any],
    *,
    parts: Mapping[str, Source],
    tokenizer: str,
    encoders: Mapping[str, str],
    threads: int,
    batch_size: int,
    device: str,
    crop: str,
) -> dict[str, Any]:
    """The plan as JSON.

    Args:
        options: the flags that decide bytes, as they were given.
        parts: the dataset's splits.
        tokenizer: fingerprint of the image tokenizer.
        encoders: feature name -> fingerprint of the encoder; of captions, with their prefix.
        threads, batch_size, device: as resolved.
        crop: how pictures are framed, in words.
    """
    return {
        "plan_version": PLAN_VERSION,
        "options": dict(options),
        "threads": threads,
        "batch_size": batch_size,
        "device": device,
        "dtype": "float32",
        "crop": crop,
        "tokenizer": tokenizer,
        "encoders": dict(encoders),
        "sources": {name: source.fingerprint for name, source in parts.items()},
        "rows": {name: len(source) for name, source in parts.items()},
        "versions": versions(),
    }


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of a dataset that was begun, or None.

    Raises:
        ValueError: it is damaged.
    """
    return read_sealed(folder / FILE) if (folder / FILE).exists() else None


def settle_plan(
    folder: Path, plan: dict[str, Any], first_decides: Collection[str] = ()
) -> dict[str, Any]:
    """Writes the plan of a new dataset, or compares it with the one there and returns that.

    Several processes may begin one dataset at once: the plan of the first one holds for all.

    Args:
        folder: of the dataset.
        plan: what would be done here.
        first_decides: entries that nobody asked for: the plan that is there decides.

    Raises:
        ValueError: the folder holds something else, or was begun with other settings.
    """
    path = folder / FILE
    if not reached(path):
        there = {each.name for each in folder.iterdir()} if folder.exists() else set()
        others = any(not name.endswith(".partial") for name in there)
        if others and not path.exists():  # asked again: another one may have begun meanwhile
            raise ValueError(f"{folder} is not empty and no prepared dataset: choose another --out")
        with contextlib.suppress(FileExistsError):  # another one was faster
            write_sealed(path, plan, only_new=True)
            return plan
    begun = read_sealed(path)
    asked = {name: value for name, value in plan.items() if name not in first_decides}
    changed = _changes(begun, {**begun, **asked})
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(changed)}. Use the same ones to "
            f"go on, or another --out to start anew"
        )
    return begun


def _changes(begun: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    changes = []
    for name, value in plan["options"].items():
        before = begun["options"].get(name)
        if before != value:
            changes.append(f"--{name.replace('_', '-')} was {before}, now {value}")
    for name in ("batch_size", "threads"):
        if begun[name] != plan[name]:
            changes.append(f"--{name.replace('_', '-')} was {begun[name]}, now {plan[name]}")
    if changes:
        return changes  # what follows from them need not be said
    for name, what in (
        ("tokenizer", "the image tokenizer is another"),
        ("device", "the device is another"),
        ("crop", "this version of arra crops differently"),
        ("dtype", "the precision is another"),
        ("plan_version", "this version of arra plans differently"),
    ):
        if begun[name] != plan[name]:
            changes.append(f"{what} ({_short(begun[name])}, now {_short(plan[name])})")
    for name in sorted({*begun["encoders"], *plan["encoders"]}):
        if begun["encoders"].get(name) != plan["encoders"].get(name):
            what = "--text-encoder or --text-length" if name.startswith(TEXT_FEATURE) else "encoder"
            changes.append(f"the {what} of feature {name!r} is another")
    if begun["sources"] != plan["sources"] or begun["rows"] != plan["rows"]:
        changes.append("the source's content is another")
    for name, version in plan["versions"].items():
        before = begun["versions"].get(name)
        if before != version:
            changes.append(f"{name} was {before}, now {version}")
    return changes


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
