"""Features of images: their order, whatever the batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from arra.evaluate.features import finite, image_features


def test_features_keep_the_order_whatever_the_batch() -> None:
    images = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(7)]

    def encoder(batch: list[Image.Image]) -> torch.Tensor:
        return torch.tensor([[float(np.asarray(image)[0, 0, 0]), 1.0] for image in batch])

    for batch_size in (1, 3, 7, 64):
        features = image_features(iter(images), encoder, batch_size=batch_size)
        assert features.dtype == np.float64
        assert features[:, 0].tolist() == list(range(7))
    with pytest.raises(ValueError, match="no images"):
        image_features([], encoder)


def test_pictures_without_finite_features_are_named():
    rows_nD = np.array([[0.0, 1.0], [np.nan, 1.0], [np.inf, 1.0]], np.float32)
    assert finite(rows_nD[:1], ["a"], "net") is not None
    with pytest.raises(ValueError, match=r"net has NaN or infinity for b and 1 more of 3"):
        finite(rows_nD, ["a", "b", "c"], "net")
