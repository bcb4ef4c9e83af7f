"""The figure that only a study has: both arms of every measure on one axis."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.ticker import FuncFormatter

from arra.pages.plots import ALIGNED, INK, PLAIN, RULE, STYLE, THIRD, blank, legend, to_svg

ARM_COLOURS = {"plain": PLAIN, "aligned": ALIGNED}
ARM_NAMES = {"plain": "plain", "aligned": "ARRA"}
ARM_MARKERS = {"plain": "s", "aligned": "o"}


@dataclass(frozen=True)
class Row:
    """One measure of `dumbbell`: (mean, low, high) of both arms."""

    label: str
    plain: tuple[float, float, float]
    aligned: tuple[float, float, float]
    ceiling: float | None = None


def dumbbell(rows: Sequence[Row], *, x_label: str) -> str:
    """Both arms of every measure on one axis of percent, with intervals, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(4.6, 0.9 + 0.42 * len(rows))
        for number, row in enumerate(rows):
            y = len(rows) - 1 - number
            axes.plot([row.plain[0], row.aligned[0]], [y, y], color=RULE, linewidth=3, zorder=1)
            for arm, offset, values in (("plain", -0.1, row.plain), ("aligned", 0.1, row.aligned)):
                mean, low, high = values
                label = ARM_NAMES[arm] if number == 0 else None
                axes.plot([low, high], [y - offset] * 2, color=ARM_COLOURS[arm], linewidth=1.4)
                axes.plot(
                    [mean],
                    [y - offset],
                    ARM_MARKERS[arm],
                    color=ARM_COLOURS[arm],
                    markersize=6.5,
                    label=label,
                    linestyle="none",
                )
            if row.ceiling is not None:
                label = "tokenizer's limit" if number == 0 else None
                axes.plot(
                    [row.ceiling], [y], "|", color=THIRD, markersize=13, markeredgewidth=2,
                    label=label, linestyle="none",
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
        axes.tick_params(axis="y", colors=INK, length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, 1.015)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.set_xlabel(x_label)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        legend(axes)
        return to_svg(figure, x_label)
