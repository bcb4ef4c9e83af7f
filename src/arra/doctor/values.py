"""Whether codes and features are values that can be trained on, and what they look like.

Legend: N rows, D feature width, K codebook size.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arra.data.manifest import AGAIN, Manifest
from arra.doctor.findings import EXAMPLES, Check, Finding, counted, first
from arra.doctor.scan import SplitScan, joined_unit_sum, values_of

FEW_CODES = 0.1
"""Share of the codes that could have been used, below which an image tokenizer is called dead."""

FAR = 4.0
"""A feature whose length is so many times the median, or the median so many times its, is odd."""

CONSTANT = 0.995
"""Mean cosine with one fixed vector above which features hardly depend on the picture."""


def codes_check(folder: Path, manifest: Manifest, scans: Mapping[str, SplitScan]) -> Check:
    """Codes fit their grid and the codebook; how much of the codebook is ever used."""
    findings = _wrong(folder, scans, "codes")
    size = manifest.tokenizer.codebook_size
    uses_K = sum((scan.uses_K for scan in scans.values()), np.zeros(size, np.int64))
    grids: Counter[tuple[int, int]] = Counter()
    for scan in scans.values():
        grids.update(scan.grids)
    number, used = int(uses_K.sum()), int((uses_K > 0).sum())
    if not number:
        return Check("codes", "no codes", findings)
    share_K = uses_K[uses_K > 0] / number
    perplexity = float(np.exp(-(share_K * np.log(share_K)).sum()))
    # Of K equally likely codes, `number` draws leave K (1 - 1/K)^number unused.
    likely = size * (1 - (1 - 1 / size) ** number)
    if used < FEW_CODES * likely:
        what = (
            f"{used:,} of {size:,} codes are ever used, where {likely:,.0f} could be: the image "
            f"tokenizer says little about these pictures"
        )
        remedy = "fit one on them (arra tokenizer train) and prepare the data again with it"
        findings.append(Finding("warning", what, "all splits", size - used, (), remedy))
    shape = (
        f"{grids.most_common(1)[0][0][0]}x{grids.most_common(1)[0][0][1]} codes"
        if len(grids) == 1
        else f"{counted(len(grids), 'grid')}"
    )
    summary = (
        f"{shape}, {used:,} of {size:,} codes used ({(size - used) / size:.0%} dead), "
        f"perplexity {perplexity:,.0f}"
    )
    facts: dict[str, Any] = {
        "grids": {f"{h}x{w}": count for (h, w), count in sorted(grids.items())},
        "codebook_size": size,
        "codes_used": used,
        "dead_share": (size - used) / size,
        "perplexity": perplexity,
        "uses_sorted": _thinned(np.sort(uses_K)[::-1] / number),
    }
    return Check("codes", summary, findings, facts)


def _thinned(falling_K: np.ndarray, points: int = 200) -> list[list[float]]:
    """(rank, share of all codes) at ranks that are evenly spaced on a logarithmic axis."""
    ranks = np.unique(np.geomspace(1, len(falling_K), points).astype(int))
    return [[float(rank), float(falling_K[rank - 1])] for rank in ranks]


def features_check(
    folder: Path, manifest: Manifest, scans: Mapping[str, SplitScan], name: str
) -> Check:
    """Finite and not zero, of similar lengths, and not the same for every picture."""
    findings = _wrong(folder, scans, name)
    norm_N = np.concatenate([scan.norms[name] for scan in scans.values()])
    good_N = norm_N[np.isfinite(norm_N)]
    if not good_N.size:
        return Check(f"feature {name}", "no usable value", findings)
    low, middle, high = (float(v) for v in np.percentile(good_N, (0, 50, 100)))
    for split, scan in scans.items():
        far = (scan.norms[name] > FAR * middle) | (scan.norms[name] < middle / FAR)
        rows = np.flatnonzero(far)
        if rows.size:
            ids = values_of(folder, scan.shards, "id", rows[:EXAMPLES]).values()
            what = f"{counted(len(rows), 'row')} whose feature is {FAR:g} times longer or shorter "
            what += f"than most (median {middle:.3g})"
            remedy = "look at these pictures in the source"
            findings.append(Finding("warning", what, split, len(rows), first(ids), remedy))
    total_D, rows_N = joined_unit_sum(scans, name)
    constant = float(np.linalg.norm(total_D) / max(1, rows_N))
    centred = float(np.linalg.norm(manifest.features[name].centred_unit_mean))
    if constant > CONSTANT and rows_N > 1:
        what = (
            f"features hardly depend on the picture: one fixed vector reaches a mean cosine of "
            f"{constant:.4f} with all of them"
        )
        remedy = "align to centred features, or take another encoder or pooling"
        findings.append(Finding("warning", what, "all splits", rows_N, (), remedy))
    summary = (
        f"{manifest.features[name].dim} wide, length {low:.3g} to {high:.3g} (median "
        f"{middle:.3g}); a constant answer reaches cosine {constant:.3f}, centred {centred:.3f}"
    )
    facts = {
        "norm": {"min": low, "median": middle, "max": high},
        "norms": _norm_histogram(good_N),
        "constant_cosine": constant,
        "constant_cosine_centred": centred,
    }
    return Check(f"feature {name}", summary, findings, facts)


def _norm_histogram(norm_N: np.ndarray) -> dict[str, list[float]]:
    counts, edges = np.histogram(norm_N, bins=24)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def vectors_checks(folder: Path, manifest: Manifest, scans: Mapping[str, SplitScan]) -> list[Check]:
    """Captions as features and grids of patches: finite, and as many vectors as there may be."""
    checks = []
    for name, text in manifest.text_features.items():
        said = f"{text.dim} wide, at most {text.length} tokens a caption"
        checks.append(Check(f"text {name}", said, _wrong(folder, scans, f"text {name}")))
    for name, grid in manifest.grids.items():
        constant = float(np.linalg.norm(grid.unit_mean))
        said = (
            f"{grid.dim} wide, {grid.grid[0]}x{grid.grid[1]} cells as {grid.stored}; a constant "
            f"answer reaches cosine {constant:.3f}"
        )
        facts = {"constant_cosine": constant}
        checks.append(Check(f"grid {name}", said, _wrong(folder, scans, f"grid {name}"), facts))
    return checks


def _wrong(folder: Path, scans: Mapping[str, SplitScan], what: str) -> list[Finding]:
    """Rows that the scan found to be damaged."""
    findings = []
    for split, scan in scans.items():
        for (which, why), rows in scan.wrong.items():
            if which == what:
                ids = values_of(folder, scan.shards, "id", rows[:EXAMPLES]).values()
                said = f"{counted(len(rows), 'row')} with {why}"
                if not which.startswith("codes"):
                    said = f"{counted(len(rows), 'row')} whose feature is {why}"
                findings.append(Finding("damage", said, split, len(rows), first(ids), AGAIN))
    return findings


def grid_histogram(grids: Mapping[str, int], bins: int = 12) -> list[tuple[str, int]]:
    """The commonest grids by size, and all others together."""
    ranked = sorted(grids.items(), key=lambda item: -item[1])
    shown, others = ranked[:bins], sum(count for _, count in ranked[bins:])
    return shown + ([(f"{len(ranked) - bins} others", others)] if others else [])
