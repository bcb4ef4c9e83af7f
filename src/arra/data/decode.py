"""The first stage of prepare: source rows to pixels, without a model and without a device.

Legend: N images, C = 3 channels, H and W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from arra.data.framing import Framing
from arra.data.images import MIN_SIDE, BadImage, load_rgb, to_uint8
from arra.data.sources import Record, Reject, Scalar
from arra.encoders.preprocessing import Pixels

_WHOLE = ""


@dataclass(frozen=True)
class Decoded:
    """One row's picture as every model is to see it.

    Attributes:
        id, text, row, extra: as in `sources.Record`.
        pixels_CHW: uint8 (3, H, W), what the image tokenizer encodes.
        seen: feature name -> the same picture after that encoder's own preprocessing.
        views: further frames of the same picture and caption; their ids are `ID#VIEW`.
        view_of: for such a view, the row's own id.
    """

    id: str
    text: str
    row: int
    pixels_CHW: torch.Tensor
    seen: Mapping[str, torch.Tensor]
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    views: tuple["Decoded", ...] = ()
    view_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Of all its pictures, in main memory."""
        own = self.pixels_CHW.nbytes + sum(value.nbytes for value in self.seen.values())
        return own + sum(view.nbytes for view in self.views)


@dataclass(frozen=True)
class Decoder:
    """Decodes, frames once, and preprocesses for each encoder. Can be sent to another process.

    Attributes:
        framing: what of a picture is seen, and its views.
        preprocessing: by feature name, each encoder's own.
    """

    framing: Framing
    preprocessing: Mapping[str, Pixels]

    def __call__(self, rows: Sequence[Record | Reject]) -> list[Decoded | Reject]:
        """One item per row, in order: a picture, or why there is none."""
        framed = [self._frames(row) for row in rows]
        good = [image for frames in framed if isinstance(frames, dict) for image in frames.values()]
        # Preprocessing works image by image: groups only save its overhead, up to two thirds.
        seen = {n: iter(each(good)) for n, each in self.preprocessing.items()} if good else {}
        done: list[Decoded | Reject] = []
        for row, frames in zip(rows, framed, strict=True):
            if isinstance(frames, Reject):
                done.append(frames)
                continue
            assert isinstance(row, Record)
            items = {}
            for view, image in frames.items():
                of_encoders = {name: next(each) for name, each in seen.items()}
                pixels_CHW = to_uint8([image])[0]
                items[view] = Decoded(row.id, row.text, row.row, pixels_CHW, of_encoders, row.extra)
            whole = items.pop(_WHOLE)
            views = [
                replace(item, id=f"{row.id}#{view}", view_of=row.id) for view, item in items.items()
            ]
            done.append(replace(whole, views=tuple(views)))
        return done

    def blank(self) -> Decoded:
        """A black picture, to learn from it how large pictures are, and how fast the models."""
        side = max(self.framing.size, self.framing.min_side, MIN_SIDE)
        (item,) = self([Record("blank", Image.new("RGB", (side, side)), "blank")])
        assert isinstance(item, Decoded)
        return item

    def _frames(self, row: Record | Reject) -> dict[str, Image.Image] | Reject:
        """The row's own frame, called _WHOLE, and its views by name."""
        if isinstance(row, Reject):
            return row
        try:
            image = load_rgb(row.image)
            frame = self.framing.frame(image)
            return {_WHOLE: frame, **self.framing.views_of(image, row.text, frame)}
        except BadImage as error:
            return Reject(row.row, row.id, error.reason)
