"""From source rows to the rows of one shard: decode, crop once, encode in batches.

Legend: N images, D feature width, n tokens of a caption, h and w code rows and columns, H and W
pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from arra.data.images import BadImage, load_rgb, square, to_uint8
from arra.data.plan import Unit
from arra.data.shards import Row, arrow_type, bad_feature, stored_name
from arra.data.sources import Record, Reject
from arra.encoders import Encoder
from arra.encoders.text import TextEncoder
from arra.image_tokenizers.interface import ImageTokenizer

GROUP = 8
"""Images that one task of the pool decodes."""


@dataclass(frozen=True)
class _Decoded:
    """One square, and what each encoder's own preprocessing makes of it."""

    record: Record
    image: Image.Image
    pixels: dict[str, torch.Tensor]


class Worker:
    """Makes the rows of one unit after another.

    Args:
        tokenizer, encoders: what each square goes through, encoders by feature name.
        size: pixels per side of the square.
        batch_size: images per pass; batches never cross a unit.
        device: where tokenizer and encoders are.
        pool: threads that decode and preprocess.
        text_encoders: what each caption goes through, by feature name.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        encoders: Mapping[str, Encoder],
        size: int,
        batch_size: int,
        device: str,
        pool: ThreadPoolExecutor,
        text_encoders: Mapping[str, TextEncoder],
    ) -> None:
        self.tokenizer, self.encoders, self.size = tokenizer, encoders, size
        self.batch_size, self.device, self.pool = batch_size, device, pool
        self.text_encoders = text_encoders
        self.dims = {name: encoder.dim for name, encoder in encoders.items()}
        self.text_dims = {name: encoder.dim for name, encoder in text_encoders.items()}

    def make(
        self, unit: Unit, progress: Callable[[int, int], None]
    ) -> tuple[list[Row], list[Reject]]:
        """The usable rows of a unit in order, and the others with their reasons.

        `progress` is told how many source rows are done and how many of them were left out.
        """
        rows: list[Row] = []
        rejects: list[Reject] = []
        batch: list[_Decoded] = []
        told = 0

        def flush() -> None:
            nonlocal told
            good, bad = self._encode(batch)
            rows.extend(good)
            rejects.extend(bad)
            batch.clear()
            progress(len(rows) + len(rejects) - told, 0)
            told = len(rows) + len(rejects)

        for item in self._decoded(unit):
            if isinstance(item, Reject):
                rejects.append(item)
                continue
            batch.append(item)
            if len(batch) == self.batch_size:
                flush()
        if batch:
            flush()
        progress(unit.stop - unit.start - told, len(rejects))
        rejects.sort(key=lambda reject: reject.row)
        return rows, rejects

    def _decoded(self, unit: Unit) -> Iterator[_Decoded | Reject]:
        """Decodes ahead in the pool, about two batches, and keeps the order."""
        waiting: deque[Future[list[_Decoded | Reject]]] = deque()
        items = unit.source.read(unit.start, unit.stop)
        while group := list(islice(items, GROUP)):
            waiting.append(self.pool.submit(self._decode, group))
            if len(waiting) * GROUP > 2 * self.batch_size:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _decode(self, group: list[Record | Reject]) -> list[_Decoded | Reject]:
        images = [self._square(item) for item in group]
        good = [image for image in images if isinstance(image, Image.Image)]
        # Preprocessing works image by image: groups only save its overhead, up to two thirds.
        pixels = {n: iter(e.pixels(good)) for n, e in self.encoders.items()} if good else {}
        done: list[_Decoded | Reject] = []
        for item, image in zip(group, images, strict=True):
            if isinstance(image, Reject):
                done.append(image)
                continue
            assert isinstance(item, Record)
            done.append(_Decoded(item, image, {n: next(each) for n, each in pixels.items()}))
        return done

    def _square(self, item: Record | Reject) -> Image.Image | Reject:
        if isinstance(item, Reject):
            return item
        try:
            return square(load_rgb(item.image), self.size)
        except BadImage as error:
            return Reject(item.row, item.id, error.reason)

    def _encode(self, batch: list[_Decoded]) -> tuple[list[Row], list[Reject]]:
        pixels_NCHW = to_uint8([item.image for item in batch])
        codes_Nhw = self.tokenizer.encode(pixels_NCHW.to(self.device)).cpu().numpy()
        assert codes_Nhw.ndim == 3
        assert len(codes_Nhw) == len(batch)
        features_ND: dict[str, np.ndarray] = {}
        for name, encoder in self.encoders.items():
            seen_NCHW = torch.stack([item.pixels[name] for item in batch])
            value_ND = encoder.pool(seen_NCHW.to(self.device)).to(torch.float16).cpu().numpy()
            assert value_ND.shape == (len(batch), encoder.dim)
            features_ND[name] = value_ND
        captions = [item.record.text for item in batch]
        texts = {name: encoder(captions) for name, encoder in self.text_encoders.items()}
        rows: list[Row] = []
        rejects: list[Reject] = []
        for position, item in enumerate(batch):
            features = {name: value[position] for name, value in features_ND.items()}
            texts_nD = {name: value[position].numpy() for name, value in texts.items()}
            reason = _bad_row(item.record, features, texts_nD)
            if reason is None:
                rows.append(_row(item.record, codes_Nhw[position], features, texts_nD))
            else:
                rejects.append(Reject(item.record.row, item.record.id, reason))
        return rows, rejects


def _bad_row(
    record: Record, features: Mapping[str, np.ndarray], texts_nD: Mapping[str, np.ndarray]
) -> str | None:
    for name, feature_D in features.items():
        reason = bad_feature(feature_D)
        if reason is not None:
            return f"feature {name!r} is {reason} in float16"
    for name, text_nD in texts_nD.items():
        if not np.isfinite(text_nD).all():
            return f"text feature {name!r} is NaN or infinite in float16"
    index = record.extra.get("image_index")
    if isinstance(index, int) and not 0 <= index < 2**15:
        return f"image_index {index} is not between 0 and {2**15 - 1}"
    return None


def _row(
    record: Record,
    codes_hw: np.ndarray,
    features: Mapping[str, np.ndarray],
    texts_nD: Mapping[str, np.ndarray],
) -> Row:
    sample, index = record.extra.get("sample"), record.extra.get("image_index")
    return Row(
        id=record.id,
        sample=record.id if sample is None else str(sample),
        image_index=index if isinstance(index, int) else 0,
        text=record.text,
        codes_hw=codes_hw,
        features=features,
        extra=record.extra,
        text_features=texts_nD,
    )


def shard_columns(columns: Mapping[str, type]) -> dict[str, type]:
    """A source's extra columns as a shard stores them; `sample` and `image_index` are the format's
    own, by which a source says that several rows belong together."""
    taken = {"sample"} | ({"image_index"} if columns.get("image_index") is int else set())
    return {name: kind for name, kind in columns.items() if name not in taken}


def manifest_columns(columns: Mapping[str, type]) -> dict[str, Any]:
    """Names and types of extra columns as the manifest lists them."""
    return {stored_name(n): str(arrow_type(k)) for n, k in shard_columns(columns).items()}
