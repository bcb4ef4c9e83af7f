"""`arra evaluate compare`: reports side by side, refused where they measured different things.

Legend: P prompts that both painted.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from arra.evaluate.comparison_page import write_comparison
from arra.evaluate.conditions import cautions, differences
from arra.evaluate.directions import better
from arra.evaluate.outputs import COMPARISON, REPORT, SCORES, check_out
from arra.evaluate.paired import over_seeds, paired_difference
from arra.evaluate.report import FORMAT_VERSION, begun
from arra.evaluate.table import markdown_table, shown
from arra.files import read_json


@dataclass(frozen=True)
class CompareConfig:
    """Puts reports side by side, with their differences to the first one.

    Reports of other references, numbers of images, extractors or crops are refused.
    """

    reports: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="REPORT ...")]
    """Two or more: JSON files that `arra evaluate` wrote, or its folders (report.json)."""
    force: bool = False
    """Compare what was measured differently; each difference is a warning then."""
    out: Path | None = None
    """Where the comparison goes: a file *.json, or a folder with Markdown and an HTML page too."""

    def __post_init__(self) -> None:
        if len(self.reports) < 2:
            raise ValueError("a comparison takes two or more reports")


@dataclass(frozen=True)
class Opened:
    """A report, and its scores by picture where its folder has them."""

    name: str
    report: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]] = ()


def open_report(spec: str) -> Opened:
    """A report of `arra evaluate`.

    Raises:
        ValueError: there is none, or it is something else.
    """
    path = Path(spec)
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: there is no such report; arra evaluate --out {spec} writes it")
    report = read_json(file)
    if not isinstance(report, dict) or not isinstance(report.get("metrics"), dict):
        raise ValueError(f"{file} is no report of `arra evaluate`: it has no metrics")
    if "format_version" not in report:
        raise ValueError(
            f"{file} is of format 1, which says too little to be compared: measure again (this "
            f"version writes format {FORMAT_VERSION})"
        )
    missing = sorted(begun(0).keys() - report.keys())
    if missing:
        raise ValueError(f"{file} is no report of `arra evaluate`: it has no {missing[0]}")
    scores = file.parent / SCORES
    return Opened(spec, report, _rows(scores) if path.is_dir() and scores.is_file() else ())


def compare(config: CompareConfig) -> dict[str, Any]:
    """The comparison, JSON-ready; written to `config.out` if given.

    Raises:
        ValueError: reports that measured different things, without `config.force`.
    """
    if config.out is not None:
        check_out(config.out, COMPARISON)
    found = compared_reports([open_report(spec) for spec in config.reports], force=config.force)
    if config.out is not None:
        write_comparison(config.out, found)
    return found


def compared_reports(opened: Sequence[Opened], *, force: bool = False) -> dict[str, Any]:
    """See `compare`. Every report is compared with the first."""
    first, *others = opened
    warnings = [f"{each.name}: {text}" for each in opened for text in each.report["warnings"]]
    for other in others:
        shared = [key for key in first.report["metrics"] if key in other.report["metrics"]]
        if not shared:
            raise ValueError(f"{first.name} and {other.name} have no measure in common")
        unlike = differences(first.report, other.report)
        if unlike and not force:
            raise ValueError(
                f"{first.name} and {other.name} did not measure the same way: {'; '.join(unlike)}. "
                f"Measure both alike, or compare all the same with --force"
            )
        between = f"{first.name} and {other.name}"
        warnings += [f"{between} did not measure the same way: {text}" for text in unlike]
        warnings += [f"{between}: {text}" for text in cautions(first.report, other.report)]
    keys = list(dict.fromkeys(key for each in opened for key in each.report["metrics"]))
    return {
        "format_version": FORMAT_VERSION,
        "reports": [
            {"name": each.name, "generated": each.report.get("generated")} for each in opened
        ],
        "metrics": {key: [_value(each.report, key) for each in opened] for key in keys},
        "differences": {
            key: [None, *(difference_of(first, other, key) for other in others)] for key in keys
        },
        "warnings": warnings,
    }


def _value(report: Mapping[str, Any], key: str) -> dict[str, Any]:
    interval = report["intervals"].get(key, {})
    return {
        "value": report["metrics"].get(key),
        "low": interval.get("low"),
        "high": interval.get("high"),
        "reason": report["reasons"].get(key),
    }


def difference_of(first: Opened, second: Opened, key: str) -> dict[str, Any] | None:
    """`second - first` of one measure, with the paired tests that the reports allow."""
    values = [each.report["metrics"].get(key) for each in (first, second)]
    if None in values:
        return None
    found: dict[str, Any] = {"difference": values[1] - values[0], "better": better(key)}
    seeds = [each.report.get("by_seed", {}) for each in (first, second)]
    if seeds[0].keys() == seeds[1].keys() and len(seeds[0]) > 1:
        pairs = [[by_seed[seed].get(key) for seed in seeds[0]] for by_seed in seeds]
        if None not in (*pairs[0], *pairs[1]):
            found["over_seeds"] = over_seeds(*pairs)
    paired = _over_prompts(first.scores, second.scores, key)
    if paired is not None:
        found["over_prompts"] = paired
    return found


def _over_prompts(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], key: str
) -> dict[str, Any] | None:
    """The paired difference of a score, prompt by prompt: a prompt's pictures are one value.

    None where the two did not paint the same prompts, or have no such score.
    """
    one, other = _by_prompt(first, key), _by_prompt(second, key)
    if not one or one.keys() != other.keys():
        return None
    if any(len(one[prompt]) != len(other[prompt]) for prompt in one):
        return None
    means = [
        np.array([np.mean(scores[prompt]) for prompt in one], np.float64) for scores in (one, other)
    ]
    found = paired_difference(*means)
    return None if found is None else found.to_json()


def _by_prompt(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[float]]:
    """Scores that are there, by prompt."""
    found: dict[str, list[float]] = {}
    for row in rows:
        score, caption = row["scores"].get(key), row.get("caption")
        if score is not None and caption is not None:
            found.setdefault(caption, []).append(float(score))
    return found


def _rows(file: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("scores"), dict):
            raise ValueError(f"{file} line {number} is no JSON object with scores: measure again")
        rows.append(row)
    return rows


# ---- in a terminal -------------------------------------------------------------------------------


def told(found: Mapping[str, Any]) -> str:
    """A table of values with their intervals, then differences to the first, then warnings."""
    names = [each["name"] for each in found["reports"]]
    heads = ["measure", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    rows = []
    for key, values in found["metrics"].items():
        changes = found["differences"][key][1:]
        cells = [shown(each["value"], each["low"], each["high"]) for each in values]
        changed = ["—" if each is None else f"{each['difference']:+.5g}" for each in changes]
        rows.append([f"{key} {_arrow(key)}".rstrip(), *cells, *changed])
    lines = [markdown_table(heads, rows), *_tests(found, names)]
    return "\n".join([*lines, *(f"warning: {text}" for text in found["warnings"])])


def _arrow(key: str) -> str:
    return {"lower": "↓", "higher": "↑", None: ""}[better(key)]


def _tests(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    said = {"over_seeds": "sampling seeds", "over_prompts": "prompts"}
    for key, changes in found["differences"].items():
        for name, each in zip(names[1:], changes[1:], strict=True):
            for test, pairs in said.items():
                if each is None or test not in each:
                    continue
                paired = each[test]
                count = paired["seeds" if test == "over_seeds" else "n"]
                yield (
                    f"{key}, {name} − {names[0]}: "
                    f"{shown(paired['mean'], paired['low'], paired['high'])}, "
                    f"p = {paired['p']:.3g} paired over {count} {pairs}"
                )
