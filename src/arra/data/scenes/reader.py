"""Pixels back to a scene by classical image analysis: palette, components, templates.

1. Background: the palette background that most pixels are nearest to; its level is their median.
2. Every other pixel is taken for a mixture, background + alpha (colour - background), of the colour
   that leaves the least residual. So soft edges keep the colour of their shape.
3. Components of equal colour with alpha > 1/2; each is compared (intersection over union of its
   alpha) with ideal shapes of its own area at its own centroid. What fits none is a loose piece.
4. Loose pieces of one colour that together fit a shape are that shape, broken.

Names: P pixels (of 64x64), K palette colours, `_HW` height x width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

from arra.data.scenes.components import label
from arra.data.scenes.drawing import coverage
from arra.data.scenes.world import BACKGROUNDS, COLOURS, KINDS, RADIUS, SIDE

FITS = 0.80  # least overlap with the ideal shape for a whole one (drawn and blurred scenes: > 0.85)
FITS_BROKEN = 0.72  # the same for pieces put together, the gap between them closed
RADII = (0.8 * RADIUS["small"], 1.25 * RADIUS["large"])  # of anything that counts as a shape
LARGE_FROM = (RADIUS["small"] * RADIUS["large"]) ** 0.5
SPECK = 16  # pixels; fewer are noise (the smallest shape has 133)
NEAR = 6  # pixels between the boxes of pieces that may belong together

_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_COLOUR_NAMES = tuple(COLOURS)
_BACKGROUND_K3 = np.array(list(BACKGROUNDS.values()), np.float32)
_COLOUR_K3 = np.array(list(COLOURS.values()), np.float32)
_Y_HW, _X_HW = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


@dataclass(frozen=True)
class FoundShape:
    """A whole shape; x, y: centroid in pixels; fit: overlap with the ideal shape, 0 to 1."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    fit: float


@dataclass(frozen=True)
class Piece:
    """Something that is no whole shape. colour None: a patch of another background."""

    colour: str | None
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Reading:
    """What the pixels show. `fragments`: pieces that should not exist, i.e. `pieces` and, for each
    shape that was put together from k pieces, k - 1. background None: no known background."""

    shapes: tuple[FoundShape, ...]
    pieces: tuple[Piece, ...]
    background: str | None
    fragments: int


@dataclass(frozen=True)
class _Blob:
    colour: int
    alpha_HW: np.ndarray  # coverage by `colour`, zero outside the blob

    @property
    def centre(self) -> tuple[float, float, float]:
        """area, x, y"""
        area = float(self.alpha_HW.sum())
        x = float(self.alpha_HW.sum(0) @ _X_HW[0])
        y = float(self.alpha_HW.sum(1) @ _Y_HW[:, 0])
        return area, x / area, y / area

    @property
    def box(self) -> tuple[int, int, int, int]:
        xs = np.flatnonzero(self.alpha_HW.any(0))
        ys = np.flatnonzero(self.alpha_HW.any(1))
        return int(xs[0]), int(xs[-1]), int(ys[0]), int(ys[-1])


def read(image: np.ndarray) -> Reading:
    """Recover the scene from an image, uint8 (64, 64, 3). ValueError for any other array."""
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"the scene reader takes uint8 images of shape ({SIDE}, {SIDE}, 3), "
            f"not {image.dtype} {image.shape}: convert and resize them first"
        )
    pixels_P3 = image.reshape(-1, 3).astype(np.float32)
    background, level_3, foreign_HW = _find_background(pixels_P3)
    colour_HW, alpha_HWK = _unmix(pixels_P3, level_3)
    blobs = _find_blobs(colour_HW, alpha_HWK)
    fits = [_best_shape(blob, FITS) for blob in blobs]
    shapes = [shape for shape in fits if shape is not None]
    loose = [blob for blob, shape in zip(blobs, fits, strict=True) if shape is None]
    mended, loose, extra = _mend(loose)
    pieces = [_piece(blob.alpha_HW, _COLOUR_NAMES[blob.colour]) for blob in loose]
    pieces += _foreign_patches(foreign_HW & (colour_HW < 0))
    return Reading(
        tuple(sorted([*shapes, *mended], key=lambda shape: (shape.y, shape.x))),
        tuple(pieces),
        background,
        len(pieces) + extra,
    )


def _find_background(pixels_P3: np.ndarray) -> tuple[str | None, np.ndarray, np.ndarray]:
    """(name, level, which pixels look like another background)."""
    palette_K3 = np.concatenate([_BACKGROUND_K3, _COLOUR_K3])
    distance_PK = _distances(pixels_P3, palette_K3)
    nearest_P = distance_PK.argmin(1)
    nearest_P[distance_PK.min(1) > 60] = len(palette_K3)  # like nothing we know
    votes = np.bincount(nearest_P, minlength=len(palette_K3) + 1)[: len(_BACKGROUND_K3)]
    winner = int(votes.argmax())
    if votes[winner] < len(pixels_P3) / 4:
        everything_else = nearest_P == len(palette_K3)
        level_3 = np.median(pixels_P3[everything_else] if everything_else.any() else pixels_P3, 0)
        return None, level_3, np.zeros((SIDE, SIDE), bool)
    level_3 = np.median(pixels_P3[nearest_P == winner], axis=0)
    other_P = (nearest_P < len(_BACKGROUND_K3)) & (nearest_P != winner)
    far_P = np.square(pixels_P3 - level_3).sum(1) > 35**2
    return _BACKGROUND_NAMES[winner], level_3, (other_P & far_P).reshape(SIDE, SIDE)


def _distances(pixels_P3: np.ndarray, palette_K3: np.ndarray) -> np.ndarray:
    square_PK = (
        np.square(pixels_P3).sum(1)[:, None]
        - 2 * pixels_P3 @ palette_K3.T
        + np.square(palette_K3).sum(1)
    )
    return np.sqrt(np.maximum(square_PK, 0))


def _unmix(pixels_P3: np.ndarray, level_3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour index per pixel (-1: background) and the coverage by each colour, 0 to 1."""
    from_level_P3, direction_K3 = pixels_P3 - level_3, _COLOUR_K3 - level_3
    length_K = np.square(direction_K3).sum(1)
    dot_PK = from_level_P3 @ direction_K3.T
    alpha_PK = np.clip(dot_PK / length_K, 0, 1)
    residual_PK = alpha_PK * (
        alpha_PK * length_K - 2 * dot_PK
    )  # + |from_level|^2, the same for all
    best_P = residual_PK.argmin(1)
    best_P[np.take_along_axis(alpha_PK, best_P[:, None], 1)[:, 0] <= 0.5] = -1
    return best_P.reshape(SIDE, SIDE), alpha_PK.reshape(SIDE, SIDE, -1)


def _grow(mask_HW: np.ndarray) -> np.ndarray:
    """The mask and the pixels that touch it by side or corner."""
    rows = mask_HW.copy()
    rows[1:] |= mask_HW[:-1]
    rows[:-1] |= mask_HW[1:]
    grown = rows.copy()
    grown[:, 1:] |= rows[:, :-1]
    grown[:, :-1] |= rows[:, 1:]
    return grown


def _find_blobs(colour_HW: np.ndarray, alpha_HWK: np.ndarray) -> list[_Blob]:
    """Components of one colour, largest first, each with the soft edge around it."""
    label_HW, count = label(colour_HW)
    if not count:
        return []
    area_N = np.bincount(label_HW[label_HW >= 0], minlength=count)
    order = np.argsort(-area_N, kind="stable")
    kept = [int(name) for name in order if area_N[name] >= SPECK]
    kept_HW = np.isin(label_HW, kept)
    blobs = []
    for name in kept:
        mask_HW = label_HW == name
        colour = int(colour_HW[mask_HW][0])
        edge_HW = _grow(_grow(mask_HW)) & ~kept_HW
        blobs.append(_Blob(colour, np.where(mask_HW | edge_HW, alpha_HWK[..., colour], 0)))
    return blobs


def _best_shape(blob: _Blob, least_fit: float) -> FoundShape | None:
    """The ideal shape that overlaps most with the blob, or None where none fits."""
    area, x, y = blob.centre
    radius = (area / np.pi) ** 0.5
    if not RADII[0] <= radius <= RADII[1]:
        return None
    left, right, top, bottom = blob.box
    window = np.s_[max(top - 2, 0) : bottom + 3, max(left - 2, 0) : right + 3]
    alpha = blob.alpha_HW[window]
    dx, dy = _X_HW[window] - x, _Y_HW[window] - y
    best_fit, best_kind = 0.0, ""
    for kind in KINDS:
        ideal = coverage(kind, radius, dx, dy)
        for candidate in (ideal, _soften(ideal)):  # a tokenizer blurs, most of all the corners
            shared = float(np.minimum(alpha, candidate).sum())
            fit = shared / (2 * area - shared)  # both have the same area by construction
            if fit > best_fit:
                best_fit, best_kind = fit, kind
    if best_fit < least_fit:
        return None
    size = "small" if radius < LARGE_FROM else "large"
    return FoundShape(best_kind, _COLOUR_NAMES[blob.colour], size, x, y, best_fit)


def _soften(alpha: np.ndarray) -> np.ndarray:
    """Blurred by (1 2 3 2 1)/9 along both sides (standard deviation 1.15 pixels)."""
    for _ in range(2):
        alpha = alpha @ _box_blur(alpha.shape[1])
        alpha = _box_blur(alpha.shape[0]) @ alpha
    return alpha


@cache
def _box_blur(length: int) -> np.ndarray:
    """The matrix of a moving mean over three neighbours; beyond the border there is nothing."""
    near = np.abs(np.subtract.outer(np.arange(length), np.arange(length))) <= 1
    return near.astype(np.float32) / 3


def _mend(loose: list[_Blob]) -> tuple[list[FoundShape], list[_Blob], int]:
    """Put together what was broken: (shapes, what is still loose, pieces too many)."""
    shapes, extra = [], 0
    for count in (2, 3):
        while True:
            found = _find_broken(loose[:8], count)
            if found is None:
                break
            shape, used = found
            shapes.append(shape)
            extra += count - 1
            loose = [blob for blob in loose if not any(blob is one for one in used)]
    return shapes, loose, extra


def _find_broken(loose: list[_Blob], count: int) -> tuple[FoundShape, tuple[_Blob, ...]] | None:
    best: tuple[FoundShape, tuple[_Blob, ...]] | None = None
    for group in combinations(loose, count):
        if len({blob.colour for blob in group}) > 1 or not _near(group):
            continue
        whole = _Blob(group[0].colour, _join(group))
        shape = _best_shape(whole, FITS_BROKEN)
        if shape is not None and (best is None or shape.fit > best[0].fit):
            best = shape, group
    return best


def _join(group: tuple[_Blob, ...]) -> np.ndarray:
    """The coverage by all pieces, with gaps of up to four pixels between them filled."""
    alpha_HW = np.maximum.reduce([blob.alpha_HW for blob in group])
    mask_HW = np.pad(alpha_HW > 0.5, 2)
    closed_HW = ~_grow(_grow(~_grow(_grow(mask_HW))))[2:-2, 2:-2]
    return np.where(closed_HW, 1, alpha_HW)


def _near(group: tuple[_Blob, ...]) -> bool:
    boxes = [blob.box for blob in group]
    return all(
        max(a[0], b[0]) - min(a[1], b[1]) <= NEAR and max(a[2], b[2]) - min(a[3], b[3]) <= NEAR
        for a, b in combinations(boxes, 2)
    )


def _piece(alpha_HW: np.ndarray, colour: str | None) -> Piece:
    area = float(alpha_HW.sum())
    x, y = float((alpha_HW * _X_HW).sum()), float((alpha_HW * _Y_HW).sum())
    return Piece(colour, x / area, y / area, area)


def _foreign_patches(foreign_HW: np.ndarray) -> list[Piece]:
    """Patches of another background, thick enough not to be the blurred edge of a shape."""
    core_HW = ~_grow(~foreign_HW)
    label_HW, count = label(np.where(core_HW, 0, -1))
    patches = [_grow(label_HW == name) & foreign_HW for name in range(count)]
    return [_piece(patch.astype(np.float32), None) for patch in patches if patch.sum() >= 2 * SPECK]
