"""A report as Markdown: warnings, values, protocol, and which picture files lie beside it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from arra.evaluate.directions import better
from arra.evaluate.facts import protocol, summary, title
from arra.evaluate.gallery import Gallery
from arra.evaluate.meanings import meaning
from arra.evaluate.table import markdown_table

Report = Mapping[str, Any]
HEADS = ("measure", "value", "95 % interval", "n", "better", "what it is, and how to read it")


def markdown(report: Report, galleries: Sequence[Gallery]) -> str:
    """The whole report; `galleries` are linked by their files."""
    parts = [f"# {cell(title(report))}", summary(report)]
    if report["warnings"]:
        parts.append("\n".join(f"> **Warning:** {line(text)}  " for text in report["warnings"]))
    parts.append(markdown_table(HEADS, [_row(report, key) for key in report["metrics"]]))
    parts += _by_seed(report)
    parts.append("## Protocol")
    for heading, facts in protocol(report):
        rows = [(cell(name), cell(value)) for name, value in facts]
        parts += [f"### {cell(heading)}", markdown_table(("", ""), rows)]
    if galleries:
        parts.append("## Pictures")
        parts.append(
            "\n".join(
                f"- [{cell(each.heading)}]({each.name}.png): {line(each.note)}"
                for each in galleries
            )
        )
    return "\n\n".join(parts) + "\n"


def number(value: float | None) -> str:
    """Six significant digits, as in the terminal."""
    return "null" if value is None else f"{value:.6g}"


def counted(counts: Sequence[int | None] | None) -> str:
    """Real and judged images of a measure."""
    known = [f"{count:,}" for count in counts or () if count is not None]
    return " / ".join(known)


def _row(report: Report, key: str) -> list[str]:
    interval = report["intervals"].get(key)
    between = "" if interval is None else f"{number(interval['low'])} to {number(interval['high'])}"
    said = [meaning(key).text]
    if interval is not None and interval.get("method"):
        said.append(f"interval: {interval['method']}")
    if key in report["reasons"]:
        said.append(report["reasons"][key])
    cells = (
        key,
        number(report["metrics"][key]),
        between,
        counted(report["counts"].get(key)),
        better(key) or "",
        "; ".join(filter(None, said)),
    )
    return [cell(text) for text in cells]


def _by_seed(report: Report) -> Iterator[str]:
    by_seed = report.get("by_seed") or {}
    if by_seed:
        keys = list(dict.fromkeys(key for values in by_seed.values() for key in values))
        rows = [
            [str(seed), *(number(values.get(key)) for key in keys)]
            for seed, values in by_seed.items()
        ]
        for said, part in (("mean", "mean"), ("95 % from", "low"), ("95 % to", "high")):
            over = report.get("over_seeds") or {}
            rows.append([said, *(number(over[key][part] if key in over else None) for key in keys)])
        yield "## Seed by seed"
        yield markdown_table(["seed", *map(cell, keys)], rows)


def line(text: object) -> str:
    """Text without line breaks."""
    return " ".join(str(text).split())


def cell(text: object) -> str:
    """Text as a cell of a Markdown table."""
    return line(text).replace("|", "\\|").replace("<", "&lt;")
