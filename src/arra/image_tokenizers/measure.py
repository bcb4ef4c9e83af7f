"""How much of an image survives a tokenizer: distances, PSNR, SSIM, codebook use, and a picture.

A painter cannot be better than its tokenizer, so these numbers come before any training.

Legend: N images, H and W pixels, h and w cells, K codes, C channels; uint8 NCHW, 0..255.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from arra.data.images import BadImage, grid, load_rgb, square, to_pil, to_uint8
from arra.data.sources import Reject, Source, open_source
from arra.device import pick_device
from arra.encoders import load_encoder
from arra.evaluate.distances import distances_at
from arra.evaluate.features import describe_encoder, image_features
from arra.evaluate.report import versions
from arra.evaluate.scenes import scene_verdicts, summarise
from arra.files import atomic_write, write_json
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.probe import LEAST, code_readings, explained

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""Pixels: side and spread of the Gaussian window (Wang et al. 2004, section III.C)."""


@dataclass(frozen=True)
class MeasureConfig:
    """Measure what TOKENIZER keeps of the images of SOURCE."""

    tokenizer: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TOKENIZER")]
    """Folder, hub id or builtin:scenes."""
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder, file, hub id or builtin:scenes."""
    out: str
    """Folder of report.json and reconstructions.png."""
    split: str | None = None
    """Split to read; train, or the only one, unless given."""
    image_column: str = "image"
    """Column that holds the images."""
    text_column: str = "text"
    """Column that holds the captions."""
    limit: int = 1000
    """Measure the first so many images."""
    size: int = 0
    """Pixels of the side of the squares; 0 = what the tokenizer was fitted on."""
    encoder: str | None = None
    """Encoder of the reconstruction distance, NAME[@pooling]; without one it is left out."""
    probe: str | None = None
    """Encoder E or E@POOLING: how much of its feature of an image a linear map reads from the
    codes (probe_vectors, probe_counts: R^2 on held-out images); without one it is left out."""
    scenes: bool = False
    """Also read the reconstructed scenes back and compare them with their captions."""
    pictures: int = 12
    """Images shown in reconstructions.png, originals above reconstructions."""
    batch_size: int = 32
    """Images that are coded together."""
    device: str = "auto"
    """Where tokenizer and encoder run: auto (cuda if there is one), cpu, cuda, cuda:1, …"""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


def measure_tokenizer(config: MeasureConfig) -> dict[str, Any]:
    """Measures, writes `out/report.json` and `out/reconstructions.png`, returns the report.

    A value that cannot be had is None in `metrics`, with its reason in `reasons`.

    Raises:
        ValueError: a size the tokenizer cannot take, or an image that cannot be read (leaving it
            out would make the numbers those of another set).
    """
    device = pick_device(config.device)
    tokenizer = load_image_tokenizer(config.tokenizer, device=device)
    size = config.size or tokenizer.image_size
    source = open_source(
        config.source,
        split=config.split,
        text_column=config.text_column,
        image_column=config.image_column,
        limit=config.limit,
    )
    encoder = load_encoder(config.encoder, device=device) if config.encoder else None
    probed = load_encoder(config.probe, device=device) if config.probe else None
    parts: dict[str, list[Any]] = {
        name: []
        for name in (
            *("real", "rebuilt", "psnr", "ssim", "original_scenes", "scenes"),
            *("vectors", "counts", "probed"),
        )
    }
    uses_K = torch.zeros(tokenizer.codebook_size)
    shown: list[tuple[Image.Image, Image.Image]] = []
    seconds = {"encode": 0.0, "decode": 0.0}
    count = 0
    for images, texts in _batches(source, size, config.batch_size):
        pixels_NCHW = to_uint8(images)
        codes_NHW = _timed(seconds, "encode", tokenizer.encode, pixels_NCHW)
        rebuilt_NCHW = _timed(seconds, "decode", tokenizer.decode, codes_NHW).cpu()
        rebuilt = to_pil(rebuilt_NCHW)
        count += len(images)
        uses_K += torch.bincount(codes_NHW.flatten().cpu(), minlength=len(uses_K))
        parts["psnr"].append(psnr(rebuilt_NCHW, pixels_NCHW))
        if size >= SSIM_WINDOW:
            parts["ssim"].append(ssim(rebuilt_NCHW, pixels_NCHW))
        if encoder is not None:
            parts["real"].append(image_features(images, encoder))
            parts["rebuilt"].append(image_features(rebuilt, encoder))
        if probed is not None:
            parts["probed"].append(image_features(images, probed))
            for name, reading in code_readings(codes_NHW, tokenizer.codebook).items():
                parts[name].append(reading)
        if config.scenes:
            parts["original_scenes"].append(scene_verdicts(images, texts))
            parts["scenes"].append(scene_verdicts(rebuilt, texts))
        shown += zip(images, rebuilt, strict=True)
        del shown[config.pictures :]
    report: dict[str, Any] = {
        "config": asdict(config),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "codebook_size": tokenizer.codebook_size,
            "factor": tokenizer.factor,
            "codes_per_image": (size // tokenizer.factor) ** 2,
        },
        "source": {"name": source.name, "split": source.split, "images": count, "size": size},
        "encoder": describe_encoder(encoder) if encoder else None,
        "probe": describe_encoder(probed) if probed else None,
        "metrics": {},
        "reasons": {},
        "images_per_s": {name: round(count / spent, 1) for name, spent in seconds.items()},
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    _pixel_metrics(parts, report)
    _codebook_metrics(uses_K, report)
    _feature_metrics(parts, encoder.name if encoder else None, report)
    _probe_metrics(parts, report)
    for name in ("original_scenes", "scenes") if config.scenes else ():
        joined = {key: np.concatenate([p[key] for p in parts[name]]) for key in parts[name][0]}
        report["metrics"][name] = summarise(joined)
    out = Path(config.out)
    write_json(out / "report.json", report)
    with atomic_write(out / "reconstructions.png") as temporary:
        _side_by_side(shown).save(temporary, format="PNG")
    print(_summary(report, out))
    return report


def psnr(a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of uint8 images; infinite where they are equal."""
    error_N = (a_NCHW.double() - b_NCHW.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error_N)


def ssim(a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
    """Structural similarity (N,) of uint8 images, mean over channels and positions.

    Wang et al. 2004 (10.1109/TIP.2003.819861, eq. 13, section III.C): Gaussian window, K1 = 0.01,
    K2 = 0.03, positions where the window lies inside the image.
    """
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64) - (SSIM_WINDOW - 1) / 2
    line = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    window = (line[:, None] * line[None, :])[None, None]

    def smooth(x_NCHW: Tensor) -> Tensor:
        return F.conv2d(x_NCHW.flatten(0, 1)[:, None], window).view(len(x_NCHW), -1)

    a_NCHW, b_NCHW = a_NCHW.double(), b_NCHW.double()
    mean_a, mean_b = smooth(a_NCHW), smooth(b_NCHW)
    variance_a = smooth(a_NCHW**2) - mean_a**2
    variance_b = smooth(b_NCHW**2) - mean_b**2
    covariance = smooth(a_NCHW * b_NCHW) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean(dim=1)


def _batches(
    source: Source, size: int, count: int
) -> Iterator[tuple[list[Image.Image], list[str]]]:
    for start in range(0, len(source), count):
        images, texts = [], []
        for record in source.read(start, min(start + count, len(source))):
            if isinstance(record, Reject):
                raise ValueError(f"{source.name}, row {record.row}: {record.reason}; remove it")
            try:
                images.append(square(load_rgb(record.image), size))
            except BadImage as error:
                raise ValueError(f"{source.name}, {record.id}: {error.reason}; remove it") from None
            texts.append(record.text)
        yield images, texts


def _timed(seconds: dict[str, float], name: str, function: Any, argument: Tensor) -> Tensor:
    began = time.perf_counter()
    result = function(argument)
    if result.is_cuda:
        torch.cuda.synchronize()
    seconds[name] += time.perf_counter() - began
    return result


def _pixel_metrics(parts: dict[str, list[Any]], report: dict[str, Any]) -> None:
    metrics, reasons = report["metrics"], report["reasons"]
    psnr_N = torch.cat(parts["psnr"])
    differing_N = psnr_N[psnr_N.isfinite()]
    metrics["psnr"] = float(differing_N.mean()) if len(differing_N) else None
    if len(differing_N) < len(psnr_N):
        exact = len(psnr_N) - len(differing_N)
        reasons["psnr"] = f"infinite for {exact} of {len(psnr_N)} images, which are exact"
    metrics["ssim"] = float(torch.cat(parts["ssim"]).mean()) if parts["ssim"] else None
    if not parts["ssim"]:
        reasons["ssim"] = f"the images are smaller than its window of {SSIM_WINDOW} pixels"


def _codebook_metrics(uses_K: Tensor, report: dict[str, Any]) -> None:
    """Share of codes that occur, and exp(entropy): how many equally used codes say as much."""
    share_K = (uses_K / uses_K.sum()).double()
    entropy = -(share_K * share_K.clamp(min=1e-300).log()).sum()
    report["metrics"]["codes_used"] = float((uses_K > 0).double().mean())
    report["metrics"]["code_perplexity"] = float(entropy.exp())


def _feature_metrics(
    parts: dict[str, list[Any]], encoder: str | None, report: dict[str, Any]
) -> None:
    if encoder is None:
        report["metrics"]["fd"] = None
        report["reasons"]["fd"] = "no encoder was named (--encoder)"
        return
    values, reasons = distances_at(
        encoder, np.concatenate(parts["real"]), np.concatenate(parts["rebuilt"])
    )
    report["metrics"] |= values
    report["reasons"] |= reasons


def _probe_metrics(parts: dict[str, list[Any]], report: dict[str, Any]) -> None:
    if not parts["probed"]:
        return
    feature_NE = np.concatenate(parts["probed"])
    for name in ("vectors", "counts"):
        value = explained(np.concatenate(parts[name]), feature_NE)
        report["metrics"][f"probe_{name}"] = value
        if value is None:
            reason = f"the probe needs {LEAST} images whose features differ"
            report["reasons"][f"probe_{name}"] = reason


def _side_by_side(shown: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Pairs of rows: originals above, reconstructions below; small images are enlarged."""
    columns = min(len(shown), 6)
    cells: list[Image.Image] = []
    for start in range(0, len(shown), columns):
        row = shown[start : start + columns]
        side = row[0][0].width
        scale = max(1, 128 // side)
        for which in (0, 1):
            line = [
                pair[which].resize((side * scale,) * 2, Image.Resampling.NEAREST) for pair in row
            ]
            cells += line + [Image.new("RGB", line[0].size, "white")] * (columns - len(line))
    return grid(cells, columns)


def _summary(report: dict[str, Any], out: Path) -> str:
    words = []
    for name, value in report["metrics"].items():
        if isinstance(value, dict):
            value = value["all_right"]["mean"] if value["all_right"] else None
            name = f"{name} all right"
        words.append(f"{name} {'-' if value is None else f'{value:.4g}'}")
    return f"{', '.join(words)}; see {out}"
