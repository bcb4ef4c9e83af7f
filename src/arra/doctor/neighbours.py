"""Near-duplicates: pictures whose centred features point the same way.

Up to EXACT rows every pair is compared. Beyond, as many rows as keep the number of comparisons
constant, but at least FEWEST, are drawn, the same number of every split as far as it has them, and
compared with all rows. Shards are read once, a batch at a time: memory holds the drawn rows and one
batch.

Legend: N rows of all splits, Q drawn rows and q of a block, B rows of a batch, p pairs, D feature
width.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arra.data.manifest import Manifest
from arra.data.shard_file import FEATURE
from arra.doctor.findings import EXAMPLES, Check, Finding, counted, first
from arra.doctor.scan import SplitScan, batches, feature_of, values_of

EXACT = 20_000
"""Rows up to which every pair is compared."""

FEWEST = 1_000
"""Rows that are compared with all others, however many these are."""

SHOWN = 24
"""Closest pairs that are kept, within splits and between splits each."""

_BLOCK = 1024
"""Drawn rows that are compared with a batch at a time."""


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
    starts = np.cumsum([0, *(len(scan) for scan in every)])
    drawn = _drawn([len(scan) for scan in every])
    rows = _Rows(every, drawn, device)
    mean_D = torch.tensor(manifest.features[name].mean, dtype=torch.float32, device=device)

    def unit(batch_BD: np.ndarray) -> Tensor:
        feature_BD = torch.from_numpy(batch_BD.astype(np.float32)).to(device) - mean_D
        feature_BD = torch.nan_to_num(feature_BD, 0.0, 0.0, 0.0)
        return torch.nn.functional.normalize(feature_BD, dim=1)

    query_QD = torch.cat(
        [
            unit(value_BD[np.isin(np.arange(start, start + len(value_BD)), drawn)])
            for _, start, value_BD in _batches(folder, every, name)
        ]
    )
    found = {kind: _Closest(threshold) for kind in ("between", "within")}
    # Drawn rows are in order: those of one split follow each other.
    ends = np.searchsorted(drawn, starts)
    for split, start, value_BD in _batches(folder, every, name):
        base_BD = unit(value_BD)
        for asking, (begin, end) in enumerate(itertools.pairwise(ends)):
            closest = found["within" if asking == split else "between"]
            for block in range(begin, end, _BLOCK):
                chosen = slice(block, min(block + _BLOCK, end))
                if rows.all_ask and drawn[block] >= start + len(base_BD):
                    break  # every pair of these is seen the other way round
                cosine_qB = query_QD[chosen] @ base_BD.T
                q, b = (cosine_qB >= closest.bar).nonzero(as_tuple=True)
                one_p, other_p = rows.asking_Q[chosen][q], b + start
                new_p = rows.count(one_p, other_p)
                closest.add(cosine_qB[q, b][new_p], one_p[new_p], other_p[new_p])
        progress(len(value_BD))

    def placed(number: int) -> tuple[str, int]:
        split = int(np.searchsorted(starts, number, side="right")) - 1
        return every[split].split, number - int(starts[split])

    pairs = [
        Pair(placed(min(one, other)), placed(max(one, other)), cosine)
        for closest in found.values()
        for cosine, one, other in closest.best
    ]
    counts = {kind: closest.count for kind, closest in found.items()}
    return Near(len(drawn), int(starts[-1]), counts["within"], counts["between"], pairs)


class _Rows:
    """What decides whether a pair of rows counts, on the device."""

    def __init__(self, every: list[SplitScan], drawn: np.ndarray, device: str) -> None:
        def there(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.view(np.int64)).to(device)

        self.asking_Q = there(drawn)
        self._owner_N = there(np.concatenate([scan.keys["owner"] for scan in every]))
        self._picture_N = there(np.concatenate([scan.pictures for scan in every]))
        self._asks_N = torch.zeros(len(self._owner_N), dtype=torch.bool, device=device)
        self._asks_N[self.asking_Q] = True
        self.all_ask = len(drawn) == len(self._owner_N)

    def count(self, one_p: Tensor, other_p: Tensor) -> Tensor:
        """Which pairs count: of those where both rows ask, the one whose second row is later."""
        new_p = ~self._asks_N[other_p] | (other_p > one_p)
        new_p &= self._owner_N[one_p] != self._owner_N[other_p]
        return new_p & (self._picture_N[one_p] != self._picture_N[other_p])


class _Closest:
    """The closest pairs so far, and how many are at or above the threshold.

    Attributes:
        bar: pairs below it need not be added.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold, self.bar = threshold, -2.0
        self.count = 0
        self.best: list[tuple[float, int, int]] = []

    def add(self, cosine_p: Tensor, one_p: Tensor, other_p: Tensor) -> None:
        """Pairs p of rows, with their cosines."""
        self.count += int((cosine_p >= self.threshold).sum())
        values, places = cosine_p.topk(min(SHOWN, len(cosine_p)))
        new = zip(values.tolist(), one_p[places].tolist(), other_p[places].tolist(), strict=True)
        self.best = sorted([*self.best, *new], key=lambda pair: (-pair[0], pair[1:]))[:SHOWN]
        if len(self.best) == SHOWN:
            self.bar = min(self.threshold, self.best[-1][0])


def _batches(
    folder: Path, every: list[SplitScan], name: str
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(split, first row of all rows, (B, D)), in order."""
    start = 0
    for split, scan in enumerate(every):
        for shard in scan.shards:
            for batch in batches(folder / shard.file, [FEATURE + name]):
                yield split, start, feature_of(batch, name)
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
            found = [
                pair
                for pair in near.pairs
                if pair.cosine >= threshold
                and (pair.one[0] != pair.other[0]) == (kind == "between splits")
            ]
            shown = first(_named(folder, scans, pair) for pair in found[:EXAMPLES])
            what = f"{counted(count, 'pair')} with a centred cosine of {threshold:g} or more"
            remedy = "look at them (--out DIR); what is one picture belongs into one split, once"
            findings.append(Finding("warning", what, kind, count, shown, remedy))
    top = max((pair.cosine for pair in near.pairs), default=0.0)
    pairs = counted(near.within + near.between, "near-duplicate")
    summary = f"{how}: {pairs}, the closest at {top:.4f}"
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
