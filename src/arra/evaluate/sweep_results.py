"""What a sweep found: curves over guidance, each model at its best, differences of these."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arra.evaluate.comparison import Opened, difference_of
from arra.evaluate.conditions import cautions, differences
from arra.evaluate.directions import better
from arra.evaluate.table import markdown_table, shown
from arra.evaluate.training_steps import History

CHOSEN_HERE = (
    "each model's best guidance was chosen on the very pictures that its value is of, so the value "
    "at best is too good by what choosing gives; paint once more with another --seed at that "
    "guidance for a value of its own"
)


@dataclass(frozen=True)
class Point:
    """One model at one scale of guidance."""

    model: str
    cfg: float
    opened: Opened

    def value(self, key: str) -> float | None:
        """Of a measure; None where there is none."""
        value: float | None = self.opened.report["metrics"].get(key)
        return value

    def interval(self, key: str) -> list[float] | None:
        """Its limits."""
        found = self.opened.report["intervals"].get(key)
        return None if found is None else [found["low"], found["high"]]


def results(points: Sequence[Point], histories: Mapping[str, History | None]) -> dict[str, Any]:
    """Everything of sweep.json that is computed from the reports.

    curves {model: {key: [[cfg, value], ...]}} and, beside it, intervals {model: {key: [[low, high]
    or null, ...]}}; best {model: {key: {cfg, value, low, high}}} for measures that have a better
    side; differences {key: {model: its best less that of the first model, with paired tests}};
    steps {run: {models, curves: {key: [[steps, value at best], ...]}}}; warnings.
    """
    by_model: dict[str, list[Point]] = {}
    for point in points:
        by_model.setdefault(point.model, []).append(point)
    keys = list(dict.fromkeys(key for each in points for key in each.opened.report["metrics"]))
    best = {
        model: {key: found for key in keys if (found := _best(mine, key)) is not None}
        for model, mine in by_model.items()
    }
    curves: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for model, mine in by_model.items():
        known = {key: [p for p in mine if p.value(key) is not None] for key in keys}
        curves[model] = {key: [[p.cfg, p.value(key)] for p in at] for key, at in known.items()}
        intervals[model] = {key: [p.interval(key) for p in at] for key, at in known.items()}
    steps, doubts = _steps(best, histories)
    return {
        "curves": curves,
        "intervals": intervals,
        "best": {
            model: {key: _told(p, key) for key, p in of.items()} for model, of in best.items()
        },
        "best_chosen": CHOSEN_HERE,
        "differences": _differences(best, keys),
        "steps": steps,
        "warnings": [*_warnings(by_model), *_edges(by_model, best), *doubts],
    }


def _best(points: Sequence[Point], key: str) -> Point | None:
    """The best of one model; of equals the one with less guidance."""
    known = [point for point in points if point.value(key) is not None]
    side = better(key)
    if not known or side is None:
        return None
    sign = 1.0 if side == "lower" else -1.0
    return min(known, key=lambda point: (sign * (point.value(key) or 0.0), point.cfg))


def _told(point: Point, key: str) -> dict[str, Any]:
    low, high = point.interval(key) or (None, None)
    return {"cfg": point.cfg, "value": point.value(key), "low": low, "high": high}


def _differences(best: Mapping[str, Mapping[str, Point]], keys: Sequence[str]) -> dict[str, Any]:
    first, *others = best
    found: dict[str, Any] = {}
    for key in keys:
        for other in others:
            if key in best[first] and key in best[other]:
                pair = (best[first][key].opened, best[other][key].opened)
                found.setdefault(key, {})[other] = difference_of(*pair, key)
    return found


def _warnings(by_model: Mapping[str, Sequence[Point]]) -> Iterator[str]:
    """Those of the reports, once; and what makes models incomparable, or hard to compare."""
    every = [point for points in by_model.values() for point in points]
    yield from dict.fromkeys(
        f"{point.model}: {text}" for point in every for text in point.opened.report["warnings"]
    )
    for model, (start, *more) in by_model.items():  # some may be of an earlier sweep
        for point in more:
            for text in differences(start.opened.report, point.opened.report):
                yield (
                    f"{model} at guidance {start.cfg:g} and {point.cfg:g} was not measured the "
                    f"same way: {text}"
                )
    (name, first), *others = by_model.items()
    for other, points in others:
        pair = (first[0].opened.report, points[0].opened.report)
        for text in differences(*pair):
            yield f"{name} and {other} were not measured the same way: {text}"
        for text in cautions(*pair):
            yield f"{name} and {other}: {text}"


def _edges(
    by_model: Mapping[str, Sequence[Point]], best: Mapping[str, Mapping[str, Point]]
) -> Iterator[str]:
    """Where the best may lie beyond the scales that were tried. Below 1 nobody looks for it."""
    for model, of in best.items():
        scales = [point.cfg for point in by_model[model]]
        for end, beyond in ((min(scales), "less"), (max(scales), "more")):
            keys = [key for key, point in of.items() if point.cfg == end and "/" not in key]
            if keys and len(scales) > 1 and not (beyond == "less" and end <= 1):
                yield (
                    f"{model}: best at the last --cfg tried, {end:g}: {', '.join(keys)}; "
                    f"try {beyond}"
                )


def _steps(
    best: Mapping[str, Mapping[str, Point]], histories: Mapping[str, History | None]
) -> tuple[dict[str, Any], list[str]]:
    """Values at best against training steps, where several models are of one run; doubts."""
    runs: dict[str, list[tuple[int, str]]] = {}
    for model, history in histories.items():
        if history is not None:
            runs.setdefault(history.run, []).append((history.steps, model))
    found: dict[str, Any] = {}
    doubts = []
    for models in runs.values():
        models.sort()
        names = [model for _, model in models]
        if len({steps for steps, _ in models}) < len(models):
            doubts.append(
                f"{', '.join(names)} do not say which run they are of: no curve over steps"
            )
        elif len(models) > 1:
            keys = list(dict.fromkeys(key for name in names for key in best[name]))
            curves = {
                key: [[steps, best[n][key].value(key)] for steps, n in models if key in best[n]]
                for key in keys
            }
            found[names[0]] = {"models": names, "curves": curves}
    return found, doubts


# ---- in a terminal -------------------------------------------------------------------------------


def told(found: Mapping[str, Any]) -> str:
    """A table for each measure: models against guidance, the best, and its difference."""
    models = [each["name"] for each in found["models"]]
    keys = list(dict.fromkeys(key for model in models for key in found["curves"][model]))
    parts = [_table(found, models, key) for key in keys]
    for run in found["steps"].values():
        rows = [
            [key, *(f"{value:.5g} at {steps:,}" for steps, value in points)]
            for key, points in run["curves"].items()
        ]
        heads = ["over training steps, at best", *run["models"]]
        parts.append(markdown_table(heads, [row for row in rows if len(row) == len(heads)]))
    if any(found["best"].values()):
        parts.append(f"note: {found['best_chosen']}")
    parts += [f"warning: {text}" for text in found["warnings"]]
    return "\n\n".join(parts)


def _table(found: Mapping[str, Any], models: Sequence[str], key: str) -> str:
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[better(key)]
    heads = [f"{key}{arrow}", *(f"cfg {cfg:g}" for cfg in found["cfg"])]
    compares, chosen = len(models) > 1, better(key) is not None
    heads += ["best"] * chosen + [f"− {models[0]}", "p"] * (compares and chosen)
    rows = []
    for model in models:
        values = dict(found["curves"][model].get(key, ()))
        row = [model, *(shown(values.get(cfg)) for cfg in found["cfg"])]
        best = found["best"][model].get(key)
        if chosen:
            row.append(
                "—"
                if best is None
                else f"{shown(best['value'], best['low'], best['high'])} at {best['cfg']:g}"
            )
        if compares and chosen:
            row += _difference(found["differences"].get(key, {}).get(model))
        rows.append(row)
    return markdown_table(heads, rows)


def _difference(change: Mapping[str, Any] | None) -> list[str]:
    if change is None:
        return ["", ""]
    test = change.get("over_seeds") or change.get("over_prompts")
    return [f"{change['difference']:+.5g}", "" if test is None else f"{test['p']:.3g}"]
