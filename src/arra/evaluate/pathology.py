"""Do painted pictures show the findings that they should? The AUROC of a classifier's scores.

A classifier that was trained on real pictures is applied to real and to generated ones, and its
scores are compared with what the pictures are said to show. Where painting loses a finding, the
AUROC of the generated pictures falls below that of the real ones.

Legend: N pictures, C classes, P classes that both sets can be judged by, R bootstrap resamples.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from arra.evaluate.finding import Finding
from arra.evaluate.intervals import RESAMPLES

FEWEST = 5
"""Pictures with, and pictures without a finding, below which it has no AUROC: its interval would
say nothing."""

COLUMNS = ("labels", "label", "finding", "findings", "finding_labels")
"""Columns that hold the names of all that a picture shows, tried in this order."""

Unmentioned = Literal["unknown", "negative"]
"""What an empty cell of a finding's own column means."""

METHOD = "bootstrap over images"
_NONE = ("nofinding", "normal", "none", "")
_SAME = {"pleuraleffusion": "effusion"}
"""CheXpert's and MIMIC's name of what NIH and torchxrayvision call Effusion (mlmed/torchxrayvision
f4087a0, datasets.py, classes CheX_Dataset and MIMIC_Dataset)."""


@dataclass(frozen=True)
class Scores:
    """A classifier's scores of one set of pictures, and what is known of them.

    Attributes:
        scores_NC: float; any scale, the more the likelier.
        labels_NC: float; 1 shows it, 0 does not, NaN not known.
    """

    scores_NC: np.ndarray
    labels_NC: np.ndarray

    def __post_init__(self) -> None:
        assert self.scores_NC.shape == self.labels_NC.shape, "a label for each score"
        if not np.isfinite(self.scores_NC).all():
            raise ValueError("A classifier's scores hold NaN or infinity: check it and its images.")


# ---- AUROC ---------------------------------------------------------------------------------------


def auroc(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted by half.

    The Mann-Whitney statistic, equal to the area under the ROC curve (Hanley and McNeil 1982).
    Rows whose label is NaN do not count. NaN where there is no positive or no negative.
    """
    known_N = ~np.isnan(labels_N)
    ranked = _Ranked(scores_N[known_N], labels_N[known_N])
    return float(ranked.auroc(np.ones(int(known_N.sum()))))


def pathology_auroc(
    real: Scores,
    generated: Scores,
    classes: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Finding]:
    """`auroc_real`, `auroc_generated` and `auroc_difference` (real - generated).

    Values are means over the P classes that have at least FEWEST positives and negatives in both
    sets, so that both are means of the same; `details["classes"]` has each class alone. Intervals
    are percentile bootstraps over images, all classes of an image together, the two sets
    resampled independently.
    """
    sets = {"real": real, "generated": generated}
    counts = {
        name: [(int((c == 1).sum()), int((c == 0).sum())) for c in each.labels_NC.T]
        for name, each in sets.items()
    }
    usable = [c for c in range(len(classes)) if all(min(n[c]) >= FEWEST for n in counts.values())]
    left_out = {
        name: "; ".join(f"{s}: {n[c][0]} with, {n[c][1]} without" for s, n in counts.items())
        for c, name in enumerate(classes)
        if c not in usable
    }
    n = {"real": len(real.labels_NC), "generated": len(generated.labels_NC)}
    n["difference"] = min(n.values())
    if not usable:
        reason = (
            f"no class has {FEWEST} pictures with it and {FEWEST} without it in both sets "
            f"({'; '.join(f'{k} ({v})' for k, v in list(left_out.items())[:3])})"
        )
        return {f"auroc_{name}": Finding(None, n[name], reason=reason) for name in n}
    generator = np.random.default_rng(seed)
    values, drawn = {}, {}
    for name, each in sets.items():
        values[name], drawn[name] = _with_resamples(each, usable, resamples, generator)
    values["difference"] = values["real"] - values["generated"]
    drawn["difference"] = drawn["real"] - drawn["generated"]
    found = {}
    for name, value_P in values.items():
        by_class = {}
        for p, c in enumerate(usable):
            low, high = _limits(drawn[name][:, p])
            entry: dict[str, Any] = {"auroc": float(value_P[p]), "low": low, "high": high}
            if name in counts:
                entry["positives"], entry["negatives"] = counts[name][c]
            by_class[classes[c]] = entry
        low, high = _limits(np.nanmean(drawn[name], axis=1))
        details = {"classes": by_class, "left_out": left_out}
        left = f"without {', '.join(left_out)}: too few pictures" if left_out else None
        mean = float(value_P.mean())
        found[f"auroc_{name}"] = Finding(mean, n[name], low, high, METHOD, left, details)
    return found


def _with_resamples(
    given: Scores, usable: Sequence[int], resamples: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (P,) of the pictures, and (R, P) of pictures drawn with replacement."""
    count = len(given.labels_NC)
    ranked, rows = [], []
    for c in usable:
        known = np.flatnonzero(~np.isnan(given.labels_NC[:, c]))
        ranked.append(_Ranked(given.scores_NC[known, c], given.labels_NC[known, c]))
        rows.append(known)
    value_P = np.array([r.auroc(np.ones(len(at))) for r, at in zip(ranked, rows, strict=True)])
    drawn_RP = np.empty((resamples, len(usable)))
    for r in range(resamples):
        times_N = np.bincount(generator.integers(0, count, count), minlength=count).astype(float)
        drawn_RP[r] = [each.auroc(times_N[at]) for each, at in zip(ranked, rows, strict=True)]
    return value_P, drawn_RP


def _limits(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values_R, (0.025, 0.975))
    return float(low), float(high)


class _Ranked:
    """Scores sorted once, for the AUROC of many weightings of their rows."""

    def __init__(self, scores_N: np.ndarray, labels_N: np.ndarray) -> None:
        _, self._level_N = np.unique(scores_N, return_inverse=True)
        self._levels = int(self._level_N.max()) + 1 if len(scores_N) else 0
        self._positive_N = labels_N == 1

    def auroc(self, times_N: np.ndarray) -> float:
        """With row i taken times_N[i] times; NaN without positives or negatives."""
        positive_L = np.bincount(self._level_N, times_N * self._positive_N, self._levels)
        negative_L = np.bincount(self._level_N, times_N * ~self._positive_N, self._levels)
        pairs = positive_L.sum() * negative_L.sum()
        below_L = np.cumsum(negative_L) - negative_L / 2
        return float(positive_L @ below_L / pairs) if pairs else float("nan")


# ---- labels --------------------------------------------------------------------------------------


def labels_of(
    extras: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    *,
    column: str | None = None,
    class_names: Sequence[str] = (),
    unmentioned: Unmentioned = "unknown",
) -> np.ndarray:
    """What a set's columns say of its pictures: (N, C) of 1, 0 and NaN (not known).

    Two layouts are read. A column per class, found by its name whatever its case, spaces and
    underscores, as in CheXpert's and MIMIC-CXR's tables: 1 shows it, 0 does not, -1 (uncertain) is
    not known, and empty is what `unmentioned` says, except that a 1 in `No Finding` makes it 0.
    Or one column with the names of all that a picture shows, parted by commas, semicolons or |, or
    the number of its class among `class_names`: what it does not name is not there, and of a
    picture whose cell is empty nothing is known.

    Args:
        column: the one column; by default the first of COLUMNS where no class has its own.

    Raises:
        ValueError: no such columns, or a value that is none of these.
    """
    columns = {_plain(name): name for extra in extras for name in extra}
    own = [columns.get(_plain(name)) for name in classes]
    if column is None and not any(own):
        column = next((columns[_plain(c)] for c in COLUMNS if _plain(c) in columns), None)
        if column is None:
            raise ValueError(
                f"no column says what the pictures show: the classifier's classes are "
                f"{', '.join(filter(None, classes))}, the set's columns "
                f"{', '.join(sorted(columns.values())) or 'none'}; name the column of labels"
            )
    if column is not None:
        rows = [_named(extra.get(column), column, class_names) for extra in extras]
        return np.array([_of_names(row, classes) for row in rows], dtype=np.float64)
    healthy = columns.get("nofinding")
    labels_NC = np.full((len(extras), len(classes)), np.nan)
    for n, extra in enumerate(extras):
        is_healthy = healthy is not None and _cell(extra.get(healthy), healthy) == 1
        for c, name in enumerate(own):
            if name is not None:
                labels_NC[n, c] = _of_cell(extra.get(name), name, is_healthy, unmentioned)
    return labels_NC


def labels_by_caption(
    captions: Sequence[str], known_captions: Sequence[str], known_labels_NC: np.ndarray
) -> np.ndarray:
    """Labels (M, C) of pictures painted from the captions of pictures whose labels are known.

    NaN where no picture has that caption, or where those that have it differ.
    """
    by_caption: dict[str, list[int]] = {}
    for row, caption in enumerate(known_captions):
        by_caption.setdefault(caption, []).append(row)
    labels_MC = np.full((len(captions), known_labels_NC.shape[1]), np.nan)
    for m, caption in enumerate(captions):
        rows_rC = known_labels_NC[by_caption.get(caption, [])]
        if len(rows_rC):
            agreed_C = (rows_rC == rows_rC[0]).all(axis=0)
            labels_MC[m, agreed_C] = rows_rC[0, agreed_C]
    return labels_MC


def _plain(name: str) -> str:
    plain = re.sub(r"[^0-9a-z]", "", name.lower())
    return _SAME.get(plain, plain)


def _cell(value: Any, column: str) -> float | None:
    """A number, or None for an empty cell."""
    if value is None or value == "" or value != value:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if number not in (1.0, 0.0, -1.0):
        raise ValueError(
            f"column {column} holds {value!r}: labels are 1 (shows it), 0 (does not), -1 "
            f"(uncertain) or empty"
        )
    return number


def _of_cell(value: Any, column: str, healthy: bool, unmentioned: Unmentioned) -> float:
    number = _cell(value, column)
    if healthy:
        return 0.0
    if number is None:
        return 0.0 if unmentioned == "negative" else np.nan
    return np.nan if number == -1 else number


def _named(value: Any, column: str, class_names: Sequence[str]) -> set[str] | None:
    """The plain names of all that a picture shows; None where nothing is known."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, str):
        return {_plain(part) for part in re.split(r"[,;|]", value)} - set(_NONE)
    number = int(value)
    if not 0 <= number < len(class_names):
        raise ValueError(
            f"column {column} holds the number {number}, but the set names "
            f"{len(class_names)} classes: give a column of names"
        )
    return {_plain(class_names[number])} - set(_NONE)


def _of_names(shown: set[str] | None, classes: Sequence[str]) -> list[float]:
    if shown is None:
        return [np.nan] * len(classes)
    return [float(_plain(name) in shown) if name else np.nan for name in classes]
