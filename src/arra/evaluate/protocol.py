"""`arra evaluate`: one report about two sets of images, or about a language model's text.

A distance is named after the encoder whose features it compares, `fd@NAME` and `kid@NAME`. The
name FID means one network's weights and would be wrong for any other, so it is not used here.

Legend: N, M images of the two sets, D feature width.
"""

import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import arra
from arra.config import ModelConfig
from arra.data.images import CROP, square
from arra.data.progress import Meter
from arra.device import pick_device
from arra.encoders import Encoder, load_encoder
from arra.evaluate.distances import frechet, kernel_distance, rank_deficient
from arra.evaluate.features import image_features
from arra.evaluate.images import ImageSet, load_images
from arra.evaluate.perplexity import read_documents, text_perplexity
from arra.evaluate.scenes import scene_accuracy
from arra.files import write_json
from arra.models import Backbone, load_model
from arra.models.loading import PIPELINE, load_for_training
from arra.resolve import resolve_folder

METRICS = ("fd", "kid", "scenes")


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure painted images against real ones or their prompts, or a language model on text."""

    real: str | None = None
    """Reference images: a folder, Parquet file, hub id or builtin:scenes."""
    generated: str | None = None
    """Images to judge; a folder that `arra generate` wrote brings its prompts along."""
    metrics: str = "fd,kid"
    """Comma-separated: fd, kid (distances; need --real and --encoder), scenes (reads the pixels
    of drawn scenes back and compares them with the prompts)."""
    encoder: str | None = None
    """Encoder of the distances: folder, hub id or builtin:NAME; E@class|projected|mean|both."""
    split: str | None = None
    """Split of --real, where it has several."""
    limit: int | None = None
    """Use only the first images of each set; default: all."""
    size: int | None = None
    """Pixels per side that both sets are cropped to; default: the generated images' own."""
    text: Path | None = None
    """UTF-8 file of documents, one a line or parted by blank lines: perplexity of --model on it."""
    model: str | None = None
    """Language model for --text: a run, an exported model, a language model's folder or hub id."""
    out: Path | None = None
    """Write the report to this JSON file."""
    batch_size: int = 64
    """Images per encoder call."""
    kid_subsets: int = 100
    """Random subsets that kid averages over."""
    kid_subset_size: int = 1000
    """Images in each of them; sets must have that many."""
    seed: int = 0
    """Of kid's subsets."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.metrics.split(",") if name.strip())

    def __post_init__(self) -> None:
        """Raises ValueError for a request that cannot be answered, before anything is loaded."""
        for name in self.metric_names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
        distances = [name for name in self.metric_names if name in ("fd", "kid")]
        for name in ("limit", "size", "batch_size", "kid_subsets"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.kid_subset_size < 2:
            raise ValueError("--kid-subset-size must be at least 2")
        if self.generated is None and self.text is None:
            raise ValueError("nothing to evaluate: give --generated (with --real), or --text FILE")
        if self.generated is not None and distances:
            if self.real is None:
                raise ValueError(f"--metrics {','.join(distances)} compares with --real: give it")
            if self.encoder is None:
                raise ValueError(
                    f"--metrics {','.join(distances)} needs --encoder: a folder, a hub id or "
                    f"builtin:scenes-judge (the distance is named after it)"
                )
        if self.text is not None and self.model is None:
            raise ValueError("--text needs --model: the language model whose text is judged")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs the protocol and returns the report, JSON-ready; written to `config.out` if given."""
    report: dict[str, Any] = {
        "format_version": 1,
        "metrics": {},
        "reasons": {},
        "seed": config.seed,
        "versions": versions(),
    }
    if config.generated is not None:
        _measure_images(config, report)
    if config.text is not None:
        assert config.model is not None
        backbone = load_language_model(config.model, pick_device(config.device))
        documents = read_documents(config.text)
        report["metrics"]["perplexity"] = text_perplexity(backbone, documents).to_json()
        report["text"] = {"file": str(config.text), "model": config.model}
    if config.out is not None:
        write_json(config.out, report)
    return report


def told(report: dict[str, Any]) -> str:
    """The report's values for a terminal: one line a measure, with its reason where it has one."""
    lines = []
    for name, value in report["metrics"].items():
        reason = report["reasons"].get(name)
        if name == "scenes":
            lines += [
                f"{field:<12} {found['mean']:.4f}  ({found['low']:.4f} to {found['high']:.4f}, "
                f"n {found['n']})"
                for field, found in value.items()
                if found is not None
            ]
        elif name == "perplexity":
            lines.append(
                f"perplexity   {value['perplexity']:.4f}  ({value['bits_per_byte']:.4f} bits a "
                f"byte, {value['tokens']} tokens)"
            )
        else:
            shown = "null" if value is None else f"{value:.6g}"
            lines.append(f"{name}  {shown}" + (f"  ({reason})" if reason else ""))
    return "\n".join(lines)


def load_language_model(spec: str, device: str) -> Backbone:
    """A painter, or a language model that never learned to paint, ready for `text_perplexity`.

    The latter is grown in memory by a single code, which changes no text logit, so that both are
    read through the same protocol.
    """
    if (resolve_folder(spec, "model") / PIPELINE).is_file():
        return load_model(spec, device)
    backbone = load_for_training(
        spec, ModelConfig(), codebook_KC=torch.zeros(1, 1), captions=(), seed=0
    )
    module: torch.nn.Module = backbone.model
    module.to(device)
    return backbone


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "arra": arra.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "pillow": Image.__version__,
        "python": platform.python_version(),
    }


def _measure_images(config: EvaluateConfig, report: dict[str, Any]) -> None:
    assert config.generated is not None
    limit = config.limit
    generated = load_images(config.generated, limit=limit)
    report["generated"] = _describe(generated)
    if "scenes" in config.metric_names:
        if generated.captions is None:
            raise ValueError(
                f"{config.generated} has no prompts, which the metric 'scenes' reads: give a "
                f"folder written by `arra generate` (it holds images.jsonl)"
            )
        report["metrics"]["scenes"] = scene_accuracy(generated.images, generated.captions)
    if not {"fd", "kid"} & set(config.metric_names):
        return
    assert config.real is not None
    assert config.encoder is not None
    real = load_images(config.real, split=config.split, limit=limit)
    report["real"] = _describe(real) | {"split": config.split}
    size = config.size or _common_side(generated)
    encoder = load_encoder(config.encoder, device=pick_device(config.device))
    report["encoder"] = describe_encoder(encoder, config.encoder)
    report["preprocessing"] = {
        "size": size,
        "crop": CROP,
        "then": "the encoder's own preprocessor_config.json",
    }
    sets = []
    with Meter("evaluate", len(real) + len(generated)) as meter:
        for images in (real, generated):
            cropped = (square(image, size) for image in images.images)
            sets.append(
                image_features(cropped, encoder, batch_size=config.batch_size, progress=meter.add)
            )
    values, reasons = distances_at(
        encoder.name,
        sets[0],
        sets[1],
        metrics=config.metric_names,
        subsets=config.kid_subsets,
        subset_size=config.kid_subset_size,
        seed=config.seed,
    )
    report["metrics"] |= values
    report["reasons"] |= reasons


def distances_at(
    name: str,
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    *,
    metrics: tuple[str, ...] = ("fd", "kid"),
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, str]]:
    """(values, reasons) of fd and kid between features of the encoder called `name`.

    A value that the number of images cannot support is None and its reason is given; a value that
    it supports only in part (a singular covariance) is given together with a reason for caution.
    """
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    counts = (len(real_ND), len(generated_MD))
    if "fd" in metrics:
        key = f"fd@{name}"
        if min(counts) < 2:
            values[key] = None
            reasons[key] = (
                f"needs at least 2 images in each set, there are {counts[0]}, {counts[1]}"
            )
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # said in `reasons` instead
                values[key] = frechet(real_ND, generated_MD)
            if rank_deficient(*counts, real_ND.shape[1]):
                reasons[key] = (
                    f"rank deficient: {counts[0]} and {counts[1]} images for {real_ND.shape[1]} "
                    f"dimensions; compare only at equal numbers of images"
                )
    if "kid" in metrics:
        key = f"kid@{name}"
        if min(counts) < max(subset_size, 2):
            values[key] = None
            reasons[key] = (
                f"subsets of {subset_size} images need that many in each set, there are "
                f"{counts[0]}, {counts[1]}; a smaller --kid-subset-size can be set"
            )
        else:
            distance = kernel_distance(
                real_ND, generated_MD, subsets=subsets, subset_size=subset_size, seed=seed
            )
            values[key] = distance.mean
            values[f"kid_std@{name}"] = distance.std
    return values, reasons


def describe_encoder(encoder: Encoder, spec: str) -> dict[str, Any]:
    """What the report says about the encoder."""
    return {
        "name": encoder.name,
        "spec": spec,
        "pooling": encoder.pooling,
        "dim": encoder.dim,
        "fingerprint": encoder.fingerprint,
    }


def _describe(images: ImageSet) -> dict[str, Any]:
    return {"source": images.source, "n": len(images), "sizes": [list(s) for s in images.sizes[:9]]}


def _common_side(generated: ImageSet) -> int:
    sides = {min(size) for size in generated.sizes}
    if len(sides) != 1:
        raise ValueError(
            f"the images of {generated.source} have several sizes, from {min(sides)} to "
            f"{max(sides)} pixels: say with --size to which both sets are cropped"
        )
    return sides.pop()
