"""Which pictures a report shows: some drawn at random, and the best and the worst by each score.

Ties are broken by a hash of the pictures' names, so that what is shown of many equal ones is a fair
sample and does not depend on their order.

Legend: N pictures.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from arra.data.images import square
from arra.evaluate.directions import better
from arra.evaluate.image_set import ImageSet, Picture
from arra.evaluate.ms_ssim import pair_up
from arra.evaluate.outputs import SCORES
from arra.pages.sheet import Cell

SHOWN, DRAWN = 8, 16
PAIRED = "ms_ssim_paired"
LETTERS = 160
"""Of a caption that are shown; scores.jsonl has all of it."""
SAMPLES = "samples-pixels.png"
"""The samples alone, at their own size in a row: every evaluation of the same prompts draws the
same ones, so that pages about several can show them side by side."""


@dataclass(frozen=True)
class Gallery:
    """Pictures under a heading.

    Attributes:
        name: of its file, without ending.
        heading, note: what they are.
        score: key of the score that they were chosen by; "" where they were not.
        cells: the pictures.
    """

    name: str
    heading: str
    note: str
    score: str
    cells: Sequence[Cell]


def galleries(
    generated: ImageSet, real: ImageSet | None, scores: Mapping[str, np.ndarray], size: int
) -> list[Gallery]:
    """All that a report shows, cropped to `size` pixels as they were measured."""
    drawn = drawn_from(generated.names)
    chosen = [(key, *side) for key in scores for side in _sides(key, scores[key], generated.names)]
    wanted = sorted({*drawn, *(index for _, _, indices in chosen for index in indices)})
    pictures = {picture.index: picture for picture in generated.at(wanted)}
    beside = _partners(real, generated, [i for key, _, at in chosen if key == PAIRED for i in at])
    note = f"{len(drawn)} of {len(generated):,}, drawn at random."
    cells = [_cell(pictures[index], pictures[index].name, None, size) for index in drawn]
    found = [Gallery("samples", "Samples", note, "", cells)]
    for key, side, indices in chosen:
        cells = [
            _cell(
                pictures[index],
                f"{scores[key][index]:.4g}",
                beside.get(index) if key == PAIRED else None,
                size,
            )
            for index in indices
        ]
        heading, note = f"{side.capitalize()} by {key}", _note(scores[key], indices)
        found.append(Gallery(f"{side}-{_plain(key)}", heading, note, key, cells))
    return found


def drawn_from(names: Sequence[str]) -> list[int]:
    """Indices of pictures drawn at random, by their names alone."""
    return sorted(range(len(names)), key=lambda index: _hash(names[index]))[:DRAWN]


def cut(text: str) -> str:
    """A caption as far as it is shown."""
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


def write_samples(folder: Path, samples: Gallery) -> None:
    """Writes the drawn pictures alone, side by side."""
    pictures = [picture for cell in samples.cells for picture in cell.pictures if picture]
    row = Image.new("RGB", (sum(each.width for each in pictures), pictures[0].height))
    for number, each in enumerate(pictures):
        row.paste(each, (number * each.width, 0))
    row.save(folder / SAMPLES, "PNG", optimize=True)


def read_samples(folder: Path) -> dict[str, tuple[str, Image.Image]]:
    """The drawn pictures of an evaluation's folder: {name: (caption, picture)}."""
    lines = (folder / SCORES).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    found = {}
    with Image.open(folder / SAMPLES) as row:
        side = row.height
        for number, index in enumerate(drawn_from([each["name"] for each in rows])):
            picture = row.crop((number * side, 0, (number + 1) * side, side))
            found[rows[index]["name"]] = (rows[index]["caption"] or "", picture)
    return found


def _sides(
    key: str, values_N: np.ndarray, names: Sequence[str]
) -> Iterator[tuple[str, Sequence[int]]]:
    """(best, indices), (worst, indices); nothing where all score the same."""
    answered = [int(index) for index in np.flatnonzero(~np.isnan(values_N))]
    if len(set(values_N[answered].tolist())) < 2:
        return
    answered.sort(key=lambda index: _hash(names[index]))
    few = max(1, min(SHOWN, len(answered) // 2))
    low, high = values_N[answered].min(), values_N[answered].max()
    rising = sorted(answered, key=lambda index: float(values_N[index]))
    falling = sorted(answered, key=lambda index: -float(values_N[index]))
    highest = [index for index in falling if values_N[index] > low][:few]
    lowest = [index for index in rising if values_N[index] < high][:few]
    if better(key) == "lower":
        yield from (("best", lowest), ("worst", highest))
    else:
        named = ("highest", "lowest") if better(key) is None else ("best", "worst")
        yield from zip(named, (highest, lowest), strict=True)


def _note(values_N: np.ndarray, indices: Sequence[int]) -> str:
    """From where to where they score, and how many more share the last one's score."""
    first, last = values_N[indices[0]], values_N[indices[-1]]
    between = f"{first:.4g}" if first == last else f"{first:.4g} to {last:.4g}"
    answered = int((~np.isnan(values_N)).sum())
    equal = int((values_N == last).sum())
    among = int((values_N[list(indices)] == last).sum())
    more = "" if equal == among else f"; {equal:,} score {last:.4g}, drawn at random among them"
    return f"Score {between}, of {answered:,} pictures that have one{more}."


def _cell(picture: Picture, head: str, beside: Image.Image | None, size: int) -> Cell:
    text = cut(picture.name if picture.caption is None else picture.caption)
    own = square(picture.image, size)
    if beside is None:
        return Cell((own,), (head,), text)
    return Cell((square(beside, size), own), ("real", head), text)


def _partners(
    real: ImageSet | None, generated: ImageSet, indices: Sequence[int]
) -> dict[int, Image.Image]:
    """The real picture of each of some generated ones."""
    if real is None or not indices:
        return {}
    pairs_P2 = pair_up(real.names, real.captions, generated.names, generated.captions)
    partner = {int(own): int(other) for other, own in pairs_P2}
    others = real.at([partner[index] for index in indices])
    return {index: each.image for index, each in zip(indices, others, strict=True)}


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def _plain(key: str) -> str:
    """A score's key as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in key)
