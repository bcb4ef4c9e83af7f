"""An audit as text for a terminal."""

import itertools
from collections.abc import Mapping, Sequence

from arra.doctor.findings import Audit, Check
from arra.doctor.values import grid_histogram

BAR = 32
"""Characters of the longest bar."""

LINES = 20
"""Findings of one check that are printed."""

_MARKS = {
    kind: {"damage": worst, "warning": "warning", "not checked": "not checked", "note": "note"}
    for kind, worst in (("dataset", "DAMAGE"), ("run", "WRONG"), ("model", "WRONG"))
}


def told(audit: Audit) -> str:
    """Each check with its findings, then the histograms, then the verdict."""
    width = max(len(check.name) for check in audit.checks)
    lines = [audit.title, ""]
    for check in audit.checks:
        status = _MARKS[audit.kind].get(check.status, "ok")
        lines.append(f"  {status:12}{check.name:{width}}  {check.summary}".rstrip())
        for finding in check.findings[:LINES]:
            mark = "" if finding.level in ("note", check.status) else f"{finding.level}: "
            lines.append(f"  {'':12}{'':{width}}  - {mark}{finding.line()}")
        if len(check.findings) > LINES:
            more = len(check.findings) - LINES
            lines.append(f"  {'':12}{'':{width}}  - and {more:,} more (--json or --out DIR)")
    for part in (_captions(audit.checks), _grids(audit.checks)):
        if part:
            lines += ["", *part]
    return "\n".join([*lines, "", audit.verdict])


def facts_of(checks: Sequence[Check], name: str) -> Mapping[str, object]:
    """The facts of a check, empty where it was not made."""
    return next((check.facts for check in checks if check.name == name), {})


def _captions(checks: Sequence[Check]) -> list[str]:
    histogram = facts_of(checks, "captions").get("all")
    if not isinstance(histogram, dict):
        return []
    edges, counts = histogram["edges"], histogram["counts"]
    names = [bin_name(a, b) for a, b in itertools.pairwise(edges)]
    return ["captions by characters", *_bars(list(zip(names, counts, strict=True)))]


def bin_name(low: int, after: int) -> str:
    """`20-39`, or `20` for a bin of one number."""
    return f"{low}" if after - low == 1 else f"{low}-{after - 1}"


def _grids(checks: Sequence[Check]) -> list[str]:
    grids = facts_of(checks, "codes").get("grids")
    if not isinstance(grids, dict):
        return []
    return ["grids of codes, rows x columns", *_bars(grid_histogram(grids))]


def _bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    most = max(count for _, count in rows)
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, count in rows:
        bar = "█" * max(round(BAR * count / most), 1 if count else 0)
        lines.append(f"  {name:>{width}}  {bar:{BAR}}  {count:>9,}")
    return lines
