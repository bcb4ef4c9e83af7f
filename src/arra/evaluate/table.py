"""A Markdown table that also reads well in a terminal."""

from collections.abc import Sequence


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width, a line under the heads."""
    everything = [heads, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in everything
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def shown(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """`12.3 (11.9 to 12.8)`; a dash where there is no value."""
    if value is None:
        return "—"
    between = "" if low is None or high is None else f" ({low:.5g} to {high:.5g})"
    return f"{value:.5g}{between}"
