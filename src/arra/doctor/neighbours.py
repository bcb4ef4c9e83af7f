"""Near-duplicates: pictures whose centred features point the same way.

Up to EXACT rows every pair is compared. Beyond, as many rows as keep the number of comparisons
constant, but at least FEWEST, are drawn, the same number of every split as far as it has them, and
compared with all rows. Shards are read once, a batch at a time: memory holds the drawn rows and one
batch.

Legend: N rows of all splits, Q drawn rows, B rows of a batch, D feature width.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arra.data.manifest import Manifest
from arra.data.shards import FEATURE
from arra.doctor.findings import EXAMPLES, Check, Finding, counted, first
from arra.doctor.scan import SplitScan, batches, feature_of, values_of

EXACT = 20_000
"""Rows up to which every pair is compared."""

FEWEST = 1_000
"""Rows that are compared with all others, however many these are."""

SHOWN = 24
"""Closest pairs that are kept, within splits and between splits each."""

_BLOCK = 4096


@dataclass(frozen=True)
class Pair:
    """Two rows, each (split, row), and the cosine of their centred features."""

    one: tuple[str, int]
    other: tuple[str, int]
    cosine: float


@dataclass(frozen=True)
class Near:
    """What was found for one feature.

    Attributes:
        drawn, rows: Q and N.
        within, between: number of pairs at or above the threshold inside one split, and of two.
        pairs: the closest, falling; those of two splits first of all.
    """

    drawn: int
    rows: int
    within: int
    between: int
    pairs: list[Pair]


def near_pairs(
    folder: Path,
    manifest: Manifest,
    scans: Mapping[str, SplitScan],
    name: str,
    threshold: float,
    device: str,
    progress: Callable[[int], None],
) -> Near:
    """Compares rows by the cosine of feature `name` minus its mean over the train split.

    Pairs of one owner (views, captions of one picture) and pairs that are equal in codes and
    features, which another check counts, are left out.
    """
    every = list(scans.values())
    rows = sum(len(scan) for scan in every)
    drawn = _drawn([len(scan) for scan in every])
    mean_D = torch.tensor(manifest.features[name].mean, dtype=torch.float32, device=device)
    owner_N = torch.from_numpy(_joined(every, "owner").view(np.int64)).to(device)
    picture_N = torch.from_numpy(
        np.concatenate([scan.pictures for scan in every]).view(np.int64)
    ).to(device)
    split_N = torch.from_numpy(np.repeat(np.arange(len(every)), [len(s) for s in every])).to(device)
    asks_N = torch.zeros(rows, dtype=torch.bool, device=device)
    asks_N[torch.from_numpy(drawn).to(device)] = True
    chosen_Q = torch.from_numpy(drawn).to(device)

    def unit(batch_BD: np.ndarray) -> Tensor:
        feature_BD = torch.from_numpy(batch_BD.astype(np.float32)).to(device) - mean_D
        feature_BD = torch.nan_to_num(feature_BD, 0.0, 0.0, 0.0)
        return torch.nn.functional.normalize(feature_BD, dim=1)

    query_QD = torch.cat(
        [
            unit(value_BD[np.isin(np.arange(start, start + len(value_BD)), drawn)])
            for start, value_BD in _batches(folder, every, name)
        ]
    )
    found = {kind: _Closest() for kind in ("within", "between")}
    for start, value_BD in _batches(folder, every, name):
        base_BD = unit(value_BD)
        number_B = torch.arange(start, start + len(base_BD), device=device)
        for begin in range(0, len(drawn), _BLOCK):
            query_q = chosen_Q[begin : begin + _BLOCK]
            if len(drawn) == rows and begin > start + len(base_BD):
                break  # every pair of these was seen the other way round
            cosine_qB = query_QD[begin : begin + _BLOCK] @ base_BD.T
            # Both rows may ask: such a pair counts where the second one is the later.
            new_qB = ~asks_N[number_B][None] | (number_B[None] > query_q[:, None])
            new_qB &= owner_N[query_q][:, None] != owner_N[number_B][None]
            new_qB &= picture_N[query_q][:, None] != picture_N[number_B][None]
            same_qB = split_N[query_q][:, None] == split_N[number_B][None]
            for kind, mask_qB in (("within", same_qB), ("between", ~same_qB)):
                found[kind].add(cosine_qB, new_qB & mask_qB, query_q, number_B, threshold)
        progress(len(value_BD))
    starts = np.cumsum([0, *(len(scan) for scan in every)])

    def placed(number: int) -> tuple[str, int]:
        split = int(np.searchsorted(starts, number, side="right")) - 1
        return every[split].split, number - int(starts[split])

    pairs = [
        Pair(placed(min(a, b)), placed(max(a, b)), cosine)
        for kind in ("between", "within")
        for cosine, a, b in found[kind].best
    ]
    within, between = found["within"].count, found["between"].count
    return Near(len(drawn), rows, within, between, pairs)


class _Closest:
    """The closest pairs so far, and how many are at or above the threshold."""

    def __init__(self) -> None:
        self.count = 0
        self.best: list[tuple[float, int, int]] = []

    def add(
        self,
        cosine_qB: Tensor,
        mask_qB: Tensor,
        query_q: Tensor,
        number_B: Tensor,
        threshold: float,
    ) -> None:
        masked_qB = cosine_qB.masked_fill(~mask_qB, -2.0)
        self.count += int((masked_qB >= threshold).sum())
        values, places = masked_qB.flatten().topk(min(SHOWN, masked_qB.numel()))
        width = masked_qB.shape[1]
        new = [
            (float(value), int(query_q[place // width]), int(number_B[place % width]))
            for value, place in zip(values.cpu(), places.cpu(), strict=True)
            if value > -2.0
        ]
        self.best = sorted([*self.best, *new], key=lambda pair: (-pair[0], pair[1:]))[:SHOWN]


def _joined(every: list[SplitScan], what: str) -> np.ndarray:
    return np.concatenate([scan.keys[what] for scan in every])


def _batches(folder: Path, every: list[SplitScan], name: str) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (B, D)) of all splits in order."""
    start = 0
    for scan in every:
        for shard in scan.shards:
            for batch in batches(folder / shard.file, [FEATURE + name]):
                yield start, feature_of(batch, name)
                start += batch.num_rows


def _drawn(lengths: list[int]) -> np.ndarray:
    """Rows that are compared with all, rising; always the same ones."""
    rows = sum(lengths)
    if rows <= EXACT:
        return np.arange(rows)
    left = max(FEWEST, EXACT**2 // rows)
    random = np.random.default_rng(0)
    starts = np.cumsum([0, *lengths])
    chosen: list[np.ndarray] = []
    for done, split in enumerate(sorted(range(len(lengths)), key=lambda s: lengths[s])):
        count = min(lengths[split], left // (len(lengths) - done))
        chosen.append(starts[split] + random.choice(lengths[split], count, replace=False))
        left -= count
    return np.sort(np.concatenate(chosen))


def neighbours_check(
    folder: Path, scans: Mapping[str, SplitScan], name: str, near: Near, threshold: float
) -> Check:
    """Pairs at or above the threshold, within and between splits."""
    how = f"{counted(near.rows, 'row')}, every pair"
    if near.drawn < near.rows:
        how = f"{near.drawn:,} drawn rows with all {near.rows:,}"
    findings = []
    for kind, count in (("between splits", near.between), ("within a split", near.within)):
        if count:
            pairs = [p for p in near.pairs if (p.one[0] != p.other[0]) == (kind[0] == "b")]
            shown = first(_named(folder, scans, pair) for pair in pairs[:EXAMPLES])
            what = f"{counted(count, 'pair')} with a centred cosine of {threshold:g} or more"
            remedy = "look at them (--out DIR); what is one picture belongs into one split, once"
            findings.append(Finding("warning", what, kind, count, shown, remedy))
    top = max((pair.cosine for pair in near.pairs), default=0.0)
    summary = f"{how}: {near.within + near.between:,} near-duplicates, the closest at {top:.4f}"
    facts = {
        "rows": near.rows,
        "compared": near.drawn,
        "threshold": threshold,
        "within": near.within,
        "between": near.between,
        "pairs": [
            {"one": list(p.one), "other": list(p.other), "cosine": p.cosine} for p in near.pairs
        ],
    }
    return Check(f"near {name}", summary, findings, facts)


def _named(folder: Path, scans: Mapping[str, SplitScan], pair: Pair) -> str:
    ids = [
        values_of(folder, scans[split].shards, "id", [row])[row]
        for split, row in (pair.one, pair.other)
    ]
    return f"{ids[0]} ~ {ids[1]}"
