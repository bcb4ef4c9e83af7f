"""Measuring a tokenizer: PSNR, SSIM, distances, codebook use, the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from arra.image_tokenizers import measure
from arra.image_tokenizers.measure import MeasureConfig, measure_tokenizer, psnr, ssim
from arra.image_tokenizers.vq import VQConfig, VQModel


def pairs(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three smooth pictures and noisy copies, uint8 NCHW."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (3, 3, 5, 5), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noisy = smooth + 20 * torch.randn(smooth.shape, generator=generator)
    return smooth.round().to(torch.uint8), noisy.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("side", [11, 40])
def test_psnr_and_ssim_are_those_of_torchmetrics(side: int) -> None:
    clean, noisy = pairs(side)
    for i in range(3):
        a, b = noisy[i : i + 1], clean[i : i + 1]
        expected = peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0)
        assert float(psnr(a, b)) == pytest.approx(float(expected), abs=1e-6)
    # torchmetrics also scores a border of half a window, filled by reflection; Wang et al. do not
    _, full = structural_similarity_index_measure(
        noisy.double(), clean.double(), data_range=255.0, return_full_image=True
    )
    expected = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    assert ssim(noisy, clean).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert ssim(clean, clean).tolist() == pytest.approx([1.0] * 3)
    assert psnr(clean, clean).isinf().all()


class Perfect(VQModel):
    """Loses nothing: it hands out numbers and keeps the pictures."""

    def encode(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        self.kept = pixels_NCHW
        return torch.arange(4).expand(len(pixels_NCHW), 4).view(-1, 2, 2)

    def decode(self, codes_NHW: torch.Tensor) -> torch.Tensor:
        return self.kept


class Tiny:
    """An encoder of nine numbers."""

    name, spec, pooling, dim, fingerprint, family = "tiny", "tiny", "class", 9, "0", "none"
    dtype = "float32"

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        rows = [np.asarray(image)[::24, ::24, 0].ravel() for image in images]
        return torch.from_numpy(np.stack(rows)).float()


def tiny_model(kind: type[VQModel] = VQModel) -> VQModel:
    torch.manual_seed(0)
    sizes = {"channel_multipliers": [1], "base_channels": 8, "norm_groups": 4, "z_channels": 4}
    return kind(
        VQConfig(image_size=64, patch_size=8, codebook_size=16, codebook_dim=4, **sizes)
    ).eval()


def test_identical_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "load_image_tokenizer", lambda *_, **__: tiny_model(Perfect))
    monkeypatch.setattr(measure, "load_encoder", lambda *_, **__: Tiny())
    report = measure_tokenizer(
        MeasureConfig("t", "builtin:scenes", str(tmp_path), limit=30, encoder="tiny", scenes=True)
    )
    metrics = report["metrics"]
    assert metrics["fd@tiny"] == pytest.approx(0, abs=1e-6)
    assert metrics["psnr"] is None
    assert "infinite for 30 of 30" in report["reasons"]["psnr"]
    assert metrics["ssim"] == pytest.approx(1)
    assert metrics["codes_used"] == 4 / 16
    assert metrics["code_perplexity"] == pytest.approx(4)
    assert metrics["scenes"] == metrics["original_scenes"]
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_report_and_picture(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    report = measure_tokenizer(
        MeasureConfig(str(tmp_path / "model"), "builtin:scenes", str(out), limit=5, batch_size=2)
    )
    assert report["source"]["images"] == 5
    assert report["metrics"]["fd"] is None
    assert "--encoder" in report["reasons"]["fd"]
    assert 0 < report["metrics"]["psnr"] < 40
    assert report["tokenizer"]["codes_per_image"] == 64
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.height > 2 * 128


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    source = tmp_path / "pictures"
    source.mkdir()
    (source / "a.png").write_bytes(b"junk")
    (source / "a.txt").write_text("junk")
    with pytest.raises(ValueError, match="not an image"):
        measure_tokenizer(MeasureConfig(str(tmp_path / "model"), str(source), str(tmp_path / "o")))
    with pytest.raises(ValueError, match="multiples of 8"):
        measure_tokenizer(
            MeasureConfig(str(tmp_path / "model"), "builtin:scenes", str(tmp_path / "o"), size=60)
        )
    with pytest.raises(ValueError, match="--limit must be at least 1"):
        MeasureConfig("t", "s", "o", limit=0)
