"""DICOM files as ordinary images: only pixels leave them, no tag is ever copied.

Stored values go through the modality's rescaling and the first window of the file (DICOM PS3.3,
C.11.1 and C.11.2), MONOCHROME1 is inverted, so that white is what absorbed most, as on a film.

Legend: H and W pixels, C colours.
"""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from arra.data.images import MAX_PIXELS, BadImage

if TYPE_CHECKING:
    from pydicom import Dataset

_TAGS = [
    *("PixelData", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration"),
    *("PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue", "ExtendedOffsetTable"),
    *("ExtendedOffsetTableLengths", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData"),
    *("SegmentedBluePaletteColorLookupTableData",),
]
"""What pixels are made of. Nothing else is parsed, so no warning can show a patient's name."""


def require_pydicom() -> None:
    """Raises ValueError with the remedy if DICOM files cannot be read here."""
    try:
        import pydicom  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("to read DICOM files, install 'arra[dicom]'") from None


def decode(data: bytes) -> Image.Image:
    """The first frame of a DICOM file as 8-bit grey or RGB.

    Rescaling (or the modality's table) comes first, then the first window of the file, by its own
    function (LINEAR, LINEAR_EXACT, SIGMOID), or its table; without either, the range of the values
    there are, padding left out.

    Raises:
        BadImage: no pixels, too many, a compression that pydicom lacks a plug-in for, or damage.
            Other errors of damaged files are left to `images.load_rgb`, which knows them.
    """
    from pydicom import dcmread
    from pydicom.errors import BytesLengthException, InvalidDicomError
    from pydicom.pixels import pixel_array

    try:
        dataset = dcmread(io.BytesIO(data), specific_tags=list(_TAGS))
        if "PixelData" not in dataset:
            raise BadImage("the DICOM file holds no pixels")
        height, width = int(dataset.Rows), int(dataset.Columns)
        if height * width > MAX_PIXELS:
            raise BadImage(f"{width}x{height} pixels, more than the limit of {MAX_PIXELS}")
        stored = pixel_array(dataset, index=0)
        kind = str(dataset.PhotometricInterpretation)
        if kind in ("MONOCHROME1", "MONOCHROME2"):
            return Image.fromarray(_grey(stored, dataset, inverted=kind == "MONOCHROME1"))
        return Image.fromarray(_colour(stored, dataset, kind))
    except (InvalidDicomError, BytesLengthException):
        raise BadImage("not a readable DICOM file") from None
    except AttributeError as error:  # an element that must be there is not
        raise BadImage(f"damaged DICOM file ({error})") from None


def _grey(stored_HW: np.ndarray, dataset: "Dataset", *, inverted: bool) -> np.ndarray:
    """uint8 (H, W) of stored values."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    value_HW = np.asarray(apply_modality_lut(stored_HW, dataset), dtype=np.float64)
    centre, width = (_first(dataset.get(key)) for key in ("WindowCenter", "WindowWidth"))
    tables: Any = dataset.get("VOILUTSequence")
    if centre is not None and width is not None and width > 0:
        share_HW = _window(value_HW, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    elif tables:
        looked_up_HW = apply_voi(value_HW.astype(np.int64), dataset)
        share_HW = looked_up_HW / float(2 ** int(tables[0].LUTDescriptor[2]) - 1)
    else:
        padding = dataset.get("PixelPaddingValue")
        shown = value_HW if padding is None else value_HW[stored_HW != padding]
        low, high = (shown.min(), shown.max()) if shown.size else (0.0, 0.0)
        share_HW = (value_HW - low) / (high - low) if high > low else np.zeros_like(value_HW)
    if not np.isfinite(share_HW).all():
        raise BadImage("pixels of the DICOM file are NaN or infinite")
    share_HW = np.clip(share_HW, 0.0, 1.0)
    return np.rint(255 * (1 - share_HW if inverted else share_HW)).astype(np.uint8)


def _window(value_HW: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Shares of the output range (PS3.3, C.11.2.1.2 and C.11.2.1.3); may lie outside 0..1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (value_HW - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return (value_HW - centre) / width + 0.5
    if width <= 1:  # a threshold
        return (value_HW > centre - 0.5).astype(np.float64)
    return (value_HW - (centre - 0.5)) / (width - 1) + 0.5


def _first(value: object) -> float | None:
    """The first of several windows."""
    if value is None or value == "":
        return None
    several = isinstance(value, list | tuple) or type(value).__name__ == "MultiValue"
    items: Any = value
    if several:
        return float(items[0]) if len(items) else None
    return float(items)


def _colour(stored: np.ndarray, dataset: "Dataset", kind: str) -> np.ndarray:
    """uint8 (H, W, 3); pydicom has turned YBR into RGB already."""
    from pydicom.pixels import apply_color_lut

    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = 8 * stored.dtype.itemsize
    else:
        bits = int(dataset.BitsStored)
    if stored.ndim != 3 or stored.shape[2] < 3:
        raise BadImage(f"DICOM pixels of kind {kind} are not supported")
    pixels_HWC = stored[:, :, :3].astype(np.float64)
    return np.rint(np.clip(pixels_HWC / (2**bits - 1), 0, 1) * 255).astype(np.uint8)
