"""Plots as inline SVG whose colours are CSS variables: one file, light and dark.

matplotlib draws with fixed stand-in colours; `to_svg` replaces each by `var(--name)`, which the
page's style sheet (frame.py) defines for both schemes. Hues are Okabe and Ito's, and every series
also differs by marker or dash, so nothing is said by colour alone.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

# Stand-ins: any colours that occur nowhere else.
INK, MUTED, RULE = "#010203", "#040506", "#070809"
PLAIN, ALIGNED, THIRD = "#0a0b0c", "#0d0e0f", "#101112"
FOURTH, FIFTH, SIXTH = "#131415", "#161718", "#191a1b"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PLAIN: "--plain",
    ALIGNED: "--aligned",
    THIRD: "--third",
    FOURTH: "--fourth",
    FIFTH: "--fifth",
    SIXTH: "--sixth",
}
COLOURS = (ALIGNED, PLAIN, THIRD, FOURTH, FIFTH, SIXTH)
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Of things that are compared, in their order on a page."""

STEPS = (1, 2, 2.5, 5, 10)
"""Between the numbers on an axis: those that a reader counts in."""
TICKS = 8
"""Of values that were measured, so many are written on an axis themselves."""
MOST_BARS = 40

LETTERS = 62
"""That fit into a line of a legend, their lines and gaps counted as 5 each."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: crisp, searchable, in the page's font
    "svg.hashsalt": "arra",  # ids do not change from run to run
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "lines.linewidth": 2.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Series:
    """One line. `low` and `high`, if given, are drawn as a band or as whiskers."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marker: str = ""
    dashed: bool = False
    faint: bool = False
    alpha: float = field(default=1.0, kw_only=True)


def curve(
    series: Sequence[Series],
    *,
    y_label: str,
    percent: bool = False,
    from_zero: bool = False,
    cut: float = 0.0,
) -> str:
    """Lines against images seen, as SVG; the first `cut` of the run may leave the top of the axis.

    A loss falls most in its first moments, which would flatten everything that follows.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(4.6, 3.1)
        for line in series:
            draw(axes, line)
        axes.set_xlabel("images seen")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        if cut > 0:
            later = [y for s in series for x, y in zip(s.x, s.y, strict=True) if x >= cut * s.x[-1]]
            low, high = min(later), max(later)
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low) or None)
        axes.grid(axis="x", visible=False)
        legend(axes)
        return to_svg(figure, f"{y_label} against images seen")


@dataclass(frozen=True)
class Trace:
    """Points with intervals in both directions.

    Attributes:
        x, y: values.
        marker: of each point; "" for a line alone.
        x_ends, y_ends: (low, high) of each point, or None; empty where there are none.
        notes: what is written beside each point.
        joined: whether a line goes through the points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str = "o"
    x_ends: Sequence[tuple[float, float] | None] = ()
    y_ends: Sequence[tuple[float, float] | None] = ()
    notes: Sequence[str] = ()
    joined: bool = True


def scatter(
    traces: Sequence[Trace],
    *,
    x_label: str,
    y_label: str,
    x_share: bool = False,
    y_share: bool = False,
    whole: bool = False,
    x_ticks: Sequence[float] = (),
) -> str:
    """Traces with whiskers, as SVG; an axis of a share is in percent, `whole` shows all of it.

    `x_ticks` are the values that were measured at: a few of them are written there themselves.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(4.6, 3.4)
        for trace in traces:
            _trace(axes, trace)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        for axis, share in ((axes.xaxis, x_share), (axes.yaxis, y_share)):
            axis.set_major_locator(MaxNLocator(5, steps=STEPS))
            if share:
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        if _far_apart(x_ticks):
            axes.set_xticks(x_ticks, [thousands(value) for value in x_ticks])
        axes.margins(0.08)
        if whole:
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        legend(axes)
        return to_svg(figure, f"{y_label} against {x_label}")


def _far_apart(values: Sequence[float]) -> bool:
    """Whether all can be written along an axis without touching."""
    if not 2 <= len(values) <= TICKS:
        return False
    ordered = sorted(values)
    gaps = [right - left for left, right in pairwise(ordered)]
    return min(gaps) >= (ordered[-1] - ordered[0]) / (2 * TICKS)


def _trace(axes: Axes, trace: Trace) -> None:
    colour = trace.colour
    axes.plot(
        trace.x, trace.y, color=colour, marker=trace.marker, markersize=6, linewidth=1.6,
        linestyle="-" if trace.joined else "none", label=trace.label or None,
    )  # fmt: skip
    for y, ends in zip(trace.y, trace.x_ends, strict=False):
        if ends is not None:
            axes.plot(ends, (y, y), color=colour, linewidth=1.2, alpha=0.55)
    for x, ends in zip(trace.x, trace.y_ends, strict=False):
        if ends is not None:
            axes.plot((x, x), ends, color=colour, linewidth=1.2, alpha=0.55)
    for x, y, note in zip(trace.x, trace.y, trace.notes, strict=False):
        axes.annotate(
            note, (x, y), (6, 6), textcoords="offset points", color=MUTED, fontsize=9.5
        )  # fmt: skip


@dataclass(frozen=True)
class Dot:
    """A value with its interval; `number` says whose it is: its colour, its marker."""

    value: float
    ends: tuple[float, float] | None = None
    number: int = 0


def dots(
    rows: Sequence[tuple[str, Sequence[Dot]]],
    *,
    x_label: str,
    share: bool = False,
    names: Sequence[str] = (),
) -> str:
    """Rows of values with whiskers, one below the other, as SVG; shares on an axis of percent.

    Args:
        rows: (label, dots), the dots of a row one below the other.
        names: of the dots' numbers, for the legend.
    """
    most = max(len(each) for _, each in rows)
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(4.6, 0.8 + (0.22 + 0.12 * most) * len(rows) + 0.2 * bool(names))
        for place, (_, row) in enumerate(rows):
            for at, dot in enumerate(row):
                y = len(rows) - 1 - place + 0.2 * ((len(row) - 1) / 2 - at)
                colour, marker = (
                    COLOURS[dot.number % len(COLOURS)],
                    MARKERS[dot.number % len(MARKERS)],
                )
                if dot.ends is not None:
                    axes.plot(dot.ends, (y, y), color=colour, linewidth=1.6)
                axes.plot([dot.value], [y], marker, color=colour, markersize=6.5)
        for number, name in enumerate(names):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.plot([], [], marker, color=colour, label=name)
        axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)])
        axes.tick_params(axis="y", colors=INK, length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.xaxis.set_major_locator(
            MultipleLocator(0.25) if share else MaxNLocator(5, steps=STEPS)
        )
        if share:
            axes.set_xlim(-0.015, 1.015)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.set_xlabel(x_label)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        legend(axes)
        return to_svg(figure, x_label)


def histogram(values: Sequence[float], *, x_label: str, y_label: str) -> str:
    """How often values fall between edges, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(4.6, 3.1)
        axes.hist(values, bins=_bins(values), color=ALIGNED)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
        axes.grid(axis="x", visible=False)
        return to_svg(figure, f"{y_label} by {x_label}")


def _bins(values: Sequence[float]) -> int | list[float]:
    """How many bars, or their edges: small whole numbers, which count something, get one each."""
    low, high = min(values), max(values)
    if all(float(value).is_integer() for value in values) and high - low < MOST_BARS:
        return [number - 0.5 for number in range(int(low), int(high) + 2)]
    return min(MOST_BARS, max(5, int(len(values) ** 0.5)))


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches and its axes, for `to_svg`; to be drawn on under STYLE."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def draw(axes: Axes, line: Series) -> None:
    alpha = 0.35 if line.faint else line.alpha
    axes.plot(
        line.x,
        line.y,
        color=line.colour,
        linestyle=(0, (4, 2)) if line.dashed else "-",
        linewidth=1.2 if line.faint else 2.0,
        marker=line.marker or None,
        markersize=5,
        alpha=alpha,
        label=line.label or None,
    )
    if line.low and not line.faint:
        axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.16, linewidth=0)


def legend(axes: Axes) -> None:
    """Above the axes, from their left end; takes height but never narrows the axes."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = max(1, min(len(labels), LETTERS // (max(map(len, labels)) + 5)))
        lines = -(-len(labels) // columns)
        axes.set_title("\n".join([" "] * lines), pad=8)
        legend = axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=10.5,
            handlelength=1.5,
            handletextpad=0.5,
            columnspacing=1.1,
            borderaxespad=0.2,
            borderpad=0.1,
        )
        legend.set_in_layout(False)


def thousands(value: float) -> str:
    """12000 -> '12k', for axes."""
    if abs(value) >= 1_000_000:
        return f"{value / 1_000_000:.3g}M"
    return f"{value / 1000:.3g}k" if abs(value) >= 1000 else f"{value:g}"


def to_svg(figure: Figure, title: str) -> str:
    """An inline SVG element that fills its container's width, colours as CSS variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # The page's font and no fixed size: the view box alone sets the proportions.
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # Several figures share a page: their ids must not.
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{own}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over at most `window` values, for noisy training losses."""
    half = max(window // 2, 0)
    return [
        math.fsum(values[max(i - half, 0) : i + half + 1])
        / len(values[max(i - half, 0) : i + half + 1])
        for i in range(len(values))
    ]


def column(
    lines: Sequence[Mapping[str, float]],
    name: str,
    *,
    only: Callable[[float], bool] = math.isfinite,
) -> tuple[list[float], list[float]]:
    """(images seen, value) of the log lines that have a finite field `name`."""
    found = [
        (line["images_seen"], line[name]) for line in lines if name in line and only(line[name])
    ]
    return [x for x, _ in found], [y for _, y in found]
