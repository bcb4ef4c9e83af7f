"""An audit as one self-contained HTML page, with its pictures and numbers beside it."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from arra.doctor.audit import Seen
from arra.doctor.audit_report import bin_name, facts_of
from arra.doctor.findings import Audit, Check
from arra.doctor.picture import pair_cell, sample_cell
from arra.doctor.values import grid_histogram
from arra.files import atomic_write, write_json
from arra.pages.frame import escape, figure, section, write_page
from arra.pages.plots import ALIGNED, STYLE, blank, thousands, to_svg
from arra.pages.sheet import Cell, cell_html, sheet

LOOK = """<style>
.status { font: 600 .78rem/1.5 var(--sans); white-space: nowrap; }
.checks { width: 100%; } .checks td, .checks th { text-align: left; white-space: normal;
  padding: .5rem 1rem .5rem 0; position: static; background: none; }
.checks th { white-space: nowrap; font-weight: 600; }
.checks .ok { color: var(--third); } .checks .warning { color: var(--plain); }
.checks .damage { color: var(--plain); font-weight: 600; }
.checks .status.damage { color: var(--paper); background: var(--plain); border-radius: .25rem;
  padding: .1rem .45rem; } .checks .not { color: var(--muted); }
.checks ul { margin: .35rem 0 0; padding-left: 1.1rem; } .checks li { margin: .2rem 0;
  overflow-wrap: anywhere; } .checks li.note { color: var(--muted); }
</style>"""


def write_report(out: Path, audit: Audit, seen: Seen) -> Path:
    """Writes report.html, audit.json and the contact sheets, and returns the page."""
    samples = [sample_cell(each) for each in seen.samples]
    pairs = {name: [pair_cell(*pair) for pair in each] for name, each in seen.pairs.items()}
    sheets = {"samples.png": samples} | {f"near-{n}.png": cells for n, cells in pairs.items()}
    for name, cells in sheets.items():
        if not all(cell.is_empty for cell in cells):
            with atomic_write(out / name) as temporary:
                sheet(cells).save(temporary, "PNG", optimize=True)
    write_json(out / "audit.json", audit.to_json())
    body = [
        LOOK,
        head(audit),
        checks_table(audit.checks),
        _section("Samples", _samples_note(audit.checks), samples),
        *(
            _section(f"Closest pairs by {name}", _pairs_note(audit.checks, name), cells)
            for name, cells in pairs.items()
        ),
        _plots(audit.checks),
    ]
    return write_page(out / "report.html", f"Audit of {audit.folder.name}", body)


def head(audit: Audit) -> str:
    """The verdict, and what was looked at."""
    verdict = audit.verdict.removeprefix("verdict: ")
    return (
        f'<header><p class="eyebrow">arra doctor</p><h1>{escape(verdict[:1].upper())}'
        f'{escape(verdict[1:])}</h1><p class="lead">{escape(audit.title)}</p></header>'
    )


def checks_table(checks: Sequence[Check], damage: str = "damage") -> str:
    """The checks with their findings; `damage` is what the worst level is called."""
    rows = []
    for check in checks:
        items = "".join(
            f'<li class="{escape(finding.level.split()[0])}">{escape(finding.line())}</li>'
            for finding in check.findings
        )
        status = damage if check.status == "damage" else check.status
        rows.append(
            f'<tr><td><span class="status {escape(check.status.split()[0])}">'
            f"{escape(status)}</span></td><th>{escape(check.name)}</th>"
            f"<td>{escape(check.summary)}{f'<ul>{items}</ul>' if items else ''}</td></tr>"
        )
    body = f'<table class="checks"><tbody>{"".join(rows)}</tbody></table>'
    return section("Checks", f'<div class="scroll">{body}</div>')


def _samples_note(checks: Sequence[Check]) -> str:
    check = next((c for c in checks if c.name == "samples"), None)
    return "" if check is None else f"{check.summary}. Left the original as the models saw it."


def _pairs_note(checks: Sequence[Check], name: str) -> str:
    check = next((c for c in checks if c.name == f"near {name}"), None)
    return "" if check is None else f"{check.summary}. Cosines of features minus their mean."


def _section(title: str, note: str, cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    shown = "\n".join(map(cell_html, cells))
    return section(
        title,
        f'<p class="note">{escape(note)}</p>',
        f'<div class="pairs with-real">{shown}</div>',
    )


# ---- plots ---------------------------------------------------------------------------------------


def _plots(checks: Sequence[Check]) -> str:
    drawn = []
    captions = facts_of(checks, "captions").get("all")
    if isinstance(captions, dict):
        names = [bin_name(a, b) for a, b in itertools.pairwise(captions["edges"])]
        drawn.append((_bars(names, captions["counts"], "characters", "rows"), "Captions"))
    codes = facts_of(checks, "codes")
    grids = codes.get("grids")
    if isinstance(grids, dict):
        rows = grid_histogram(grids)
        names, counts = [name for name, _ in rows], [count for _, count in rows]
        drawn.append((_bars(names, counts, "code rows x columns", "rows"), "Grids"))
        drawn.append((_codebook(codes), "How often each code is used, by rank"))
    for check in checks:
        if "norms" in check.facts:
            norms = check.facts["norms"]
            svg = _steps(norms["edges"], norms["counts"], "length of the feature")
            drawn.append((svg, f"Lengths of {check.name}"))
    if not drawn:
        return ""
    figures = "\n".join(figure(svg, caption) for svg, caption in drawn)
    return section("Distributions", f'<div class="plots">{figures}</div>')


def _bars(names: Sequence[str], counts: Sequence[int], x_label: str, y_label: str) -> str:
    with matplotlib.rc_context(STYLE):
        made, axes = blank(4.6, 3.1)
        axes.bar(range(len(names)), counts, color=ALIGNED, width=0.86 if len(names) > 1 else 0.3)
        if len(names) == 1:
            axes.set_xlim(-1, 1)
        turned = max(len(name) for name in names) > 5 and len(names) > 5
        axes.set_xticks(range(len(names)), names, rotation=40 if turned else 0,
                        ha="right" if turned else "center", fontsize=9)  # fmt: skip
        _finish(axes, x_label, y_label)
        return to_svg(made, f"{y_label} by {x_label}")


def _steps(edges: Sequence[float], counts: Sequence[int], x_label: str) -> str:
    with matplotlib.rc_context(STYLE):
        made, axes = blank(4.6, 3.1)
        axes.stairs(counts, edges, color=ALIGNED, fill=True)
        _finish(axes, x_label, "rows")
        return to_svg(made, f"rows by {x_label}")


def _codebook(codes: Mapping[str, Any]) -> str:
    points = [(rank, share) for rank, share in codes["uses_sorted"] if share > 0]
    with matplotlib.rc_context(STYLE):
        made, axes = blank(4.6, 3.1)
        axes.loglog([rank for rank, _ in points], [share for _, share in points], color=ALIGNED)
        axes.set_xlim(0.9, codes["codebook_size"] * 1.1)
        axes.set_xlabel(f"rank of the code, of {codes['codebook_size']:,}")
        axes.set_ylabel("share of all codes")
        return to_svg(made, "share of all codes by rank")


def _finish(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_formatter(lambda value, _: thousands(value))
    axes.grid(axis="x", visible=False)
