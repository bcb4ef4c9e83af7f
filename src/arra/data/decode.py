"""The first stage of prepare: source rows to pixels, without a model and without a device.

Legend: N images, C = 3 channels, H and W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from arra.data.images import BadImage, load_rgb, square, to_uint8
from arra.data.sources import Record, Reject, Scalar
from arra.encoders.preprocessing import Pixels


@dataclass(frozen=True)
class Decoded:
    """One row's picture as every model is to see it.

    Attributes:
        id, text, row, extra: as in `sources.Record`.
        pixels_CHW: uint8 (3, H, W), what the image tokenizer encodes.
        seen: feature name -> the same picture after that encoder's own preprocessing.
    """

    id: str
    text: str
    row: int
    pixels_CHW: torch.Tensor
    seen: Mapping[str, torch.Tensor]
    extra: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoder:
    """Decodes, crops once, and preprocesses for each encoder. Can be sent to another process.

    Attributes:
        size: pixels per side of the square.
        preprocessing: by feature name, each encoder's own.
    """

    size: int
    preprocessing: Mapping[str, Pixels]

    def __call__(self, rows: Sequence[Record | Reject]) -> list[Decoded | Reject]:
        """One item per row, in order: a picture, or why there is none."""
        images = [self._square(row) for row in rows]
        good = [image for image in images if isinstance(image, Image.Image)]
        # Preprocessing works image by image: groups only save its overhead, up to two thirds.
        seen = {n: iter(each(good)) for n, each in self.preprocessing.items()} if good else {}
        done: list[Decoded | Reject] = []
        for row, image in zip(rows, images, strict=True):
            if isinstance(image, Reject):
                done.append(image)
                continue
            assert isinstance(row, Record)
            pixels_CHW = to_uint8([image])[0]
            views = {name: next(each) for name, each in seen.items()}
            done.append(Decoded(row.id, row.text, row.row, pixels_CHW, views, row.extra))
        return done

    def _square(self, row: Record | Reject) -> Image.Image | Reject:
        if isinstance(row, Reject):
            return row
        try:
            return square(load_rgb(row.image), self.size)
        except BadImage as error:
            return Reject(row.row, row.id, error.reason)
