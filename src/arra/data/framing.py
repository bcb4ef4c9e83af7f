"""How a decoded picture becomes what the image tokenizer and the encoders see.

A frame is the picture's centre square, the whole picture on a filled square, or a rectangle of
nearly its own aspect ratio. Views are further frames of the same picture, of which training draws
one.

Legend: w and h in pixels unless said otherwise.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageColor, ImageOps

from arra.data.images import CROP, BadImage, square

KINDS = ("crop", "pad", "buckets")
VIEWS = ("none", "flip", "ten-crop")

MAX_BUCKET_ASPECT = 4.0
"""Longest side over shortest of a bucket (Lumina-mGPT, data/item_processor.py, `max_ratio`)."""

ENLARGED = 1.1
"""Ten crops are cut from a square this much larger (LlamaGen, extract_codes_c2i.py,
`--crop-range`)."""

FLIP = "flip"
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class Framing:
    """How every picture of a dataset is framed, and which are left out for their size.

    Attributes:
        size: pixels per side of a square; a bucket has at most size x size pixels.
        kind: `crop` is the centre square, `pad` the whole picture with its longest side at `size`
            and the rest filled, `buckets` the rectangle nearest in aspect ratio, filled by the
            picture's centre.
        pad_colour: fills the rest of `pad`; a name or #rrggbb.
        bucket_step: sides of buckets are multiples of it.
        views: `flip` adds the mirrored frame; `ten-crop` adds corners and centre of the enlarged
            square, and their mirrored ones.
        min_side: pixels; a picture with a shorter side is left out.
        max_aspect: longest side over shortest; a picture above it is left out.

    Raises:
        ValueError: something that cannot be done.
    """

    size: int
    kind: str = "crop"
    pad_colour: str = "white"
    bucket_step: int = 32
    views: str = "none"
    min_side: int = 0
    max_aspect: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"--framing {self.kind} is not one of {', '.join(KINDS)}")
        if self.views not in VIEWS:
            raise ValueError(f"--views {self.views} is not one of {', '.join(VIEWS)}")
        if self.kind == "buckets" and self.size % self.bucket_step:
            raise ValueError(
                f"--size {self.size} is not a multiple of --bucket-step {self.bucket_step}"
            )
        if self.kind == "pad":
            self.colour  # noqa: B018  # refuses a colour that is none
        if self.views == "ten-crop" and self.kind != "crop":
            raise ValueError("--views ten-crop cuts squares: it needs --framing crop")

    @property
    def name(self) -> str:
        """What manifests say about it. Features of another crop are other features."""
        if self.kind == "pad":
            red, green, blue = self.colour
            return (
                f"longest side, padded #{red:02x}{green:02x}{blue:02x}, lanczos down, bicubic up, "
                f"v1"
            )
        if self.kind == "buckets":
            return (
                f"centre of the nearest of {len(bucket_sizes(self.size, self.bucket_step))} "
                f"rectangles in steps of {self.bucket_step}, lanczos down, bicubic up, v1"
            )
        return CROP

    @property
    def colour(self) -> tuple[int, int, int]:
        """RGB of `pad_colour`."""
        try:
            red, green, blue = ImageColor.getrgb(self.pad_colour)[:3]
        except ValueError:
            raise ValueError(
                f"--pad-colour {self.pad_colour!r} is no colour: write a name such as black, or "
                f"#rrggbb"
            ) from None
        return red, green, blue

    def frame(self, image: Image.Image) -> Image.Image:
        """An RGB picture as the models see it.

        Raises:
            BadImage: it is left out for its size.
        """
        self._check(image)
        if self.kind == "pad":
            return _padded(image, self.size, self.colour)
        if self.kind == "buckets":
            return _filling(image, nearest(image.size, bucket_sizes(self.size, self.bucket_step)))
        return square(image, self.size)

    def views_of(
        self, image: Image.Image, caption: str, frame: Image.Image | None = None
    ) -> dict[str, Image.Image]:
        """Name -> further frames of an RGB picture; `frame` is its own, if that is there already.

        A caption that says left or right gets no mirrored ones: it would be wrong about them.
        """
        if self.views == "none":
            return {}
        mirrored = not _SIDES.search(caption)
        if self.views == "flip":
            return {FLIP: ImageOps.mirror(frame or self.frame(image))} if mirrored else {}
        crops = _five_crops(image, self.size)
        flips = {f"{name}-{FLIP}": ImageOps.mirror(crop) for name, crop in crops.items()}
        return crops | (flips if mirrored else {})

    def _check(self, image: Image.Image) -> None:
        short, long = sorted(image.size)
        if short < self.min_side:
            raise BadImage(f"filtered: a side is shorter than {self.min_side} pixels ({short})")
        if self.max_aspect is not None and long > self.max_aspect * short:
            raise BadImage(
                f"filtered: the aspect ratio is above {self.max_aspect:g} ({long}:{short})"
            )

    def described(self) -> dict[str, Any]:
        """What a manifest keeps beside `size`, for `framing_of`."""
        return {name: value for name, value in asdict(self).items() if name != "size"}


def framing_of(size: int, described: Mapping[str, Any]) -> Framing:
    """The framing of a prepared dataset, from its manifest's `size` and `framing`."""
    return Framing(size, **described)


def not_mirrored(views: str, rows: int, further: int) -> int:
    """How many of `rows` pictures with `further` views have no mirrored ones."""
    each = {"flip": 1, "ten-crop": 10}[views]
    return (rows * each - further) // (1 if views == "flip" else 5)


@cache
def bucket_sizes(size: int, step: int) -> tuple[tuple[int, int], ...]:
    """Widths and heights of about size x size pixels, never more, in multiples of `step`.

    They are Lumina-mGPT's (`generate_crop_size_list`): with N = (size/step)^2 cells and w columns,
    every number of rows from floor(N/(w+1)) to floor(N/w), unless one side is more than four times
    the other.
    """
    cells = (size // step) ** 2
    return tuple(
        (columns * step, rows * step)
        for columns in range(cells, 0, -1)
        for rows in range(max(1, cells // (columns + 1)), cells // columns + 1)
        if max(columns, rows) <= MAX_BUCKET_ASPECT * min(columns, rows)
    )


def nearest(size: tuple[int, int], buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket that keeps most of a picture, of equals the largest (`var_center_crop` there)."""
    width, height = size

    def kept(bucket: tuple[int, int]) -> float:
        a, b = bucket[0] * height, bucket[1] * width
        return min(a, b) / max(a, b)

    return max(buckets, key=lambda bucket: (kept(bucket), bucket))


def _filling(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre of a picture that has the aspect ratio of `size`, at that size."""
    if image.size == size:
        return image
    (width, height), (to_width, to_height) = image.size, size
    scale = min(width / to_width, height / to_height)
    box_width, box_height = min(width, to_width * scale), min(height, to_height * scale)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize(size, _method(scale), box=box)


def _padded(image: Image.Image, size: int, colour: tuple[int, int, int]) -> Image.Image:
    scale = max(image.size) / size
    width, height = (max(1, round(side / scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size), colour)
    whole = image if scale == 1 else image.resize((width, height), _method(scale))
    canvas.paste(whole, ((size - width) // 2, (size - height) // 2))
    return canvas


def _method(scale: float) -> Image.Resampling:
    return Image.Resampling.LANCZOS if scale > 1 else Image.Resampling.BICUBIC


def _five_crops(image: Image.Image, size: int) -> dict[str, Image.Image]:
    """Corners and centre of the centre square, enlarged."""
    large = square(image, int(size * ENLARGED))
    end = large.width - size
    middle = end // 2
    corners = {
        "top-left": (0, 0),
        "top-right": (end, 0),
        "bottom-left": (0, end),
        "bottom-right": (end, end),
        "centre": (middle, middle),
    }
    return {
        name: large.crop((left, top, left + size, top + size))
        for name, (left, top) in corners.items()
    }
