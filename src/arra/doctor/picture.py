"""Contact sheets of an audit: originals beside what their codes decode to, and closest pairs."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from arra.doctor.samples import Shown

SIDE = 256
"""Pixels of a picture's longest side on a sheet; smaller ones are enlarged pixel by pixel."""

COLUMNS = 3
GAP, MARGIN = 4, 20
LINES = 3
_FONT, _SMALL = 14, 12
_INK, _MUTED, _PAPER, _RULE = (29, 28, 26), (110, 105, 96), (251, 250, 247), (227, 223, 214)


@dataclass(frozen=True)
class Cell:
    """Two pictures side by side.

    Attributes:
        left, right: None where there is no picture.
        heads: what is above each.
        caption: below, in up to LINES lines.
    """

    left: Image.Image | None
    right: Image.Image | None
    heads: tuple[str, str]
    caption: str


def sample_cell(shown: Shown) -> Cell:
    """Original and decoded."""
    heads = ["decoded"]
    if shown.psnr is not None:
        heads.append(f"{shown.psnr:.1f} dB")
    if shown.agreement is not None and shown.agreement < 1:
        heads.append(f"{shown.agreement:.1%} of codes agree")
    caption = f"{shown.id}: {shown.caption}"
    return Cell(shown.original, shown.decoded, ("original", ", ".join(heads)), caption)


def pair_cell(one: Shown, other: Shown, cosine: float) -> Cell:
    """Two rows: their originals, or what their codes decode to."""
    heads = (_named(one), _named(other))
    same = one.caption == other.caption
    caption = one.caption if same else f"{one.caption}  |  {other.caption}"
    return Cell(_best(one), _best(other), heads, f"cosine {cosine:.4f}: {caption}")


def _named(shown: Shown) -> str:
    return f"{shown.id} (decoded)" if shown.original is None and shown.decoded else shown.id


def _best(shown: Shown) -> Image.Image | None:
    return shown.original if shown.original is not None else shown.decoded


def sheet(cells: Sequence[Cell]) -> Image.Image:
    """All cells on paper, COLUMNS to a row."""
    assert cells, "a sheet without a picture"
    below = LINES * (_FONT + 4) + 8
    width, height = 2 * SIDE + GAP, SIDE + _SMALL + 8 + below
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN)
    made = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(made)
    for place, cell in enumerate(cells):
        x = MARGIN + (place % columns) * (width + MARGIN)
        y = MARGIN + (place // columns) * (height + MARGIN)
        _draw(made, draw, cell, x, y)
    return made


def _draw(made: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int) -> None:
    small, font = ImageFont.load_default(_SMALL), ImageFont.load_default(_FONT)
    top = y + _SMALL + 8
    for side, (picture, head) in enumerate(zip((cell.left, cell.right), cell.heads, strict=True)):
        left = x + side * (SIDE + GAP)
        draw.text((left, y), _fitting(head, small, SIDE), _MUTED, font=small)
        if picture is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=_RULE)
            draw.text((left + 8, top + 8), "not checked", _MUTED, font=small)
            continue
        shown = fitted(picture, SIDE)
        made.paste(shown, (left + (SIDE - shown.width) // 2, top + (SIDE - shown.height) // 2))
    lines = _wrapped(cell.caption, font, 2 * SIDE + GAP)
    draw.text((x, top + SIDE + 6), "\n".join(lines), _INK, font=font, spacing=4)


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """A picture whose longest side is about `side`: whole multiples if it is small."""
    longest = max(picture.size)
    if longest <= side:
        times = side // longest
        return picture.resize((picture.width * times, picture.height * times), 0)
    scale = side / longest
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _wrapped(
    text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> list[str]:
    """Up to LINES lines that fit; the last one says if there was more."""
    letters = max(8, int(width / max(1.0, font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27)))
    lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder=" …")
    return [_fitting(line, font, width) for line in lines]


def _fitting(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The beginning of a text that fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
