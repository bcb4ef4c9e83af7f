"""A comparison of reports as Markdown and as one self-contained HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arra.evaluate.directions import better
from arra.evaluate.facts import protocol, short
from arra.evaluate.markdown import cell, line
from arra.evaluate.meanings import meaning
from arra.evaluate.outputs import COMPARISON, is_file
from arra.evaluate.page import direction, rounded, share_plot, warnings
from arra.evaluate.table import markdown_table, shown
from arra.files import atomic_dir, write_json
from arra.pages.frame import escape, facts, figure, section, table, write_page
from arra.pages.plots import COLOURS, MARKERS, Dot, Trace, dots, scatter

Found = Mapping[str, Any]
CLEAR = 0.05
"""p of a paired test below which a difference counts, where its interval leaves out 0 too."""
ENOUGH_SEEDS = 6
"""With fewer, no test over seeds can reach CLEAR: its p is at least 2 / 2^seeds."""
TESTS = {"over_seeds": "sampling seeds", "over_prompts": "prompts"}


def write_comparison(out: Path, found: Found) -> None:
    """Writes the JSON alone, where `out` ends in .json, or a folder with both pages as well."""
    if is_file(out):
        write_json(out, found)
        return
    with atomic_dir(out, replaces=True) as folder:
        write_json(folder / COMPARISON, found)
        (folder / "comparison.md").write_text(markdown(found), encoding="utf-8")
        write_page(folder / "comparison.html", _title(found), page(found))


def labels(names: Sequence[str]) -> list[str]:
    """Names of reports, as short as they can be told apart."""
    ends = [short(name.removesuffix("/").removesuffix("/report.json")) for name in names]
    return ends if len(set(ends)) == len(names) else list(names)


def test_of(change: Found | None) -> tuple[str, Found] | None:
    """(pairs of what, the paired test) of a difference; over seeds where there are enough."""
    tests = {test: said for test, said in TESTS.items() if test in (change or {})}
    if change is None or not tests:
        return None
    test = "over_seeds" if "over_seeds" in tests else "over_prompts"
    if len(tests) == 2 and change["over_seeds"]["seeds"] < ENOUGH_SEEDS:
        test = "over_prompts"
    return tests[test], change[test]


def verdict(change: Found | None) -> str:
    """better, worse, unclear; "" where nothing was tested, or no direction is known."""
    found = test_of(change)
    if change is None or found is None or change["better"] is None:
        return ""
    test = found[1]
    if test["low"] is None or test["low"] <= 0 <= test["high"] or test["p"] >= CLEAR:
        return "unclear"
    return "better" if (test["mean"] > 0) == (change["better"] == "higher") else "worse"


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(found: Found) -> str:
    """Warnings, then the table, then what was compared."""
    names = labels([each["name"] for each in found["reports"]])
    parts = [f"# {cell(_title(found))}"]
    if found["warnings"]:
        parts.append("\n".join(f"> **Warning:** {line(text)}  " for text in found["warnings"]))
    heads = ["measure", "better", *names]
    heads += [text for name in names[1:] for text in (f"{name} − {names[0]}", "paired test")]
    rows = []
    for key, values in found["metrics"].items():
        cells = [shown(each["value"], each["low"], each["high"]) for each in values]
        for change in found["differences"][key][1:]:
            cells += ["—" if change is None else f"{change['difference']:+.5g}", _tested(change)]
        rows.append([cell(text) for text in (key, better(key) or "", *cells)])
    parts.append(markdown_table([cell(head) for head in heads], rows))
    for name, each in zip(names, found["reports"], strict=True):
        for heading, rows_ in protocol({"generated": each["generated"]}):
            parts.append(f"## {cell(name)}: {heading.lower()}")
            parts.append(markdown_table(("", ""), [(cell(a), cell(b)) for a, b in rows_]))
    return "\n\n".join(parts) + "\n"


def _tested(change: Found | None) -> str:
    found = test_of(change)
    if found is None:
        return ""
    said, test = found
    count = test["seeds" if said == TESTS["over_seeds"] else "n"]
    ends = "" if test["low"] is None else f"{test['low']:+.4g} to {test['high']:+.4g}, "
    return f"{ends}p = {test['p']:.3g}, {count:,} {said}"


# ---- HTML ----------------------------------------------------------------------------------------


def page(found: Found) -> list[str]:
    """The parts of the page's body."""
    names = labels([each["name"] for each in found["reports"]])
    described = [
        f"<h3>{escape(name)}: {escape(heading.lower())}</h3>{facts(rows)}"
        for name, each in zip(names, found["reports"], strict=True)
        for heading, rows in protocol({"generated": each["generated"]})
    ]
    return [
        f'<header><p class="eyebrow">arra evaluate compare</p><h1>{escape(_title(found))}</h1>'
        f"</header>",
        warnings(found["warnings"]),
        _values(found, names),
        section("Plots", _plots(found, names)),
        section("What was compared", *described),
    ]


def _title(found: Found) -> str:
    first, *others = labels([each["name"] for each in found["reports"]])
    return f"{', '.join(others)} beside {first}"


def _values(found: Found, names: Sequence[str]) -> str:
    rows = [_row(found, key, names) for key in found["metrics"]]
    heads = ["measure", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    note = (
        f"95 % intervals below the values. ▲ is better than {names[0]}, ▼ worse: the interval of "
        f"the paired differences leaves out 0 and p is below {CLEAR}; without a sign it is not "
        f"clear, or there was nothing to pair."
    )
    return section("Values", f'<p class="note">{escape(note)}</p>',
                   table(map(escape, heads), rows, kind="prose"))  # fmt: skip


def _row(found: Found, key: str, names: Sequence[str]) -> str:
    cells = []
    for name, each in zip(names, found["metrics"][key], strict=True):
        small = f'<small class="why">{escape(each["reason"])}</small>' if each["reason"] else ""
        if each["low"] is not None:
            small = f"<small>{rounded(each['low'])} to {rounded(each['high'])}</small>"
        # Without a value and a reason it was not asked for.
        value = "–" if each["value"] is None and not small else rounded(each["value"])
        cells.append(f'<td class="value" data-head="{escape(name)}">{value}{small}</td>')
    for name, change in zip(names[1:], found["differences"][key][1:], strict=True):
        cells.append(difference_cell(change, name, names[0]))
    about = "; ".join(filter(None, (meaning(key).text, direction(key))))
    small = f"<small>{escape(about)}</small>" if about else ""
    return f"<tr><th>{escape(key)}{small}</th>{''.join(cells)}</tr>"


def difference_cell(change: Found | None, name: str, first: str) -> str:
    """A difference with its paired test, as a cell of a table."""
    outcome = verdict(change)
    sign = {"better": " ▲", "worse": " ▼"}.get(outcome, "")
    value = "–" if change is None else f"{change['difference']:+.4g}".replace("-", "−")
    tested = _tested(change).replace("-", "−").partition(", p = ")
    lines = (tested[0], f"p = {tested[2]}" if tested[2] else "")
    small = "".join(f"<small>{escape(text)}</small>" for text in lines if text)
    return (
        f'<td class="{outcome or "unclear"}" data-head="{escape(name)} − {escape(first)}">'
        f"{escape(value)}{sign}{small}</td>"
    )


def _plots(found: Found, names: Sequence[str]) -> str:
    drawn = [*_shares(found, names), *_precision_recall(found, names), *_panels(found, names)]
    figures = "".join(figure(svg, caption) for svg, caption in drawn)
    return f'<div class="plots">{figures}</div>' if drawn else ""


def _dots(values: Sequence[Found]) -> list[Dot]:
    return [
        Dot(each["value"], None if each["low"] is None else (each["low"], each["high"]), number)
        for number, each in enumerate(values)
        if each["value"] is not None
    ]


def _shares(found: Found, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    rows = [
        (key, _dots(values))
        for key, values in found["metrics"].items()
        if meaning(key).share and len(_dots(values)) > 1
    ]
    if rows:
        yield share_plot(rows, names)


def _precision_recall(found: Found, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for key in found["metrics"]:
        measure, _, extractor = key.partition("@")
        recalls = found["metrics"].get(f"recall@{extractor}")
        if measure != "precision" or recalls is None:
            continue
        traces = []
        for number, (name, x, y) in enumerate(
            zip(names, recalls, found["metrics"][key], strict=True)
        ):
            if x["value"] is not None and y["value"] is not None:
                x_ends, y_ends = ((end["low"], end["high"]) for end in (x, y))
                traces.append(
                    Trace(
                        name, [x["value"]], [y["value"]], COLOURS[number % len(COLOURS)],
                        MARKERS[number % len(MARKERS)],
                        [x_ends if x_ends[0] is not None else None],
                        [y_ends if y_ends[0] is not None else None],
                    )
                )  # fmt: skip
        if len(traces) > 1:
            svg = scatter(
                traces, x_label="recall, higher is better", y_label="precision, higher is better",
                x_share=True, y_share=True, whole=True,
            )  # fmt: skip
            yield svg, f"Precision against recall under {extractor}, with 95 % intervals."


def _panels(found: Found, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """A plot for each measure that is no share and that several have, one below the other."""
    for key, values in found["metrics"].items():
        known = _dots(values)
        if len(known) > 1 and not meaning(key).share:
            rows = [(names[dot.number], [dot]) for dot in known]
            label = ", ".join(filter(None, (key, direction(key))))
            yield dots(rows, x_label=label), f"{key}: {meaning(key).text}."
