"""The feature loss: preprocessing like the encoder's own, gradients into the pixels only."""

import sys
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

sys.path.insert(0, str(Path(__file__).parents[1] / "encoders"))
import test_encoders
import test_families
import test_open_clip

FAMILIES = {
    **{name: getattr(test_encoders, name) for name in ("clip", "dinov2", "registers", "vit")},
    **test_families.MAKERS,
}


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


@pytest.mark.parametrize("name", [*FAMILIES, "biomedclip", "open_clip"])
def test_every_family_shows_its_layers(name: str, tmp_path: Path) -> None:
    if name == "biomedclip":
        test_open_clip.published(tmp_path, test_open_clip.timm_shapes(), test_open_clip.TIMM)
    elif name == "open_clip":
        test_open_clip.published(tmp_path, test_open_clip.own_shapes(), test_open_clip.OWN)
    else:
        FAMILIES[name](tmp_path)[0].save_pretrained(tmp_path)
    loss = FeatureLoss(str(tmp_path), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x_NCHW = torch.rand(2, 3, 40, 40, generator=generator) * 1.6 - 0.8
    for layer_NLd in loss._features(x_NCHW):
        assert layer_NLd.ndim == 3
        assert torch.allclose(layer_NLd.norm(dim=-1), torch.ones(()), atol=1e-4)
    y_NCHW = (0.8 * x_NCHW).requires_grad_(True)
    value = loss(y_NCHW, x_NCHW)
    value.backward()
    assert 0 < float(value.detach()) <= 4
    assert y_NCHW.grad is not None
    assert float(loss(x_NCHW, x_NCHW)) == 0
    # every quarter of the picture counts: nothing is cut off or hidden
    for rows, columns in ((0, 0), (0, 20), (20, 0), (20, 20)):
        assert y_NCHW.grad[:, :, rows : rows + 20, columns : columns + 20].abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert float(loss(y_NCHW, x_NCHW).detach()) == pytest.approx(float(value.detach()), rel=0.2)


def test_a_function_shows_no_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flat_encoder.py").write_text(
        "import torch\n"
        "def encoder():\n"
        "    mean = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
        "    return mean, lambda image: torch.full((3, 8, 8), image.getpixel((0, 0))[0] / 255)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="--feature-encoder flat_encoder:encoder: a function's"):
        FeatureLoss("flat_encoder:encoder", torch.device("cpu"))
