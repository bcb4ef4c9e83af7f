"""One way from a file to pixels: decoding, one crop, and the way back.

Everything that looks at an image (tokenizer, encoders, distances) gets the same PIL RGB square,
made here once, so that no two of them can disagree about what was in the picture.

Legend: N images, H and W pixels, `uint8 NCHW` = channels first, 0..255, RGB.
"""

import errno
import io
import struct
import textwrap
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from arra.files import place

MIN_SIDE = 8
"""Pixels. Shorter images (tracking pixels, icons cut to a line) hold nothing to paint."""

MAX_PIXELS = 178_956_970
"""Pixels. Above this an image is refused before it is decoded: a few kilobytes can unfold to many
gigabytes. It is Pillow's own limit for an error, so a 100-megapixel photograph still passes."""

CROP = "centre square, lanczos down, bicubic up, v1"
"""Name of what `square` does. Kept in manifests: features of another crop are other features."""

_DECODE_ERRORS = (
    OSError,
    SyntaxError,  # Pillow: "broken PNG file", "not a TIFF file"
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,  # libavif
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImage(ValueError):
    """An image that cannot be used; `reason` is a short phrase for rejects.jsonl."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def load_rgb(image: bytes | Path | str | Image.Image) -> Image.Image:
    """Decodes an image to upright 8-bit RGB.

    EXIF orientation is applied; transparency (alpha channel, transparent palette entry or colour)
    is composed on white; 16-bit grey is divided by 65535; of an animation the first frame is taken.
    Colour profiles are not applied. DICOM files are rescaled and windowed (dicom.py).

    Args:
        image: encoded bytes, the path of a file, or an image that is already decoded.

    Returns:
        A PIL image of mode RGB, at least MIN_SIDE pixels on each side.

    Raises:
        BadImage: the file is missing, empty, truncated, not an image, too small, too large, or has
            pixels without a known range. Other failures to read (a broken disk) stay OSError.
        ValueError: a DICOM file, and pydicom is not installed.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    data = image if isinstance(image, bytes) else _read(place(image))
    if len(data) == 0:
        raise BadImage("the image file is empty (0 bytes)")
    medical = data[128:132] == b"DICM"
    if medical:
        from arra.data import dicom

        dicom.require_pydicom()
    try:
        if medical:
            return _to_rgb(dicom.decode(data))
        with Image.open(io.BytesIO(data)) as opened:
            _check_size(opened)
            opened.load()
            return _to_rgb(opened)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image, or of a format that cannot be read") from None
    except Image.DecompressionBombError:
        raise BadImage(f"unfolds to more than {MAX_PIXELS} pixels") from None
    except _DECODE_ERRORS as error:
        raise BadImage(f"truncated or damaged image ({_phrase(error)})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadImage(f"missing file {path}") from None
    except (IsADirectoryError, NotADirectoryError):
        raise BadImage(f"{path} is not a file") from None
    except PermissionError:
        raise BadImage(f"no permission to read {path}") from None
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise BadImage(f"the path cannot be followed ({error.strerror})") from None


def ignore_pillow() -> None:
    """Silences Pillow's warnings: of photographs long before they are too large (MAX_PIXELS), and
    of damage that either does not matter or ends in a BadImage."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _phrase(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width}x{height} pixels, each side needs at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, more than the limit of {MAX_PIXELS}")


def _to_rgb(image: Image.Image) -> Image.Image:
    _check_size(image)
    upright = ImageOps.exif_transpose(image)
    assert upright is not None
    if upright.mode.startswith("I;16"):
        return _from_grey16(upright)
    if upright.mode == "I" and image.format in ("PNG", "PPM"):
        return _from_grey16(upright)  # older Pillow opens 16-bit grey of these formats as 32-bit
    if upright.mode in ("I", "F"):
        kind = "32-bit integer" if upright.mode == "I" else "floating-point"
        raise BadImage(f"{kind} pixels have no known range: convert to 8 or 16 bits")
    transparent = "transparency" in upright.info or upright.mode in ("LA", "PA", "La", "RGBa")
    if transparent or upright.mode == "RGBA":
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return upright.convert("RGB")


def _from_grey16(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB: round(value · 255 / 65535), which is round(value / 257)."""
    value_HW = np.asarray(image).astype(np.int64)
    grey_HW = (value_HW + 128) // 257
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey_HW = np.where(value_HW == key, 255, grey_HW)
    return Image.fromarray(grey_HW.astype(np.uint8)).convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an RGB image at `size` x `size` pixels, antialiased.

    The crop starts at a whole source pixel, so an image that already has the size is unchanged.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if side == size:
        return image.crop((left, top, left + side, top + side))
    method = Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC
    return image.resize((size, size), method, box=(left, top, left + side, top + side))


def to_uint8(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size to a uint8 tensor (N, 3, H, W)."""
    pixels_NHWC = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels_NHWC.transpose(0, 3, 1, 2).copy())


def to_pil(pixels_NCHW: torch.Tensor) -> list[Image.Image]:
    """A uint8 tensor (N, 3, H, W) to RGB images."""
    assert pixels_NCHW.dtype == torch.uint8, "pixels on their way out are uint8"
    pixels_NHWC = pixels_NCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_NHWC]


def grid(
    images: Sequence[Image.Image],
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    gap: int = 4,
) -> Image.Image:
    """A contact sheet, filled row by row on white.

    Args:
        images: at least one image; cells have the size of the largest.
        columns: images per row.
        captions: one per image, drawn below it in up to three lines.
        gap: white pixels around each cell.

    Raises:
        ValueError: no image, fewer than one column, or another number of captions than images.
    """
    if not images or columns < 1:
        raise ValueError("a contact sheet needs at least one image and one column")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    font_size, lines = 11, 3
    below = lines * (font_size + 2) if captions is not None else 0
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + gap) + gap, rows * (height + below + gap) + gap),
        (255, 255, 255),
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(font_size)
    for position, image in enumerate(images):
        left = gap + (position % columns) * (width + gap)
        top = gap + (position // columns) * (height + below + gap)
        sheet.paste(image.convert("RGB"), (left, top))
        if captions is not None:
            wrapped = textwrap.wrap(captions[position], max(4, width * 2 // font_size))[:lines]
            draw.text((left, top + height), "\n".join(wrapped), (0, 0, 0), font=font, spacing=2)
    return sheet
