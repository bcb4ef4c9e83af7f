"""Equal things where there should be one: within a split, and between splits.

Legend: N rows.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arra.data.manifest import Manifest
from arra.doctor.findings import EXAMPLES, Check, Finding, Level, counted, first
from arra.doctor.scan import GROUPS, SplitScan, values_of

ONE_ROW = "keep one of each in the source and prepare the data again"
ONE_SPLIT = "keep them in one split of the source and prepare the data again"
LOOKED = 50
"""Rows among which examples that differ are looked for."""

LEAKED = 0.01
"""Share of the smaller split's pictures that another split has too, from which it is damage: what
is measured on that split is off by up to as much. Below it is a warning."""

OFTEN = 0.5
"""Share of rows with a caption that another picture has too, above which captions say little."""


def repeats(key_N: np.ndarray, owner_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose key an earlier row of another owner has, and the first row with that key.

    Args:
        key_N: digests; 0 = no value, which equals nothing.
        owner_N: rows of one owner are one thing, whatever their keys.
    """
    order = np.argsort(key_N, kind="stable")
    order = order[key_N[order] != 0]
    sorted_N = key_N[order]
    starts = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])[: len(order)]
    first_N = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    again = (owner_N[order] != owner_N[first_N]) & (order != first_N)
    rising = np.argsort(order[again])
    return order[again][rising], first_N[again][rising]


def shared(one_N: np.ndarray, other_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first rows of both splits for every key that both have; 0 is no key."""
    _, one, other = np.intersect1d(one_N, other_N, return_indices=True)
    keep = one_N[one] != 0
    order = np.argsort(one[keep])
    return one[keep][order], other[keep][order]


# ---- within a split ------------------------------------------------------------------------------


def ids_check(folder: Path, scans: Mapping[str, SplitScan]) -> Check:
    """Each id once in its split, and views that name a row of their split."""
    findings = []
    for split, scan in scans.items():
        ids_N = scan.keys["id"]
        again, _ = repeats(ids_N, np.arange(len(ids_N), dtype=np.uint64))
        if again.size:
            names = values_of(folder, scan.shards, "id", again[:EXAMPLES])
            what = f"{counted(len(again), 'row')} with an id that an earlier row has"
            remedy = "give every row of the source its own id and prepare the data again"
            findings.append(
                Finding("damage", what, split, len(again), first(names.values()), remedy)
            )
        lost = np.flatnonzero(~np.isin(scan.keys["main"], ids_N))
        if lost.size:
            names = values_of(folder, scan.shards, "id", lost[:EXAMPLES])
            what = f"{counted(len(lost), 'view')} of rows that are not there"
            findings.append(
                Finding("warning", what, split, len(lost), first(names.values()), ONE_SPLIT)
            )
    rows = sum(len(scan) for scan in scans.values())
    there = "each once in its split" if not findings else "not each once in its split"
    return Check("ids", f"{counted(rows, 'id')}, {there}", findings)


def pictures_check(folder: Path, manifest: Manifest, scans: Mapping[str, SplitScan]) -> Check:
    """Rows of a split whose codes, and features if there are any, are those of another row."""
    findings, total, same_codes = [], 0, {}
    for split, scan in scans.items():
        again, firsts = repeats(scan.pictures, scan.keys["owner"])
        total += len(again)
        if again.size:
            findings.append(
                Finding(
                    "warning",
                    f"{counted(len(again), 'row')} whose picture an earlier row has "
                    f"({'codes and features' if manifest.features else 'codes'} are equal)",
                    split,
                    len(again),
                    _pairs(folder, scan, scan, firsts, again),
                    ONE_ROW,
                )
            )
        codes, firsts = repeats(scan.keys["codes"], scan.keys["owner"])
        only = np.setdiff1d(codes, again)
        same_codes[split] = len(only)
        if only.size:
            keep = np.isin(codes, only)
            findings.append(
                Finding(
                    "note",
                    f"{counted(len(only), 'row')} with an earlier row's codes but other features: "
                    f"the image tokenizer does not tell these pictures apart",
                    split,
                    len(only),
                    _pairs(folder, scan, scan, firsts[keep], codes[keep]),
                )
            )
    summary = f"{counted(total, 'picture')} twice" if total else "no picture twice in a split"
    return Check("pictures", summary, findings, {"same_codes": same_codes, "twice": total})


def captions_check(folder: Path, manifest: Manifest, scans: Mapping[str, SplitScan]) -> Check:
    """How long captions are, how many are missing, and how many say what others say."""
    findings: list[Finding] = []
    facts: dict[str, Any] = {"characters": {}, "repeated": {}}
    for split, scan in scans.items():
        captions_N, lengths_N = scan.keys["caption"], scan.caption_lengths
        if not len(captions_N):
            continue
        empty = np.flatnonzero(captions_N == 0)
        if empty.size:
            names = values_of(folder, scan.shards, "id", empty[:EXAMPLES]).values()
            what = f"{counted(len(empty), 'row')} without a caption: they train as unprompted"
            findings.append(Finding("note", what, split, len(empty), first(names)))
        again, _ = repeats(captions_N, scan.keys["owner"])
        share = len(again) / len(captions_N)
        facts["repeated"][split] = share
        facts["characters"][split] = histogram(lengths_N)
        if again.size and not manifest.class_names:
            often = share > OFTEN
            shown = values_of(folder, scan.shards, "text", again[:LOOKED]).values()
            findings.append(
                Finding(
                    "warning" if often else "note",
                    f"{counted(len(again), 'row')} ({share:.0%}) with a caption that an earlier "
                    f"row has",
                    split,
                    len(again),
                    first(f'"{text}"' for text in shown),
                    "captions that say more tell pictures apart" if often else "",
                )
            )
    lengths_N = np.concatenate([scan.caption_lengths for scan in scans.values()])
    summary = "no captions"
    if lengths_N.size:
        low, middle, high = np.percentile(lengths_N, (0, 50, 100)).astype(int)
        summary = f"{low} to {high:,} characters, half of them up to {middle}"
        facts["all"] = histogram(lengths_N)
    return Check("captions", summary, findings, facts)


def histogram(values_N: np.ndarray, bins: int = 12) -> dict[str, list[int]]:
    """Counts of whole numbers in at most `bins` bins of one whole width: {edges, counts}."""
    low, high = int(values_N.min()), int(values_N.max())
    width = max(1, -(-(high - low + 1) // bins))
    for unit in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 2500, 5000, 10_000):
        if unit >= width:
            width = unit
            break
    start = low - low % width
    edges = np.arange(start, high + width + 1, width)
    counts, _ = np.histogram(values_N, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


# ---- between splits ------------------------------------------------------------------------------


def leakage_check(folder: Path, manifest: Manifest, scans: Mapping[str, SplitScan]) -> Check:
    """What two splits share: rows by id, pictures, patients and samples; captions for information.

    Ids that merely count the rows of each split name nothing: plain numbers whose pictures differ
    are a note.
    """
    findings: list[Finding] = []
    facts: dict[str, Any] = {}
    groups = [name for name in GROUPS if any(name in scan.keys for scan in scans.values())]
    for one, other in itertools.combinations(scans.values(), 2):
        where = f"{one.split} and {other.split}"
        found = [
            _shared_ids(folder, one, other),
            _shared_pictures(folder, manifest, one, other),
            *(_shared_groups(folder, name, one, other) for name in groups),
            _shared_captions(folder, manifest, one, other),
        ]
        facts[where] = {what: number for what, number, _ in found}
        findings += [finding for _, _, each in found for finding in each]
    looked = ["id", "picture", *(n for n in groups if n != "sample"), "sample"]
    if len(scans) < 2:
        return Check("leakage", "there is one split, nothing can leak", [], facts)
    bad = sorted({f.where for f in findings if f.level == "damage"})
    few = sorted({f.where for f in findings if f.level == "warning"})
    summary = f"none between {len(scans)} splits"
    if bad or few:
        summary = f"between {'; '.join(bad)}" if bad else f"little, between {'; '.join(few)}"
    summary = f"by {', '.join(looked)}: {summary}"
    return Check("leakage", summary, findings, facts)


Shared = tuple[str, int, list[Finding]]


def _where(one: SplitScan, other: SplitScan) -> str:
    return f"{one.split} and {other.split}"


def _shared_ids(folder: Path, one: SplitScan, other: SplitScan) -> Shared:
    mine, theirs = shared(one.keys["main"], other.keys["main"])
    if not mine.size:
        return "id", 0, []
    names = values_of(folder, one.shards, "id", mine[:1000])
    numbers = all(str(name).isdigit() for name in names.values())
    if numbers and not (one.pictures[mine] == other.pictures[theirs]).any():
        what = f"{counted(len(mine), 'id')} in both, but the pictures differ: ids count rows here"
        return (
            "id",
            0,
            [Finding("note", what, _where(one, other), len(mine), first(names.values()))],
        )
    what = f"{counted(len(mine), 'row')} in both, by id"
    shown = _pairs(folder, one, other, mine, theirs)
    return "id", len(mine), [
        Finding("damage", what, _where(one, other), len(mine), shown, ONE_SPLIT)
    ]  # fmt: skip


def _shared_pictures(folder: Path, manifest: Manifest, one: SplitScan, other: SplitScan) -> Shared:
    findings = []
    mine, theirs = shared(one.pictures, other.pictures)
    leaked = one.keys["main"][mine] != other.keys["main"][theirs]  # else told by id
    mine, theirs = mine[leaked], theirs[leaked]
    if mine.size:
        made_of = "codes and features" if manifest.features else "codes"
        share = len(mine) / min(len(one), len(other))
        level: Level = "damage" if share >= LEAKED else "warning"
        what = f"{counted(len(mine), 'picture')} in both ({made_of} are equal), "
        what += f"{share:.1%} of {min(one, other, key=len).split}"
        shown = _pairs(folder, one, other, mine, theirs)
        findings.append(Finding(level, what, _where(one, other), len(mine), shown, ONE_SPLIT))
    codes, other_codes = shared(one.keys["codes"], other.keys["codes"])
    same = np.isin(one.keys["codes"][codes], one.keys["codes"][mine])
    same |= one.keys["main"][codes] == other.keys["main"][other_codes]
    codes, other_codes = codes[~same], other_codes[~same]
    if codes.size:
        what = f"{counted(len(codes), 'grid')} of codes in both, of pictures whose features differ"
        shown = _pairs(folder, one, other, codes, other_codes)
        findings.append(Finding("note", what, _where(one, other), len(codes), shown))
    return "picture", len(mine), findings


def _shared_groups(folder: Path, name: str, one: SplitScan, other: SplitScan) -> Shared:
    if name not in one.keys or name not in other.keys:
        return name, 0, []
    mine, _ = shared(one.keys[name], other.keys[name])
    if not mine.size:
        return name, 0, []
    shown = first(values_of(folder, one.shards, name, mine[:EXAMPLES]).values())
    what = f"{counted(len(mine), 'value')} of column {name} in both"
    remedy = f"split the source by {name} and prepare the data again"
    return name, len(mine), [
        Finding("damage", what, _where(one, other), len(mine), shown, remedy)
    ]  # fmt: skip


def _shared_captions(folder: Path, manifest: Manifest, one: SplitScan, other: SplitScan) -> Shared:
    mine, _ = shared(one.keys["caption"], other.keys["caption"])
    if not mine.size or manifest.class_names:
        return "caption", len(mine), []
    shown = values_of(folder, one.shards, "text", mine[:EXAMPLES]).values()
    what = f"{counted(len(mine), 'caption')} in both, for information"
    return "caption", len(mine), [
        Finding("note", what, _where(one, other), len(mine), first(f'"{t}"' for t in shown))
    ]  # fmt: skip


def _pairs(
    folder: Path,
    one: SplitScan,
    other: SplitScan,
    rows: np.ndarray | Sequence[int],
    others: np.ndarray | Sequence[int],
) -> tuple[str, ...]:
    """The first pairs by id, `a = b`; one id if both are equal."""
    left = values_of(folder, one.shards, "id", rows[:EXAMPLES])
    right = values_of(folder, other.shards, "id", others[:EXAMPLES])
    pairs = zip(rows[:EXAMPLES], others[:EXAMPLES], strict=True)
    names = [(left[int(a)], right[int(b)]) for a, b in pairs]
    return first(a if a == b else f"{a} = {b}" for a, b in names)
