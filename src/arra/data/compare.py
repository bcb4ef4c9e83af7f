"""Are two preparations of one source the same? What other hardware may change, and how much.

On the same hardware with the same threads every byte is equal. Elsewhere sums are added in another
order: rows and their order stay, a few codes fall on the other side of a boundary, and features
differ in their last place.

Legend: N rows, D feature width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arra.data.manifest import Manifest, read_manifest
from arra.data.shards import Dataset, open_dataset

STEPS = 1.0
"""Float16 steps within which features count as the same."""


@dataclass(frozen=True)
class FeatureAgreement:
    """How near one feature is, over all rows.

    Attributes:
        equal: fraction of values that are equal to the bit.
        steps: the largest difference, in steps (`float16_steps`); None if shapes differ.
    """

    equal: float
    steps: float | None


@dataclass(frozen=True)
class SplitAgreement:
    """One split of both.

    Attributes:
        rows: of the one and of the other.
        first_difference: the first row whose id, text or grid of codes differs; None if none does.
        codes: fraction of equal codes; 0 where rows differ.
        features: by name, also those of captions (`text_feature.NAME`).
        same_files: whether all shards have the same bytes.
    """

    rows: tuple[int, int]
    first_difference: int | None
    codes: float
    features: Mapping[str, FeatureAgreement]
    same_files: bool

    @property
    def agrees(self) -> bool:
        """Same rows in the same order, features within STEPS; codes are only reported."""
        steps = [feature.steps for feature in self.features.values()]
        near = all(each is not None and each <= STEPS for each in steps)
        return self.first_difference is None and near


@dataclass(frozen=True)
class Comparison:
    """Two prepared datasets.

    Attributes:
        settings: what they were not prepared alike in; such datasets need not agree.
        splits: by name.
    """

    settings: list[str]
    splits: Mapping[str, SplitAgreement]

    @property
    def agrees(self) -> bool:
        """Prepared alike, and every split agrees."""
        return not self.settings and all(split.agrees for split in self.splits.values())

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"agrees": self.agrees, **asdict(self)}

    def told(self) -> str:
        """A few lines for people."""
        lines = [f"prepared differently: {difference}" for difference in self.settings]
        for name, split in self.splits.items():
            if split.same_files:
                lines.append(f"{name}: {split.rows[0]} rows, every byte equal")
                continue
            if split.first_difference is not None:
                one, other = split.rows
                lines.append(
                    f"{name}: {one} and {other} rows, which differ from row "
                    f"{split.first_difference} on"
                )
                continue
            lines.append(f"{name}: {split.rows[0]} rows in the same order")
            lines.append(f"  codes: {100 * split.codes:.4f} % equal")
            for feature, near in split.features.items():
                if near.steps is None:
                    lines.append(f"  {feature}: of other shapes")
                    continue
                lines.append(
                    f"  {feature}: {100 * near.equal:.4f} % of values equal, "
                    f"largest difference {near.steps:.2f} float16 steps"
                )
        lines.append("the datasets agree" if self.agrees else "the datasets do NOT agree")
        return "\n".join(lines)


def compare_datasets(one: Path | str, other: Path | str) -> Comparison:
    """Compares two prepared datasets row by row; each split is read into memory.

    Args:
        one, other: folders or URLs that `arra prepare --out` wrote.

    Raises:
        FileNotFoundError: one of them is no prepared dataset, or a shard is missing.
        ValueError: one of them is damaged.
    """
    manifests = read_manifest(one), read_manifest(other)
    names = list(dict.fromkeys([*manifests[0].splits, *manifests[1].splits]))
    return Comparison(
        _settings(*manifests), {name: _split(one, other, name, *manifests) for name in names}
    )


def _settings(one: Manifest, other: Manifest) -> list[str]:
    """What decides codes and features; how many rows a shard has does not."""
    pairs = {
        "the image tokenizer": (one.tokenizer.fingerprint, other.tokenizer.fingerprint),
        "--size": (one.size, other.size),
        "the framing": (one.crop, other.crop),
        "the source's content": (
            one.source.get("fingerprints"),
            other.source.get("fingerprints"),
        ),
    }
    for kind in ("features", "text_features", "grids"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        for name in sorted({*mine, *theirs}):
            prints = [found and found.encoder for found in (mine.get(name), theirs.get(name))]
            pairs[f"the encoder of {name}"] = (prints[0], prints[1])
    return [what for what, (mine, theirs) in pairs.items() if mine != theirs]


def _split(
    one: Path | str, other: Path | str, name: str, mine: Manifest, theirs: Manifest
) -> SplitAgreement:
    there = mine.splits.get(name), theirs.splits.get(name)
    if there[0] is None or there[1] is None:
        rows = tuple(0 if split is None else split.rows for split in there)
        return SplitAgreement((rows[0], rows[1]), 0, 0.0, {}, False)
    rows = (there[0].rows, there[1].rows)
    same_files = [s.sha256 for s in there[0].shards] == [s.sha256 for s in there[1].shards]
    shared = [feature for feature in mine.aligned() if feature in theirs.aligned()]
    both = open_dataset(one, name, features=shared), open_dataset(other, name, features=shared)
    different = _first_difference(*both)
    if different is not None:
        return SplitAgreement(rows, different, 0.0, {}, same_files)
    codes_of_each = zip(both[0].image_ids, both[1].image_ids, strict=True)
    equal = sum(int((a == b).sum()) for a, b in codes_of_each)
    codes = equal / sum(map(len, both[0].image_ids))
    features = {feature: _agreement(pairs) for feature, pairs in _features(*both)}
    return SplitAgreement(rows, None, codes, features, same_files)


def _first_difference(one: Dataset, other: Dataset) -> int | None:
    for row in range(max(len(one), len(other))):
        if row >= min(len(one), len(other)):
            return row
        mine, theirs = (
            (d.ids[row], d.texts[row], d.samples[row], d.grids[row].tolist()) for d in (one, other)
        )
        if mine != theirs:
            return row
    return None


Pairs = Iterator[tuple[np.ndarray, np.ndarray]]


def _features(one: Dataset, other: Dataset) -> Iterator[tuple[str, Pairs]]:
    """Name and pairs of (N, D) arrays of every feature that both have."""
    for name in one.features.keys() & other.features.keys():
        yield name, iter([(one.features[name], other.features[name])])
    for name in one.patch_features.keys() & other.patch_features.keys():
        grids = one.patch_features[name], other.patch_features[name]
        yield name, ((grids[0][row].numpy(), grids[1][row].numpy()) for row in range(len(one)))
    for name in one.text_features.keys() & other.text_features.keys():
        texts = one.text_features[name], other.text_features[name]
        yield f"text_feature.{name}", ((texts[0][row], texts[1][row]) for row in range(len(one)))


def _agreement(pairs: Pairs) -> FeatureAgreement:
    equal, values, steps = 0, 0, 0.0
    for one_ND, other_ND in pairs:
        if one_ND.shape != other_ND.shape:
            return FeatureAgreement(0.0, None)
        equal += int((one_ND == other_ND).sum())
        values += one_ND.size
        if one_ND.size:
            steps = max(steps, float(float16_steps(one_ND, other_ND).max()))
    return FeatureAgreement(equal / max(1, values), steps)


def float16_steps(one_ND: np.ndarray, other_ND: np.ndarray) -> np.ndarray:
    """Differences (N, D) in units of the spacing of float16 at the larger value.

    The spacing is at least that at the row's root mean square: a value near zero is a sum of many
    large ones, and no more exact than they are.
    """
    a_ND, b_ND = one_ND.astype(np.float64), other_ND.astype(np.float64)
    rms_N1 = np.sqrt((a_ND**2).mean(axis=-1, keepdims=True))
    scale_ND = np.maximum(np.maximum(np.abs(a_ND), np.abs(b_ND)), rms_N1)
    return np.abs(a_ND - b_ND) / np.spacing(scale_ND.astype(np.float16)).astype(np.float64)
