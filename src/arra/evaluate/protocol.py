"""`arra evaluate`: one report about two sets of images, or about a language model's text.

A measure is named after the extractor whose features it compares, as `fd@NAME`. The name FID means
one network's weights and would be wrong for any other, so it is not used here.

Legend: N, M images of the two sets, D feature width.
"""

import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import tyro
from PIL import Image

import arra
from arra.config import ModelConfig
from arra.data.images import CROP
from arra.device import pick_device
from arra.encoders import load_encoder
from arra.evaluate.distances import frechet, rank_deficient
from arra.evaluate.entries import open_entries
from arra.evaluate.features import EncoderFeatures, Extractor
from arra.evaluate.finding import Finding
from arra.evaluate.image_set import ImageSet, StoredSet
from arra.evaluate.measures import DISTANCES, SIMILARITIES, compared, likeness, rows_needed
from arra.evaluate.painter import PaintedSet
from arra.evaluate.passes import FeaturePass, Pass, ScenePass, go_through
from arra.evaluate.perplexity import read_documents, text_perplexity
from arra.files import write_json
from arra.generate.pictures import read_prompts
from arra.generate.settings import DEFAULT_SLOTS, GenerateConfig
from arra.models import Backbone, load_model
from arra.models.loading import PIPELINE, load_for_training
from arra.resolve import resolve_folder

METRICS = (*DISTANCES, *SIMILARITIES, "scenes")
FORMAT_VERSION = 2


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure painted images against real ones or their prompts, or a language model on text."""

    real: str | None = None
    """Reference images: a folder, tar, Parquet file, .npz batch, hub id or builtin:scenes."""
    generated: str | None = None
    """Images to judge, likewise; a folder that `arra generate` wrote brings its prompts along."""
    model: str | None = None
    """In the place of --generated: a painter whose pictures are judged without files in between,
    painted from --prompts or else from the captions of --real. With --text: the language model."""
    metrics: str = "fd,kid"
    """Comma-separated. fd, kid, cmmd, prdc (precision, recall, density, coverage), fd_infinity:
    distances of --extractor's features to those of --real; vendi: diversity in those features;
    ms_ssim_diversity (among the generated), ms_ssim_paired (each to its real image); scenes (reads
    the pixels of drawn scenes back and compares them with the prompts)."""
    extractor: tuple[str, ...] = ()
    """Encoders whose features are compared: folder, hub id or builtin:NAME;
    E@class|projected|mean|both."""
    split: str | None = None
    """Split of --real, where it has several."""
    limit: int | None = None
    """Use only the first images of each set; default: all."""
    size: int | None = None
    """Pixels per side that both sets are cropped to; default: the generated images' own."""
    text_column: str = "text"
    """Column that holds the captions, where a set has such."""
    image_column: str = "image"
    """Column that holds the images."""
    text: Path | None = None
    """UTF-8 file of documents, one a line or parted by blank lines: perplexity of --model on it."""
    out: Path | None = None
    """Write the report to this JSON file."""
    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """UTF-8 file of what --model paints: one prompt per line, or JSON lines (*.jsonl)."""
    num: int = 1
    """Images that --model paints per prompt."""
    seed: int = 0
    """Image j of every prompt uses seed + j; also of all that is drawn at random in a measure."""
    cfg: float | None = None
    """Guidance scale of --model's pictures; default: the model's own."""
    slots: int = DEFAULT_SLOTS
    """Rows per forward pass of --model."""
    batch_size: int = 64
    """Images per call of an extractor."""
    workers: int = 2
    """Threads that decode images."""
    kid_subsets: int = 100
    """Random subsets that kid averages over."""
    kid_subset_size: int = 1000
    """Images in each of them; sets must have that many."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.metrics.split(",") if name.strip())

    @property
    def judges_images(self) -> bool:
        return self.generated is not None or (self.model is not None and self.text is None)

    def __post_init__(self) -> None:
        """Raises ValueError for a request that cannot be answered, before anything is loaded."""
        for name in self.metric_names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
        for name in ("limit", "size", "batch_size", "kid_subsets", "workers", "num"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.kid_subset_size < 2:
            raise ValueError("--kid-subset-size must be at least 2")
        if self.generated is None and self.text is None and self.model is None:
            raise ValueError(
                "nothing to evaluate: give --generated or --model (with --real), or --text FILE"
            )
        if self.text is not None and self.model is None:
            raise ValueError("--text needs --model: the language model whose text is judged")
        if self.generated is not None and self.model is not None and self.text is None:
            raise ValueError("--generated and --model are both what is judged: give one of them")
        if not self.judges_images:
            return
        compares = [name for name in self.metric_names if name in (*DISTANCES, "ms_ssim_paired")]
        if compares and self.real is None:
            raise ValueError(f"--metrics {','.join(compares)} compares with --real: give it")
        sees = [name for name in self.metric_names if name in (*DISTANCES, "vendi")]
        if sees and not self.extractor:
            raise ValueError(
                f"--metrics {','.join(sees)} needs --extractor: a folder, a hub id or "
                f"builtin:scenes-judge (the measure is named after it)"
            )


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs the protocol and returns the report, JSON-ready; written to `config.out` if given."""
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "metrics": {},
        "intervals": {},
        "counts": {},
        "details": {},
        "reasons": {},
        "seed": config.seed,
        "versions": versions(),
    }
    if config.judges_images:
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
        interval = report["intervals"].get(name)
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
            between = f"  ({interval['low']:.6g} to {interval['high']:.6g})" if interval else ""
            lines.append(f"{name}  {shown}{between}" + (f"  ({reason})" if reason else ""))
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
    metrics = config.metric_names
    real = None
    if config.real is not None:
        real = _stored(config, config.real, config.split)
        report["real"] = real.described()
    generated = _generated(config, real)
    if "scenes" in metrics and generated.captions is None:
        raise ValueError(
            f"{generated.source} has no prompts, which the metric 'scenes' reads: give a "
            f"folder written by `arra generate` (it holds images.jsonl)"
        )
    size = config.size or _common_side(generated)
    device = pick_device(config.device)
    extractors: list[Extractor] = [
        EncoderFeatures(load_encoder(spec, device=device)) for spec in config.extractor
    ]
    report["extractors"] = {each.name: each.described for each in extractors}
    if len(report["extractors"]) < len(extractors):
        raise ValueError("two of --extractor have one name: measures are named after them")
    report["preprocessing"] = {"size": size, "crop": CROP}
    keep = rows_needed(metrics)
    judged = [FeaturePass(each, keep, grouped=True) for each in extractors]
    scenes = ScenePass() if "scenes" in metrics else None
    passes: list[Pass] = [*judged, scenes] if scenes is not None else [*judged]
    keys_M = go_through(generated, passes, size, config.batch_size)
    report["generated"] = generated.described()
    findings: dict[str, Finding] = {}
    if extractors and set(metrics) & {*DISTANCES, "vendi"}:
        references = [FeaturePass(each, keep) for each in extractors]
        if real is not None:
            go_through(real, references, size, config.batch_size)
        for reference, found in zip(references, judged, strict=True):
            findings |= compared(
                reference if real is not None else None,
                found,
                metrics,
                subsets=config.kid_subsets,
                subset_size=config.kid_subset_size,
                seed=config.seed,
            )
    findings |= likeness(real, generated, keys_M, metrics, size, config.seed)
    put(report, findings, None if real is None else len(real))
    if scenes is not None:
        report["metrics"]["scenes"] = scenes.summary()


def put(report: dict[str, Any], findings: dict[str, Finding], real_count: int | None) -> None:
    """Writes findings into a report."""
    for key, found in findings.items():
        report["metrics"][key] = found.value
        report["counts"][key] = [real_count, found.n]
        if found.low is not None:
            report["intervals"][key] = {
                "low": found.low,
                "high": found.high,
                "method": found.method,
            }
        if found.reason is not None:
            report["reasons"][key] = found.reason
        if found.details:
            report["details"][key] = dict(found.details)


def distances_at(
    name: str, real_ND: np.ndarray, generated_MD: np.ndarray
) -> tuple[dict[str, Any], dict[str, str]]:
    """(values, reasons) of fd between features of the encoder called `name`.

    A value that the number of images cannot support is None and its reason is given; a value that
    it supports only in part (a singular covariance) is given together with a reason for caution.
    """
    key, counts = f"fd@{name}", (len(real_ND), len(generated_MD))
    if min(counts) < 2:
        reason = f"needs at least 2 images in each set, there are {counts[0]}, {counts[1]}"
        return {key: None}, {key: reason}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said in `reasons` instead
        value = frechet(real_ND, generated_MD)
    if not rank_deficient(*counts, real_ND.shape[1]):
        return {key: value}, {}
    reason = (
        f"rank deficient: {counts[0]} and {counts[1]} images for {real_ND.shape[1]} dimensions; "
        f"compare only at equal numbers of images"
    )
    return {key: value}, {key: reason}


def _stored(config: EvaluateConfig, spec: str, split: str | None) -> StoredSet:
    entries = open_entries(
        spec,
        split=split,
        limit=config.limit,
        text_column=config.text_column,
        image_column=config.image_column,
    )
    return StoredSet(spec, entries, config.workers)


def _generated(config: EvaluateConfig, real: StoredSet | None) -> ImageSet:
    if config.generated is not None:
        return _stored(config, config.generated, None)
    assert config.model is not None
    asked = GenerateConfig(
        config.model,
        "",
        prompts_file=config.prompts,
        num=config.num,
        seed=config.seed,
        cfg=config.cfg,
        slots=config.slots,
        device=config.device,
    )
    if config.prompts is not None:
        return PaintedSet(asked, read_prompts(asked)[: config.limit])
    if real is None or real.captions is None:
        raise ValueError(f"--model {config.model}: say what it shall paint with --prompts FILE")
    return PaintedSet(asked, real.captions)


def _common_side(generated: ImageSet) -> int:
    if isinstance(generated, PaintedSet):
        return generated.side
    assert isinstance(generated, StoredSet)
    sides = {min(size) for size in generated.sizes}
    if len(sides) != 1:
        raise ValueError(
            f"the images of {generated.source} have several sizes, from {min(sides)} to "
            f"{max(sides)} pixels: say with --size to which both sets are cropped"
        )
    return sides.pop()
