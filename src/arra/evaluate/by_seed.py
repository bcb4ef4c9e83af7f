"""Every measure seed by seed: how much it depends on the noise that pictures were painted from.

Legend: N pictures, S seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arra.evaluate.finding import Finding
from arra.evaluate.image_set import ImageSet
from arra.evaluate.paired import student_t

MOST = 16
"""Seeds whose features are kept apart; each takes a covariance matrix."""
Values = Mapping[str, float | None]


def seeds_of(generated: ImageSet) -> list[int]:
    """The seeds of a set, in rising order.

    Raises:
        ValueError: they are not known, or cannot be compared with each other.
    """
    if generated.runs is None:
        raise ValueError(
            f"--by-seed: {generated.source} does not say with which seeds its pictures were "
            f"painted; a folder of `arra generate` does, and so does --model"
        )
    seeds, counts = np.unique(np.array(generated.runs), return_counts=True)
    if not 2 <= len(seeds) <= MOST:
        raise ValueError(
            f"--by-seed: {generated.source} was painted with {len(seeds)} seeds, and 2 to {MOST} "
            f"can be told apart: paint --num of them for every prompt"
        )
    if len(set(counts)) > 1:
        raise ValueError(
            f"--by-seed: {generated.source} has {min(counts)} pictures of one seed and "
            f"{max(counts)} of another, but distances depend on the number: paint all prompts with "
            f"all seeds"
        )
    return [int(seed) for seed in seeds]


def put_by_seed(
    report: dict[str, Any],
    seeds: Sequence[int],
    findings: Mapping[int, Mapping[str, Finding]],
    scores: Mapping[str, np.ndarray],
    seed_of_N: Sequence[int],
) -> None:
    """Writes a report's `by_seed` {seed: {key: value}} and `over_seeds` {key: their mean}.

    Args:
        findings: by seed, by key.
        scores: of each picture, by index. Those whose mean over pictures is the set's value have
            one for each seed too.
        seed_of_N: by index.
    """
    values: dict[str, dict[str, float | None]] = {}
    for seed in seeds:
        found = {key: each.value for key, each in findings[seed].items()}
        mine_N = np.array(seed_of_N) == seed
        for key, score_N in scores.items():
            value = report["metrics"].get(key)
            if value is not None and np.isclose(np.nanmean(score_N), value):
                answered = score_N[mine_N & ~np.isnan(score_N)]
                found[key] = float(answered.mean()) if len(answered) else None
        values[str(seed)] = found
    each = len(seed_of_N) // len(seeds)
    report["by_seed"] = values
    report["over_seeds"] = {
        key: _over([values[str(seed)][key] for seed in seeds], each)
        for key in values[str(seeds[0])]
    }
    for key in report["over_seeds"]:
        reason = findings[seeds[0]][key].reason if key in findings[seeds[0]] else None
        if reason is not None:
            report["over_seeds"][key]["reason"] = reason


def _over(value_S: Sequence[float | None], pictures: int) -> dict[str, Any]:
    """Mean of the seeds' values with Student's interval at 95 %; null where one has no value."""
    found: dict[str, Any] = {"mean": None, "low": None, "high": None}
    known = [value for value in value_S if value is not None]
    if len(known) == len(value_S):
        mean, spread = float(np.mean(known)), float(np.std(known, ddof=1))
        half = student_t(len(known) - 1) * spread / len(known) ** 0.5
        found = {"mean": mean, "low": mean - half, "high": mean + half}
    return {**found, "seeds": len(value_S), "pictures_each": pictures}
