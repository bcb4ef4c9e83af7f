"""What a study's results.json holds, and how a measure is named, printed and judged.

results   title, kind, summary of data and model, pairs, over_seeds, ceiling, depth, run
pair      seed, arms {plain, aligned}, differences {group: {metric: paired difference}}
arm       log, points, metrics {group: {metric: interval}}, guidance, seconds, command, config
interval  {mean, low, high, n}; low and high are null where there is none
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

ARMS = ("plain", "aligned")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Metric:
    """A measure: `share` is printed in percent, `value` with three significant digits."""

    name: str
    label: str
    kind: Literal["share", "value"]
    better: Literal["higher", "lower"]
    meaning: str


_SCENES = (
    Metric("all_right", "all right", "share", "higher", "everything the prompt asks for is there"),
    Metric("shape", "shape", "share", "higher", "the kinds of shape are those asked for"),
    Metric("colour", "colour", "share", "higher", "every shape has the colour asked for"),
    Metric("size", "size", "share", "higher", "every shape has the size asked for"),
    Metric("count", "count", "share", "higher", "as many shapes as asked for, no more"),
    Metric(
        "relation",
        "relation",
        "share",
        "higher",
        "left of, right of, above, below, where both shapes are there",
    ),
    Metric("background", "background", "share", "higher", "the background asked for"),
    Metric("fragments", "fragments", "value", "lower", "pieces that belong to no shape, per image"),
)
_KNOWN = {metric.name: metric for metric in _SCENES} | {
    "val_loss_ar": Metric(
        "val_loss_ar",
        "validation loss",
        "value",
        "lower",
        "next-token cross entropy on held-out images, nats a token",
    )
}


def metric(name: str) -> Metric:
    """The measure called `name`: a scene field, val_loss_ar, fd@ENCODER or kid@ENCODER."""
    if name in _KNOWN:
        return _KNOWN[name]
    kind, _, encoder = name.partition("@")
    if kind == "fd":
        meaning = f"Fréchet distance to real images in the features of {encoder}"
        return Metric(name, name, "value", "lower", meaning)
    if kind == "kid":
        meaning = f"squared kernel distance to real images in the features of {encoder}"
        return Metric(name, name, "value", "lower", meaning)
    raise ValueError(f"results hold an unknown measure {name!r}: written by a newer version?")


CLEAR = 0.05
"""p below which a difference counts, where its interval agrees."""


def verdict(measure: Metric, difference: dict[str, Any] | None) -> str:
    """better, worse or unclear: which side of 0 the interval of aligned - plain lies on.

    Where there is a p, it must agree: a percentile interval is too narrow for rare answers.
    """
    if difference is None or difference.get("low") is None:
        return "unclear"
    low, high, p = difference["low"], difference["high"], difference.get("p")
    if low <= 0 <= high or (p is not None and p >= CLEAR):
        return "unclear"
    return "better" if (low > 0) == (measure.better == "higher") else "worse"


def in_order(names: Iterable[str]) -> list[str]:
    """Measures in the order of the tables: all right first, distances after the scene fields."""
    known = [measure.name for measure in _SCENES]
    return sorted(names, key=lambda n: known.index(n) if n in known else len(known))


def show(measure: Metric, value: float | None) -> str:
    """A value for a reader: 41.2 % or 0.0317."""
    if value is None:
        return "–"
    if measure.kind == "share":
        return f"{100 * value:.1f} %"
    return significant(value)


def show_difference(measure: Metric, value: float | None, like: float | None = None) -> str:
    """A difference with its sign: +3.1 (points) or −0.031, to as many decimals as `like` has."""
    if value is None:
        return "–"
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    if measure.kind == "share":
        return f"{sign}{100 * abs(value):.1f}"
    return f"{sign}{significant(abs(value), like)}"


def significant(value: float, like: float | None = None) -> str:
    """Three significant digits of `like` (else of the value), no exponent where that reads well."""
    scale = abs(value) if like is None else max(abs(value), abs(like))
    if scale == 0:
        return "0"
    if not 1e-4 <= scale < 1e6:
        return f"{value:.2e}".replace("-", "−")
    digits = max(0, 2 - int(f"{scale:e}".split("e")[1]))
    return f"{value:,.{digits}f}".replace("-", "−")
