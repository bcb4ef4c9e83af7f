"""A report as one self-contained HTML page.

Legend: N pictures.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from arra.evaluate.directions import better
from arra.evaluate.facts import protocol, summary, title
from arra.evaluate.gallery import Gallery
from arra.evaluate.markdown import counted, number
from arra.evaluate.meanings import meaning
from arra.pages.frame import escape, facts, figure, section, table
from arra.pages.plots import COLOURS, MARKERS, Dot, Trace, dots, histogram, scatter
from arra.pages.sheet import cell_html

Report = Mapping[str, Any]
CARDS = 8
NO_CARD = ("density", "coverage")
"""They go with precision and recall, and are in the table."""
OPEN = 2
"""Scores whose best and worst pictures are shown at once; the others unfold, and so do parts of a
score."""


def page(
    report: Report, scores: Mapping[str, np.ndarray], galleries: Sequence[Gallery]
) -> tuple[str, list[str]]:
    """The title, and the parts of the page's body."""
    return title(report), [
        _header(report),
        warnings(report["warnings"]),
        _cards(report),
        _values(report),
        _plots(report, scores),
        _pictures(galleries),
        _by_seed(report),
        _protocol(report),
    ]


def warnings(texts: Sequence[str]) -> str:
    """What a reader must know before the values."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<div class="warnings" role="note"><ul>{items}</ul></div>' if texts else ""


def rounded(value: float | None) -> str:
    """Four significant digits; the JSON and the Markdown have more."""
    return "null" if value is None else f"{value:.4g}".replace("-", "−")


def direction(key: str) -> str:
    """`lower is better`, where it is known."""
    side = better(key)
    return f"{side} is better" if side else ""


def _header(report: Report) -> str:
    return (
        f'<header><p class="eyebrow">arra evaluate</p><h1>{escape(title(report))}</h1>'
        f'<p class="lead">{escape(summary(report))}</p></header>'
    )


def _name(key: str) -> str:
    """A measure's key as HTML that breaks before its extractor rather than in a word."""
    return escape(key).replace("@", "<wbr>@")


def _cards(report: Report) -> str:
    """The first values, a card each."""
    found = [key for key, value in report["metrics"].items() if value is not None]
    first: dict[str, str] = {}
    for key in found:
        measure = key.split("@")[0]
        if "/" not in measure and measure not in NO_CARD:
            first.setdefault(measure, key)
    cards = []
    for key in list(first.values())[:CARDS]:
        interval = report["intervals"].get(key)
        between = f"{rounded(interval['low'])} to {rounded(interval['high'])}" if interval else ""
        said = "".join(f"<p>{escape(text)}</p>" for text in (between, direction(key)) if text)
        cards.append(
            f'<div class="card"><h3>{_name(key)}</h3>'
            f'<p class="value">{escape(rounded(report["metrics"][key]))}</p>{said}</div>'
        )
    return f'<div class="cards small">{"".join(cards)}</div>' if cards else ""


def _values(report: Report) -> str:
    rows = [_value_row(report, key) for key in report["metrics"]]
    heads = ("measure", "value", "95 % interval", "n", "better")
    about = (
        '<p class="note">n: real / generated pictures, of MS-SSIM pairs. Measures without a value '
        "say why.</p>"
    )
    methods: dict[str, list[str]] = {}
    for key, interval in report["intervals"].items():
        methods.setdefault(interval["method"], []).append(key)
    how = facts((method, ", ".join(keys)) for method, keys in methods.items())
    summary_ = "<summary>How the intervals were made</summary>"
    unfolds = f'<details class="more">{summary_}{how}</details>' if methods else ""
    return section("Values", about, table(heads, rows, kind="prose"), unfolds)


def _value_row(report: Report, key: str) -> str:
    value, interval = report["metrics"][key], report["intervals"].get(key)
    between = "–"
    if interval is not None:
        between = f"{rounded(interval['low'])} to {rounded(interval['high'])}"
    said = "".join(
        f"<small>{escape(text)}</small>"
        for text in (meaning(key).text, report["reasons"].get(key))
        if text
    )
    cells = {"interval": between, "n": counted(report["counts"].get(key)), "better": better(key)}
    return (
        f'<tr><th>{escape(key)}{said}</th><td title="{escape(number(value))}">'
        f"{escape(rounded(value))}</td>"
        + "".join(
            f'<td data-head="{head}">{escape(cell or "")}</td>' for head, cell in cells.items()
        )
        + "</tr>"
    )


# ---- plots ---------------------------------------------------------------------------------------


def _plots(report: Report, scores: Mapping[str, np.ndarray]) -> str:
    drawn = [*_shares(report), *_precision_recall(report), *_extrapolated(report)]
    drawn += _spread(report, scores)
    figures = "".join(figure(svg, caption) for svg, caption in drawn)
    return section("Plots", f'<div class="plots">{figures}</div>' if drawn else "")


def _ends(report: Report, key: str) -> tuple[float, float] | None:
    interval = report["intervals"].get(key)
    return None if interval is None else (interval["low"], interval["high"])


def _shares(report: Report) -> Iterator[tuple[str, str]]:
    rows = [
        (key, [Dot(value, _ends(report, key))])
        for key, value in report["metrics"].items()
        if value is not None and meaning(key).share
    ]
    if len(rows) > 1:
        yield share_plot(rows)


def share_plot(
    rows: Sequence[tuple[str, Sequence[Dot]]], names: Sequence[str] = ()
) -> tuple[str, str]:
    """(SVG, caption) of measures, by key, that are shares of the pictures."""
    sides = {better(key) for key, _ in rows}
    how = "higher is better"
    if sides != {"higher"}:
        how = "better where the arrow points"
        arrows = {"higher": " ↑", "lower": " ↓", None: ""}
        rows = [(f"{key}{arrows[better(key)]}", found) for key, found in rows]
    svg = dots(rows, x_label="share of the pictures", share=True, names=names)
    return svg, f"Everything that is a share of the pictures, with 95 % intervals; {how}."


def _precision_recall(report: Report) -> Iterator[tuple[str, str]]:
    values: Mapping[str, float | None] = report["metrics"]
    traces: list[Trace] = []
    for key in values:
        measure, _, name = key.partition("@")
        other = f"recall@{name}"
        precision, recall = values[key], values.get(other)
        if measure != "precision" or precision is None or recall is None:
            continue
        at = len(traces)
        traces.append(
            Trace(
                name,
                [recall],
                [precision],
                COLOURS[at % len(COLOURS)],
                MARKERS[at % len(MARKERS)],
                [_ends(report, other)],
                [_ends(report, key)],
            )
        )
    if traces:
        svg = scatter(
            traces,
            x_label="recall, higher is better",
            y_label="precision, higher is better",
            x_share=True,
            y_share=True,
            whole=True,
        )
        yield svg, "Precision against recall, with 95 % intervals, a point for each extractor."


def _extrapolated(report: Report) -> Iterator[tuple[str, str]]:
    """Fréchet distances against 1/N with the line that was read at 0."""
    for key, details in report["details"].items():
        if "curve" not in details or report["metrics"].get(key) is None:
            continue
        x, y = (list(column) for column in zip(*details["curve"], strict=True))
        end, value = max(x), report["metrics"][key]
        line = Trace("line", [0.0, end], [value, value + details["slope"] * end], COLOURS[1], "")
        svg = scatter(
            [Trace("subsets", x, y, COLOURS[0], joined=False), line],
            x_label="1 / generated pictures",
            y_label="Fréchet distance, lower is better",
        )
        yield svg, f"{key}: the line through the distances of subsets, read at 0: {rounded(value)}."


def _spread(report: Report, scores: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    for key, values_N in scores.items():
        answered = values_N[~np.isnan(values_N)]
        if len(np.unique(answered)) > 5:
            svg = histogram(answered.tolist(), x_label=key, y_label="pictures")
            # What is a measure too is explained in the table.
            about = "" if key in report["metrics"] else meaning(key).text
            yield svg, f"{key} of each picture{about and ': ' + about}."


# ---- pictures, seeds, protocol -------------------------------------------------------------------


def _pictures(galleries: Sequence[Gallery]) -> str:
    parts = [_gallery(each) for each in galleries if not each.score]
    keys = list(dict.fromkeys(each.score for each in galleries if each.score))
    shown = [key for key in keys if "/" not in key][:OPEN]
    for key in keys:
        inner = "".join(_gallery(each) for each in galleries if each.score == key)
        opened = " open" if key in shown else ""
        parts.append(
            f'<details class="more"{opened}><summary>By {escape(key)}</summary>{inner}</details>'
        )
    return section("Pictures", *parts)


def _gallery(shown: Gallery) -> str:
    kind = "shots" if len(shown.cells[0].pictures) == 1 else "pairs"
    cells = "".join(map(cell_html, shown.cells))
    return (
        f'<h3>{escape(shown.heading)}</h3><p class="note">{escape(shown.note)}</p>'
        f'<div class="{kind}">{cells}</div>'
    )


def _by_seed(report: Report) -> str:
    by_seed = report.get("by_seed") or {}
    if not by_seed:
        return ""
    over = report.get("over_seeds") or {}
    rows = []
    for key in dict.fromkeys(key for values in by_seed.values() for key in values):
        found = over.get(key) or {}
        cells = {f"seed {seed}": rounded(values.get(key)) for seed, values in by_seed.items()}
        cells["mean"] = rounded(found.get("mean"))
        cells["95 % interval"] = "–"
        if found.get("low") is not None:
            cells["95 % interval"] = f"{rounded(found['low'])} to {rounded(found['high'])}"
        tds = (f'<td data-head="{escape(head)}">{text}</td>' for head, text in cells.items())
        small = f"<small>{escape(found['reason'])}</small>" if found.get("reason") else ""
        rows.append(f"<tr><th>{_name(key)}{small}</th>{''.join(tds)}</tr>")
    heads = ["measure", *(f"seed {escape(seed)}" for seed in by_seed), "mean", "95 % interval"]
    note = '<p class="note">The interval of the mean is Student\'s over seeds.</p>'
    return section("Seed by seed", note, table(heads, rows, kind="prose"))


def _protocol(report: Report) -> str:
    parts = [f"<h3>{escape(heading)}</h3>{facts(rows)}" for heading, rows in protocol(report)]
    return section("Protocol", *parts)
