"""`arra evaluate`: one report about two sets of images, or about a language model's text.

A distance is named after the encoder whose features it compares, `fd@NAME` and `kid@NAME`. The
name FID means one network's weights and would be wrong for any other, so it is not used here.
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
from arra.data.images import square
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
    """What to measure.

    Attributes:
        real: the reference images: a folder, Parquet file, hub id or builtin:scenes.
        generated: the images to judge; a folder of `arra generate` brings its prompts along.
        metrics: comma-separated: fd, kid (distances, need `real` and `encoder`), scenes.
        encoder: encoder folder, hub id or builtin:NAME; NAME@class|projected|mean|both pools.
        split: split of `real`, where it has several.
        limit: use only the first images of each set (0: all).
        size: pixels per side that both sets are cropped to (0: the generated images' own).
        text: UTF-8 file of documents; reports the perplexity of `model` on it.
        model: language model for `text`: a run, an exported folder, a local folder or a hub id.
        out: write the report to this JSON file.
        batch_size: images per encoder call.
        kid_subsets, kid_subset_size: how the kernel distance samples.
        seed: of the kernel distance's subsets.
        device: where encoder and model run.
    """

    real: str | None = None
    generated: str | None = None
    metrics: str = "fd,kid"
    encoder: str | None = None
    split: str | None = None
    limit: int = 0
    size: int = 0
    text: Path | None = None
    model: str | None = None
    out: Path | None = None
    batch_size: int = 64
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 0
    device: str = "cpu"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.metrics.split(",") if name.strip())

    def __post_init__(self) -> None:
        """Raises ValueError for a request that cannot be answered, before anything is loaded."""
        for name in self.metric_names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
        distances = [name for name in self.metric_names if name in ("fd", "kid")]
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
        backbone = load_language_model(config.model, config.device)
        documents = read_documents(config.text)
        report["metrics"]["perplexity"] = text_perplexity(backbone, documents).to_json()
        report["text"] = {"file": str(config.text), "model": config.model}
    if config.out is not None:
        write_json(config.out, report)
    return report


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
    limit = config.limit or None
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
    encoder = load_encoder(config.encoder, device=config.device)
    report["encoder"] = describe_encoder(encoder, config.encoder)
    report["preprocessing"] = {
        "size": size,
        "crop": "short side resized to `size`, centre crop; then the encoder's own processor",
    }
    sets = [
        image_features(
            (square(image, size) for image in images.images),
            encoder,
            batch_size=config.batch_size,
        )
        for images in (real, generated)
    ]
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
