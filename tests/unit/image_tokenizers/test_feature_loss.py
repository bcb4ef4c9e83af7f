"""The feature loss: preprocessing like the encoder's own, gradients into the pixels only."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from arra.encoders import load_encoder
from arra.image_tokenizers.feature_loss import FeatureLoss
from arra.image_tokenizers.fit import TokenizerConfig, fit_tokenizer
from arra.image_tokenizers.vq import to_floats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, intermediate_size=32, image_size=16, patch_size=8))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    mean, std = [0.2, 0.4, 0.6], [0.3, 0.2, 0.1]
    size = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=size, image_mean=mean, image_std=std).save_pretrained(path)
    return path


def test_sees_what_the_encoder_sees(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    x_NCHW = to_floats(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    encoder = load_encoder(str(folder))
    inputs = encoder.preprocess([Image.fromarray(image) for image in pixels])
    states = encoder.model(pixel_values=inputs, output_hidden_states=True).hidden_states
    found = FeatureLoss(str(folder), torch.device("cpu"))._features(x_NCHW)
    assert len(found) == 4
    for layer, features_NLd in enumerate(found, start=1):
        unit = torch.nn.functional.normalize(states[layer], dim=-1)
        assert torch.allclose(features_NLd, unit, atol=1e-5)


def test_zero_on_equal_images_and_gradient_into_the_pixels_only(folder: Path) -> None:
    loss = FeatureLoss(str(folder), torch.device("cpu"))
    x_NCHW = torch.rand(2, 3, 24, 24) * 1.8 - 0.9  # resized, and within the range that is clipped
    assert float(loss(x_NCHW, x_NCHW)) == 0
    moved = (0.9 * x_NCHW).requires_grad_(True)
    value = loss(moved, x_NCHW)
    value.backward()
    assert value > 0
    assert moved.grad is not None
    assert moved.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())


def test_a_fit_with_it_logs_it(folder: Path, tmp_path: Path) -> None:
    out = fit_tokenizer(
        TokenizerConfig(
            source="builtin:scenes",
            out=str(tmp_path / "out"),
            limit=8,
            steps=2,
            batch_size=2,
            base_channels=8,
            codebook_size=16,
            feature_encoder=str(folder),
        )
    )
    assert '"feature": 0.' in (out / "log.jsonl").read_text()
