"""Features of a set of images under frozen networks.

Legend: N images, n of them at a time, D feature width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from arra.encoders import Encoder

BATCH = 64
FEATURES = "features"
"""The stream that every extractor has."""


class Extractor(Protocol):
    """A network whose outputs sets of images are compared by.

    Attributes:
        name: measures are called after it, as `fd@NAME`; `inception` is the published network of
            FID and no other.
        streams: what it gives, with the width of each: `features` always, Inception also
            `spatial` (sFID) and `logits` (Inception Score).
        described: what a report must say of it: fingerprint, resize filter, ...
        doubts: sentences that a report must warn with.
    """

    name: str
    streams: Mapping[str, int]
    described: dict[str, Any]
    doubts: Sequence[str]

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Float32 (n, D) of each stream."""
        ...


class EncoderFeatures:
    """An encoder as an extractor. It resizes images by its own preprocessing."""

    doubts: Sequence[str] = ()

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self.name = encoder, encoder.name
        self.streams: Mapping[str, int] = {FEATURES: encoder.dim}
        self.described: dict[str, Any] = describe_encoder(encoder)

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Float32 features (n, D)."""
        return {FEATURES: self._encoder(images).cpu().numpy()}


def finite(rows_nD: np.ndarray, names: Sequence[str], network: str) -> np.ndarray:
    """Features of pictures of these names; ValueError naming those that are NaN or infinite, which
    a mean would pass on to all, or leave out."""
    finite_n = np.isfinite(rows_nD).all(axis=1)
    bad = [name for name, fine in zip(names, finite_n, strict=True) if not fine]
    if bad:
        more = f" and {len(bad) - 1} more of {len(names)}" if len(bad) > 1 else ""
        raise ValueError(
            f"{network} has NaN or infinity for {bad[0]}{more}: look at the picture, and at the "
            f"network's weights and type"
        )
    return rows_nD


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """What a report says about an encoder."""
    return {
        "name": encoder.name,
        "spec": encoder.spec,
        "family": encoder.family,
        "pooling": encoder.pooling,
        "dim": encoder.dim,
        "dtype": encoder.dtype,
        "fingerprint": encoder.fingerprint,
        "resize": "the encoder's own preprocessor_config.json",
    }


def image_features(
    images: Iterable[Image.Image],
    encoder: Callable[[list[Image.Image]], torch.Tensor],
    *,
    batch_size: int = BATCH,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Features (N, D) float64 of images, in order, `batch_size` at a time.

    `encoder` maps a list of PIL images to (n, D) float32 (see arra.encoders.load_encoder); it does
    its own preprocessing. `progress` is told how many more are done. ValueError for no images.
    """
    parts: list[np.ndarray] = []
    batch: list[Image.Image] = []

    def flush() -> None:
        parts.append(encoder(batch).cpu().double().numpy())
        if progress is not None:
            progress(len(batch))
        batch.clear()

    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    if not parts:
        raise ValueError("There are no images to take features of.")
    return np.concatenate(parts)
