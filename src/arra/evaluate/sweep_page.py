"""A sweep over guidance as Markdown and as one self-contained HTML page.

Every model keeps its colour and its marker on the whole page. What sweep.json holds is told in
sweep_results.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from arra.evaluate.comparison_page import CLEAR, difference_cell
from arra.evaluate.facts import protocol
from arra.evaluate.gallery import cut, read_samples
from arra.evaluate.markdown import line
from arra.evaluate.meanings import meaning
from arra.evaluate.outputs import REPORT
from arra.evaluate.page import direction, rounded, warnings
from arra.evaluate.sweep_results import told
from arra.files import atomic_write, read_json
from arra.pages.frame import escape, facts, figure, image, section, table, write_page
from arra.pages.plots import COLOURS, MARKERS, Trace, scatter
from arra.pages.sheet import fitted

Found = Mapping[str, Any]
PROMPTS, AT_ONCE = 8, 4
"""Prompts whose pictures are shown, and how many of them without unfolding."""
SIDE = 192
"""Pixels of a picture's side on the page."""


def write_pages(out: Path, found: Found) -> None:
    """Writes sweep.md and sweep.html beside sweep.json."""
    with atomic_write(out / "sweep.md") as temporary:
        temporary.write_text(markdown(found), encoding="utf-8")
    write_page(out / "sweep.html", _title(found), page(out, found))


def markdown(found: Found) -> str:
    """What the terminal is told, under a heading."""
    folders = "\n".join(
        f"- {line(each['model'])}, guidance {each['cfg']:g}: [{each['folder']}]({each['folder']})"
        for each in found["reports"]
    )
    return f"# {_title(found)}\n\n{told(found)}\n\n## Reports\n\n{folders}\n"


def page(out: Path, found: Found) -> list[str]:
    """The parts of the page's body; pictures are read from the reports' folders in `out`."""
    return [
        f'<header><p class="eyebrow">arra evaluate sweep</p><h1>{escape(_title(found))}</h1>'
        f'<p class="lead">{escape(_summary(found))}</p></header>',
        warnings(found["warnings"]),
        _best(found, _first(out, found)["reasons"]),
        _figures("Against guidance", _against_guidance(found)),
        _figures("Precision against recall as guidance changes", _precision_recall(found)),
        _figures("Against training steps", _against_steps(found)),
        _pictures(out, found),
        _protocol(out, found),
    ]


def _names(found: Found) -> list[str]:
    return [each["name"] for each in found["models"]]


def _title(found: Found) -> str:
    return f"{', '.join(_names(found))}: over guidance"


def _summary(found: Found) -> str:
    scales = ", ".join(f"{cfg:g}" for cfg in found["cfg"])
    models = len(found["models"])
    return f"{models} {'models' if models > 1 else 'model'}, guidance {scales} (1 = off)."


def _keys(found: Found) -> list[str]:
    return list(dict.fromkeys(key for of in found["curves"].values() for key in of))


# ---- each model at its own best ------------------------------------------------------------------


def _first(out: Path, found: Found) -> Found:
    """The first model's first report; the others are of as many images and the same networks."""
    report: Found = read_json(out / found["reports"][0]["folder"] / REPORT)
    return report


def _best(found: Found, reasons: Mapping[str, str]) -> str:
    """`reasons` are cautions that hold for a measure of so many images."""
    names = _names(found)
    rows = []
    for key in _keys(found):
        known = {name: found["best"][name].get(key) for name in names}
        if not any(known.values()) and key not in reasons:
            continue  # neither side of it is better
        cells = [_best_cell(name, known[name]) for name in names]
        changes = found["differences"].get(key, {})
        cells += [difference_cell(changes.get(name), name, names[0]) for name in names[1:]]
        about = "; ".join(filter(None, (meaning(key).text, direction(key))))
        said = (f"<small>{escape(text)}</small>" for text in (about, reasons.get(key)) if text)
        rows.append(f"<tr><th>{escape(key)}{''.join(said)}</th>{''.join(cells)}</tr>")
    heads = ["measure", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    note = (
        f"Below each value its 95 % interval and the guidance that it is at. But "
        f"{found['best_chosen']}."
    )
    if len(names) > 1:
        note += (
            f" ▲ is better than {names[0]}, ▼ worse: the interval of the paired differences leaves "
            f"out 0 and p is below {CLEAR}."
        )
    return section(
        "Each model at its own best",
        f'<p class="note">{escape(note)}</p>',
        table(map(escape, heads), rows, kind="prose"),
    )


def _best_cell(name: str, best: Found | None) -> str:
    if best is None:
        return f'<td class="value" data-head="{escape(name)}">–</td>'
    between = ""
    if best["low"] is not None:
        between = f"<small>{rounded(best['low'])} to {rounded(best['high'])}</small>"
    return (
        f'<td class="value" data-head="{escape(name)}">{rounded(best["value"])}{between}'
        f"<small>guidance {best['cfg']:g}</small></td>"
    )


# ---- plots ---------------------------------------------------------------------------------------


def _figures(title: str, drawn: Iterator[tuple[str, str, str]]) -> str:
    """Plots in a section; those of parts of a measure unfold."""
    shown: list[str] = []
    folded: list[str] = []
    for key, svg, caption in drawn:
        (folded if "/" in key.split("@")[0] else shown).append(figure(svg, caption))
    inner = f'<div class="plots">{"".join(shown)}</div>' if shown else ""
    if folded:
        inner += (
            f'<details class="more"><summary>{len(folded)} more, of parts of a measure</summary>'
            f'<div class="plots">{"".join(folded)}</div></details>'
        )
    return section(title, inner)


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _label(key: str) -> str:
    """Of an axis; the caption has the whole key."""
    return ", ".join(filter(None, (key.split("@")[0], direction(key))))


def _against_guidance(found: Found) -> Iterator[tuple[str, str, str]]:
    names = _names(found)
    for key in _keys(found):
        traces = []
        for number, name in enumerate(names):
            points = found["curves"][name].get(key) or ()
            if points:
                colour, marker = _look(number)
                x, y = zip(*points, strict=True)
                ends = [None if each is None else tuple(each) for each in
                        found["intervals"][name][key]]  # fmt: skip
                label = name if len(names) > 1 else ""
                traces.append(Trace(label, x, y, colour, marker, y_ends=ends))
        if traces and len(found["cfg"]) > 1:
            svg = scatter(traces, x_label="guidance (1 = off)", y_label=_label(key),
                          y_share=meaning(key).share, x_ticks=found["cfg"])  # fmt: skip
            said = f": {meaning(key).text}" if meaning(key).text else ""
            yield key, svg, f"{key}{said}{_bars(traces)}."


def _bars(traces: Sequence[Trace]) -> str:
    """What the bars of a plot are, where there are any."""
    return "; bars are 95 % intervals" if any(any(each.y_ends) for each in traces) else ""


def _precision_recall(found: Found) -> Iterator[tuple[str, str, str]]:
    for key in _keys(found):
        measure, _, extractor = key.partition("@")
        if measure != "precision":
            continue
        traces = []
        for number, name in enumerate(_names(found)):
            colour, marker = _look(number)
            recall = dict(found["curves"][name].get(f"recall@{extractor}") or ())
            precision = dict(found["curves"][name].get(key) or ())
            both = [cfg for cfg in precision if cfg in recall]
            traces.append(
                Trace(
                    name if len(found["models"]) > 1 else "", [recall[cfg] for cfg in both],
                    [precision[cfg] for cfg in both], colour, marker,
                    notes=[f"{cfg:g}" for cfg in both],
                )
            )  # fmt: skip
        svg = scatter(
            [trace for trace in traces if trace.x],
            x_label="recall, higher is better", y_label="precision, higher is better",
            x_share=True, y_share=True,
        )  # fmt: skip
        yield key, svg, f"Under {extractor}; the numbers are guidance."


def _against_steps(found: Found) -> Iterator[tuple[str, str, str]]:
    runs = found["steps"]
    for key in dict.fromkeys(key for run in runs.values() for key in run["curves"]):
        traces = []
        for name, run in runs.items():
            if key in run["curves"]:
                colour, marker = _look(_names(found).index(name))
                x, y = zip(*run["curves"][key], strict=True)
                label = "" if len(runs) == 1 else f"the run of {name}"
                best = [found["best"][model].get(key) for model in run["models"]]
                ends = [
                    None if each["low"] is None else (each["low"], each["high"])
                    for each in best
                    if each is not None
                ]
                traces.append(Trace(label, x, y, colour, marker, y_ends=ends))
        svg = scatter(traces, x_label="training steps", y_label=_label(key),
                      y_share=meaning(key).share,
                      x_ticks=sorted({x for trace in traces for x in trace.x}))  # fmt: skip
        yield key, svg, f"{key} at the best guidance of each step{_bars(traces)}."


# ---- pictures ------------------------------------------------------------------------------------


def _pictures(out: Path, found: Found) -> str:
    """The same prompts and seeds by every model at every scale, the best ones framed."""
    folders = {(each["model"], each["cfg"]): out / each["folder"] for each in found["reports"]}
    samples = {at: read_samples(folder) for at, folder in folders.items()}
    names, first = _names(found), next(iter(samples.values()), {})
    prompts = [name for name in first if all(name in each for each in samples.values())][:PROMPTS]
    if not prompts:
        return ""
    key = next(iter(found["best"][names[0]]), None)
    films = [_film(found, samples, name, key) for name in prompts]
    unfolds = ""
    if films[AT_ONCE:]:
        more = "".join(films[AT_ONCE:])
        unfolds = (
            f'<details class="more"><summary>{len(films[AT_ONCE:])} more prompts</summary>'
            f'<div class="films">{more}</div></details>'
        )
    note = "Prompts drawn at random; each row is a model, each column a scale of guidance."
    if key is not None:
        note += f" Framed: where the model is best by {key}."
    return section(
        "The same prompts and seeds",
        f'<p class="note">{escape(note)}</p>',
        f'<div class="films">{"".join(films[:AT_ONCE])}</div>{unfolds}',
    )


def _film(
    found: Found,
    samples: Mapping[tuple[str, float], Mapping[str, tuple[str, Image.Image]]],
    prompt: str,
    key: str | None,
) -> str:
    cells = ['<span class="seen"></span>']
    cells += [f'<span class="seen">{cfg:g}</span>' for cfg in found["cfg"]]
    caption = ""
    for model in _names(found):
        cells.append(f'<span class="of">{escape(model)}</span>')
        best = found["best"][model].get(key) if key is not None else None
        for cfg in found["cfg"]:
            caption, picture = samples[model, cfg][prompt]
            shown = fitted(picture, SIDE) if max(picture.size) > SIDE else picture
            framed = ' class="best"' if best is not None and best["cfg"] == cfg else ""
            alt = f"{model}, guidance {cfg:g}: {caption}"
            cells.append(f"<div{framed}>{image(shown, alt)}</div>")
    style = f'style="--frames:{len(found["cfg"])};--label:5.2rem"'
    return figure(f'<div class="frames" {style}>{"".join(cells)}</div>', cut(caption), "film")


def _protocol(out: Path, found: Found) -> str:
    """The models, what was asked, and what the first report says of reference and networks."""
    models: list[tuple[str, object]] = []
    for each in found["models"]:
        steps = "" if each["steps"] is None else f", {each['steps']:,} training steps"
        models.append((each["name"], f"{each['model']}{steps}; weights {each['weights']}"))
    first = found["reports"][0]
    asked = [
        (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in first["asked"].items()
        if name not in ("model", "cfg")
    ]
    shared = {name: value for name, value in _first(out, found).items() if name != "generated"}
    parts: list[tuple[str, Sequence[tuple[str, object]]]] = [
        ("Models", models),
        ("Asked for", asked),
    ]
    parts += protocol(shared)
    note = "Each point is an evaluation with a report of its own, in the folder of its model."
    return section(
        "Protocol",
        f'<p class="note">{note}</p>',
        *(f"<h3>{escape(heading)}</h3>{facts(rows)}" for heading, rows in parts),
    )
