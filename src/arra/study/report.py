"""The report of a study: one HTML file that needs nothing else, from results.json and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from arra.pages.frame import escape, facts, figure, image, row, section, table, write_page
from arra.pages.plots import thousands
from arra.study import figures
from arra.study.prose import (
    alignment_sentence,
    depth_paragraph,
    result_paragraph,
    told_difference,
)
from arra.study.results import ARMS, CLEAR, metric, show, show_difference, verdict

FIRST_PAIRS = 12  # shown at once; the rest unfold
ARM_LABELS = {"plain": "plain", "aligned": "ARRA"}
KEYS = {
    "plain": '<span class="plain">■ plain</span>',
    "aligned": '<span class="aligned">● ARRA</span>',
}


@dataclass(frozen=True)
class Sample:
    """One prompt painted by both arms from the same seed; notes say what a judge found wrong."""

    prompt: str
    plain: Image.Image
    aligned: Image.Image
    reference: Image.Image | None = None
    plain_note: str = ""
    aligned_note: str = ""


@dataclass(frozen=True)
class Film:
    """One prompt painted from the same seed as training went on."""

    prompt: str
    images_seen: tuple[int, ...]
    plain: tuple[Image.Image, ...]
    aligned: tuple[Image.Image, ...]


def write_report(
    path: Path, results: Mapping[str, Any], samples: Sequence[Sample], films: Sequence[Film] = ()
) -> Path:
    """Writes the page; `results` has the schema of results.py."""
    body = [
        _header(results),
        _samples(results, samples),
        _films(films),
        _curves(results),
        _table(results),
        _seeds(results),
        _depth(results),
        _run(results),
    ]
    return write_page(path, results["title"], body)


def _header(results: Mapping[str, Any]) -> str:
    pair = results["pairs"][0]
    group = next(iter(pair["differences"]))
    names = [n for n in ("all_right", "colour", "fragments") if n in pair["differences"][group]]
    distance = next((n for n in pair["differences"][group] if n.startswith("fd@")), None)
    names = [*names, *([distance] if distance else [])] or list(pair["differences"][group])
    cards = "".join(_card(pair, group, name) for name in names[:4])
    return (
        f'<header><p class="eyebrow">ARRA · a pair of training runs</p>'
        f"<h1>{escape(results['title'])}</h1>"
        f'<p class="lead">{escape(result_paragraph(results))}</p></header>'
        f'<div class="cards">{cards}</div>'
    )


def _card(pair: Mapping[str, Any], group: str, name: str) -> str:
    measure = metric(name)
    values = "".join(
        f'<dt class="{arm}">{KEYS[arm]}</dt>'
        f"<dd>{escape(show(measure, pair['arms'][arm]['metrics'][group][name]['mean']))}</dd>"
        for arm in ARMS
    )
    difference = pair["differences"][group][name]
    like = pair["arms"]["plain"]["metrics"][group][name]["mean"]
    change = f"difference {told_difference(measure, difference, like)}"
    if difference["low"] is not None:
        change += f": {_plainly(name, difference)}"
    return (
        f'<div class="card"><h3>{escape(measure.label)}, {measure.better} is better</h3>'
        f"<dl>{values}</dl><p>{escape(change)}</p></div>"
    )


def _plainly(name: str, difference: Mapping[str, Any]) -> str:
    return {
        "better": "ARRA is better",
        "worse": "ARRA is worse",
        "unclear": "no clear difference",
    }[verdict(metric(name), dict(difference))]


def _legend(reference: bool = False) -> str:
    third = '<span style="color:var(--third)">▬ real image, as the codes keep it</span>'
    return f'<div class="legend">{"".join(KEYS.values())}{third if reference else ""}</div>'


def _samples(results: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    guidance = {arm: results["pairs"][0]["arms"][arm]["guidance"] for arm in ARMS}
    real = any(sample.reference for sample in samples)
    kind = "pairs with-real" if real else "pairs"
    shown, rest = samples[:FIRST_PAIRS], samples[FIRST_PAIRS:]
    more = ""
    if rest:
        more = (
            f'<details class="more"><summary>{len(rest)} more pairs</summary>'
            f'<div class="{kind}">{"".join(map(_pair, rest))}</div></details>'
        )
    order = (
        "the real image as its codes keep it, the plain arm, ARRA"
        if real
        else "left the plain arm, right ARRA"
    )
    chosen = (
        f"Guidance {guidance['plain']:g} and {guidance['aligned']:g}, each arm's best on prompts "
        f"that are not shown here."
        if results["guidance_chosen"]
        else f"Guidance {guidance['plain']:g}."
    )
    return section(
        "What they paint",
        f"<p>The first {len(samples)} prompts of the list, not a "
        f"choice: {order}, painted from the same seed. {chosen}</p>{_legend(real)}",
        f'<div class="{kind}">{"".join(map(_pair, shown))}</div>{more}',
    )


def _pair(sample: Sample) -> str:
    cells = []
    if sample.reference is not None:
        cells.append(f"<div>{image(sample.reference, 'real: ' + sample.prompt)}</div>")
    pictures = ((sample.plain, sample.plain_note), (sample.aligned, sample.aligned_note))
    for arm, (picture, note) in zip(ARMS, pictures, strict=True):
        marks = f'<span class="marks">{escape(note)}</span>' if note else ""
        alt = f"{ARM_LABELS[arm]}: {sample.prompt}"
        cells.append(f'<div class="of-{arm}">{image(picture, alt)}{marks}</div>')
    return figure(f'<div class="images">{"".join(cells)}</div>', sample.prompt, "pair")


def _films(films: Sequence[Film]) -> str:
    if not films:
        return ""
    parts = []
    for film in films:
        cells = ['<span class="seen">seen</span>']
        cells += [f'<span class="seen">{thousands(seen)}</span>' for seen in film.images_seen]
        for arm, pictures in (("plain", film.plain), ("aligned", film.aligned)):
            cells.append(KEYS[arm])
            cells += [
                image(picture, f"{ARM_LABELS[arm]} after {seen} images: {film.prompt}")
                for picture, seen in zip(pictures, film.images_seen, strict=True)
            ]
        style = f'style="--frames:{len(film.images_seen)}"'
        parts.append(
            figure(f'<div class="frames" {style}>{"".join(cells)}</div>', film.prompt, "film")
        )
    return section(
        "How the pictures form",
        "<p>The same prompt and seed, as training goes on. The numbers are images seen.</p>",
        f'<div class="films">{"".join(parts)}</div>',
    )


def _curves(results: Mapping[str, Any]) -> str:
    panels = "".join(figure(svg, caption) for svg, caption in figures.panels(results))
    sentence = alignment_sentence(results)
    return section(
        "How they got there",
        f"<p>{escape(sentence or 'Both arms on the same axes.')}</p>",
        f'<div class="plots">{panels}</div>',
    )


def _table(results: Mapping[str, Any]) -> str:
    pair, ceiling = results["pairs"][0], results.get("ceiling") or {}
    rows = []
    for group, differences in pair["differences"].items():
        heading = results["groups"].get(group, group)
        rows.append(f'<tr class="group"><th colspan="6">{escape(heading)}</th></tr>')
        for name, difference in differences.items():
            rows.append(_table_row(pair, group, name, difference, ceiling.get(group, {})))
    heads = ("measure", KEYS["plain"], KEYS["aligned"], "difference", "p", "limit" * bool(ceiling))
    return section(
        "The numbers",
        "<p>Means with 95 % intervals. Differences are paired: both "
        "arms answer the same prompts from the same seeds, and p is the chance of a difference "
        "this large if the arms' names did not matter. Many rows are looked at here, so a single "
        "p a little below 0.05 means little.</p>",
        table(heads, rows),
        _table_note(results),
    )


def _table_row(
    pair: Mapping[str, Any],
    group: str,
    name: str,
    difference: Mapping[str, Any],
    ceiling: Mapping[str, float],
) -> str:
    measure = metric(name)
    cells = [f'<th title="{escape(measure.meaning)}">{escape(measure.label)}</th>']
    for arm in ARMS:
        value = pair["arms"][arm]["metrics"][group][name]
        spread = ""
        if value.get("low") is not None:
            low, high = show(measure, value["low"]), show(measure, value["high"])
            spread = f"<small>{escape(low.removesuffix(' %'))} to {escape(high)}</small>"
        cells.append(f"<td>{escape(show(measure, value['mean']))}{spread}</td>")
    like, spread = pair["arms"]["plain"]["metrics"][group][name]["mean"], ""
    if difference["low"] is not None:
        low, high = (show_difference(measure, difference[end], like) for end in ("low", "high"))
        spread = f"<small>{escape(low)} to {escape(high)}</small>"
    outcome = verdict(measure, dict(difference))
    sign = {"better": " ▲", "worse": " ▼", "unclear": ""}[outcome]
    cells.append(
        f'<td class="{outcome}">{escape(show_difference(measure, difference["mean"], like))}{sign}'
        f"{spread}</td>"
    )
    p = difference.get("p")
    shown = "–" if p is None else "&lt; 0.001" if p < 0.001 else f"{p:.3f}"
    cells.append(f"<td>{shown}</td>")
    cells.append(f"<td>{escape(show(measure, ceiling[name])) if name in ceiling else ''}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _table_note(results: Mapping[str, Any]) -> str:
    names = {n: metric(n) for d in results["pairs"][0]["differences"].values() for n in d}
    meanings = facts((m.label, f"{m.meaning} ({m.better} is better)") for m in names.values())
    limit = (
        " Limit: what the image tokenizer's own reconstructions of real images score."
        if results.get("ceiling")
        else ""
    )
    caution = "".join(f" {reason}." for reason in results["reasons"].values())
    signs = (
        f"▲ ARRA is better, ▼ worse: the interval leaves out 0, and p, where there is one, is "
        f"below {CLEAR}. Differences of shares are in percentage points."
    )
    return (
        f'<p class="note" style="margin-top:1rem">{signs}{limit}{escape(caution)}</p>'
        f"<details><summary>What the measures mean</summary>{meanings}</details>"
    )


def _seeds(results: Mapping[str, Any]) -> str:
    if not results.get("over_seeds"):
        return ""
    rows = []
    for group, measures in results["over_seeds"].items():
        for name, found in measures.items():
            measure = metric(name)
            each = ", ".join(show_difference(measure, d) for d in found["differences"])
            spread = "–"
            if found["low"] is not None:
                low, high = (show_difference(measure, found[end]) for end in ("low", "high"))
                spread = f"{low} to {high}"
            mean = show_difference(measure, found["mean"])
            name = f"{measure.label} ({group})"
            rows.append(row((name, mean, spread, f"{found['p']:.3f}", each)))
    count = len(results["pairs"])
    return section(
        "From run to run",
        f"<p>{count} pairs of runs, each pair from its own first weights and data order. Here the "
        "unit is a run, so this is what says whether the method helps, and the interval is "
        "Student's over runs.</p>",
        table(("measure", "mean difference", "95 % interval", "p", "each pair"), rows),
    )


def _depth(results: Mapping[str, Any]) -> str:
    depth = results.get("depth")
    if not depth:
        return ""
    names = list(depth["rows"][0]["metrics"])
    rows = []
    for found in depth["rows"]:
        layer = "plain" if found["layer"] is None else f"layer {found['layer']}"
        rows.append(row((layer, *(show(metric(n), found["metrics"][n]) for n in names))))
    heads = ("aligned at", *(escape(metric(n).label) for n in names))
    return section(
        "Which layer",
        f"<p>{escape(depth_paragraph(depth))}</p>",
        table(heads, rows, "max-width:34rem"),
        f'<p class="note" style="margin-top:.8rem">{escape(depth["source"])}</p>',
    )


def _run(results: Mapping[str, Any]) -> str:
    run = results["run"]
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run["stages"].items())
    commands = "\n".join(run.get("commands", []))
    described = facts([*run["facts"].items(), ("seconds a stage", stages)])
    script = (
        f"<details><summary>Commands</summary><pre><code>{escape(commands)}</code></pre></details>"
        if commands
        else ""
    )
    return section("What was run", described, script)
