"""Contact sheets: cells of one picture, or of a few side by side, as a PNG and on a page."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from arra.pages.frame import escape, figure, image

SIDE = 256
"""Pixels of a picture's longest side on a sheet; smaller ones are enlarged pixel by pixel."""

WIDE = 1600
"""Pixels of a sheet's width that cells are set in, about."""
GAP, MARGIN = 4, 20
LINES = 3
_FONT, _SMALL = 14, 12
_INK, _MUTED, _PAPER, _RULE = (29, 28, 26), (110, 105, 96), (251, 250, 247), (227, 223, 214)


@dataclass(frozen=True)
class Cell:
    """Pictures that belong together, side by side.

    Attributes:
        pictures: None where there is none.
        heads: what is said of each.
        caption: below, on a sheet in up to LINES lines.
    """

    pictures: tuple[Image.Image | None, ...]
    heads: tuple[str, ...]
    caption: str

    @property
    def is_empty(self) -> bool:
        return all(picture is None for picture in self.pictures)


def sheet(cells: Sequence[Cell]) -> Image.Image:
    """All cells, of as many pictures each, on paper."""
    assert cells, "a sheet without a picture"
    below = LINES * (_FONT + 4) + 8
    width, height = _width(cells[0]), SIDE + _SMALL + 8 + below
    rows = -(-len(cells) // max(1, WIDE // width))
    columns = -(-len(cells) // rows)  # rows of equal length, or nearly
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN)
    made = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(made)
    for place, cell in enumerate(cells):
        x = MARGIN + (place % columns) * (width + MARGIN)
        y = MARGIN + (place // columns) * (height + MARGIN)
        _draw(made, draw, cell, x, y)
    return made


def _width(cell: Cell) -> int:
    return len(cell.pictures) * (SIDE + GAP) - GAP


def _draw(made: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int) -> None:
    small, font = ImageFont.load_default(_SMALL), ImageFont.load_default(_FONT)
    top = y + _SMALL + 8
    for side, (picture, head) in enumerate(zip(cell.pictures, cell.heads, strict=True)):
        left = x + side * (SIDE + GAP)
        draw.text((left, y), _fitting(head, small, SIDE), _MUTED, font=small)
        if picture is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=_RULE)
            draw.text((left + 8, top + 8), "not checked", _MUTED, font=small)
            continue
        shown = fitted(picture, SIDE)
        made.paste(shown, (left + (SIDE - shown.width) // 2, top + (SIDE - shown.height) // 2))
    lines = _wrapped(cell.caption, font, _width(cell))
    draw.text((x, top + SIDE + 6), "\n".join(lines), _INK, font=font, spacing=4)


def cell_html(cell: Cell) -> str:
    """A cell as a <figure>."""
    sides = []
    for picture, head in zip(cell.pictures, cell.heads, strict=True):
        shown = "" if picture is None else image(_sized(picture), head)
        sides.append(f'<div>{shown}<span class="marks">{escape(head)}</span></div>')
    return figure(f'<div class="images">{"".join(sides)}</div>', cell.caption, "pair")


def _sized(picture: Image.Image) -> Image.Image:
    return fitted(picture, SIDE) if max(picture.size) > SIDE else picture


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
