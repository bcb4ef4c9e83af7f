"""A page's look: one style sheet, no script, no network; and the few HTML helpers it needs."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from arra.files import atomic_write

# Okabe and Ito's blue, vermillion and green, lightened for the dark scheme to keep their contrast.
STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d1c1a; --muted: #67635b; --rule: #e3dfd6;
  --plain: #c25400; --aligned: #0068a8; --third: #00805c;
  --fourth: #a3437d; --fifth: #7a6a00; --sixth: #5a5a5a;
  --serif: Charter, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14161a; --card: #1b1e24; --ink: #eae7e1; --muted: #a09c93; --rule: #32363e;
  --plain: #f39a55; --aligned: #62b8ee; --third: #45c79c;
  --fourth: #e08fc0; --fifth: #d9c84a; --sixth: #b4b4b4; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 var(--serif); padding: clamp(1.25rem, 4vw, 4rem) 1.1rem 5rem; }
main { max-width: 62rem; margin: 0 auto; }
header, section > p, section > h2 + p { max-width: 43rem; }
.eyebrow { font: 600 .75rem/1 var(--sans); letter-spacing: .09em; text-transform: uppercase;
  color: var(--muted); margin: 0 0 1rem; }
h1 { font-size: clamp(1.8rem, 1.2rem + 2.6vw, 2.75rem); line-height: 1.14; font-weight: 600;
  letter-spacing: -.012em; margin: 0 0 1.1rem; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; line-height: 1.25; font-weight: 600; margin: 0 0 .5rem; }
h3 { font: 600 .95rem/1.4 var(--sans); margin: 1.9rem 0 .5rem; }
section { border-top: 1px solid var(--rule); margin-top: 2.8rem; padding-top: 1.8rem; }
p { margin: 0 0 .9rem; }
.lead { font-size: 1.14rem; }
.note, figcaption, td, th, dl, .legend, .marks, summary { font-family: var(--sans); }
.note { color: var(--muted); font-size: .88rem; line-height: 1.5; }
.plain { color: var(--plain); } .aligned { color: var(--aligned); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .88rem; margin: 0 0 1rem; }
.cards { display: grid; gap: .9rem; margin: 1.8rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(14.5rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
  padding: 1rem 1.1rem; font-family: var(--sans); }
.card h3 { margin: 0 0 .55rem; font-size: .85rem; color: var(--muted); font-weight: 600; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .8rem; margin: 0;
  align-items: baseline; }
.card dt { font-size: .85rem; }
.card dd { margin: 0; font-size: 1.55rem; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card .value { margin: 0; font-size: 1.55rem; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; color: var(--ink); }
.cards.small { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.cards.small .card { padding: .8rem .9rem; } .cards.small h3 { overflow-wrap: anywhere; }
.card p:not(.value) { font-size: .84rem; line-height: 1.45; color: var(--muted);
  margin: .55rem 0 0; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: .25rem; background: var(--rule); }
img.small { image-rendering: pixelated; }
.pairs { display: grid; gap: 1.5rem 1.3rem;
  grid-template-columns: repeat(auto-fill, minmax(min(13.2rem, 100%), 1fr)); }
.pairs.with-real { grid-template-columns:
  repeat(auto-fill, minmax(min(18.5rem, 100%), 1fr)); }
.pair .images { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .4rem; }
.pair .images > div { border-top: 3px solid var(--third); padding-top: .3rem; }
.pair .images > .of-plain { border-color: var(--plain); }
.pair .images > .of-aligned { border-color: var(--aligned); }
.marks { display: block; font-size: .74rem; line-height: 1.35; color: var(--muted);
  margin-top: .25rem; }
figcaption { font-size: .85rem; line-height: 1.4; margin-top: .35rem; }
.shots { display: grid; gap: 1rem .8rem; margin: 0 0 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(6.6rem, 45%), 1fr)); }
.shots .images > div { border-top: 0; padding-top: 0; }
.shots figcaption { font-size: .76rem; overflow-wrap: anywhere; }
.warnings { background: var(--card); border: 1px solid var(--plain); border-left-width: .35rem;
  border-radius: .4rem; padding: .8rem 1rem; margin: 1.4rem 0 0; font-family: var(--sans);
  font-size: .92rem; line-height: 1.5; } .warnings ul { margin: 0; padding-left: 1.1rem; }
.warnings li { overflow-wrap: anywhere; }
.more { margin-top: 1.5rem; } summary { cursor: pointer; font-size: .9rem; color: var(--muted);
  padding: .35rem 0; } details[open] summary { margin-bottom: .9rem; }
.films { display: grid; gap: 1.8rem 2.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); }
.film .frames { display: grid; gap: .3rem; align-items: center; font-family: var(--sans);
  grid-template-columns: var(--label, 3.1rem) repeat(var(--frames), minmax(0, 1fr));
  font-size: .76rem; }
.film .of { overflow-wrap: anywhere; } .film .best { outline: 3px solid var(--third);
  border-radius: .25rem; } .film .seen { color: var(--muted); text-align: center; }
.plots { display: grid; gap: 1.8rem 1.8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.plots svg { display: block; width: 100%; height: auto; font-family: var(--sans);
  stroke-linejoin: round; overflow: visible; }
.plots figcaption { color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: .42rem 0 .42rem 1.1rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  padding-left: 0;
  background: var(--paper); }
thead th { font-weight: 600; color: var(--muted); border-bottom-color: var(--muted); }
tbody th { font-weight: 400; } tr.group th { font-weight: 600; padding-top: 1.2rem; }
td small, th small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; }
.prose thead th { white-space: normal; vertical-align: bottom; }
.prose th:first-child, .prose td:first-child { white-space: normal; min-width: 11rem;
  overflow-wrap: anywhere; }
td small.why { white-space: normal; min-width: 8rem; max-width: 12rem; margin-left: auto; }
td.better, td.worse { font-weight: 600; }
dl.facts { display: grid; grid-template-columns: minmax(8rem, auto) 1fr; gap: .35rem 1.4rem;
  font-size: .88rem; line-height: 1.5; margin: 0 0 1.2rem; }
dl.facts dt { color: var(--muted); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .4rem;
  padding: .8rem 1rem; font-size: .78rem; line-height: 1.5; overflow-x: auto; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 34rem) { table { font-size: .8rem; } td small { font-size: .7rem; }
  th, td { padding-left: .6rem; } td:not(.better, .worse, .unclear) small { display: none; }
  tr.group th { white-space: normal; } th:first-child:not([colspan]) { white-space: normal;
  min-width: 5.6rem; overflow-wrap: anywhere; } dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .6rem; } }
@media (max-width: 34rem) { .prose thead { display: none; }
  .prose table, .prose tbody { display: block; }
  .prose tr { display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: .55rem 0;
    border-bottom: 1px solid var(--rule); }
  .prose th, .prose td { border: 0; padding: 0; text-align: left; }
  .prose th:first-child { flex: 0 0 100%; position: static; font-weight: 600; }
  .prose th small { font-size: .76rem; } .prose td.value small { display: block; }
  .prose td small.why { max-width: none; }
  .prose td[data-head]::before { content: attr(data-head) " "; color: var(--muted); } }
@media print { body { padding: 0; } section { break-inside: avoid-page; } }
"""

SMALL = 128  # pixels; up to here pixels are shown as they are, enlarged without smoothing


def document(title: str, body: Iterable[str]) -> str:
    """A whole HTML page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_page(path: Path, title: str, body: Iterable[str]) -> Path:
    """Writes a whole HTML page, atomically, and returns its path."""
    with atomic_write(path) as temporary:
        temporary.write_text(document(title, body), encoding="utf-8")
    return path


def escape(text: object) -> str:
    """Text as HTML; a lone surrogate from a broken caption is shown as a question mark."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def image(picture: Image.Image, alt: str) -> str:
    """An <img> that carries its own bytes: PNG for small pictures, JPEG for large ones."""
    small = max(picture.size) <= SMALL
    buffer = io.BytesIO()
    if small:
        picture.convert("RGB").save(buffer, "PNG", optimize=True)
    else:
        picture.convert("RGB").save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = "png" if small else "jpeg"
    width, height = picture.size
    style = ' class="small"' if small else ""
    return (
        f'<img{style} width="{width}" height="{height}" loading="lazy" alt="{escape(alt)}" '
        f'src="data:image/{kind};base64,{data}">'
    )


def figure(inner: str, caption: str, kind: str = "") -> str:
    """A <figure>; the caption is text, not HTML."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<figure{attribute}>{inner}<figcaption>{escape(caption)}</figcaption></figure>"


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """A list of names and values; rows without a value are left out."""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in rows
        if value is not None and value != ""
    )
    return f'<dl class="facts">{items}</dl>'


def section(title: str, *parts: str) -> str:
    """A part of the page under its own heading; nothing if it would be empty."""
    inner = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def row(cells: Iterable[object]) -> str:
    """A table's row of text; the first cell names it."""
    first, *others = (escape(cell) for cell in cells)
    return f"<tr><th>{first}</th>{''.join(f'<td>{each}</td>' for each in others)}</tr>"


def table(heads: Iterable[str], rows: Iterable[str], style: str = "", kind: str = "") -> str:
    """A table that scrolls by itself where the page is narrow.

    Args:
        heads: HTML of the columns' names.
        rows: whole rows, from `row` or with marks of their own.
        kind: class of the style sheet; "prose": the first column is text that may wrap.
    """
    top = "".join(f"<th>{head}</th>" for head in heads)
    attribute = f' style="{style}"' if style else ""
    return (
        f'<div class="scroll{kind and " " + kind}"><table{attribute}><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
