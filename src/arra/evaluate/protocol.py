"""`arra evaluate`: one report about two sets of images, or about a language model's text.

A measure is named after the extractor whose features it compares, as `fd@NAME`. The name FID means
one network's weights and would be wrong for any other, so it is not used here.

Legend: N, M images of the two sets, D feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from arra.config import ModelConfig
from arra.data.images import CROP
from arra.device import pick_device
from arra.evaluate.entries import open_entries
from arra.evaluate.extractors import open_extractor
from arra.evaluate.features import Extractor
from arra.evaluate.finding import Finding
from arra.evaluate.image_set import ImageSet, StoredSet
from arra.evaluate.measures import DISTANCES, compared, likeness, rows_needed
from arra.evaluate.painter import PaintedSet
from arra.evaluate.passes import FeaturePass, Judge, ScenePass, go_through
from arra.evaluate.perplexity import read_documents, text_perplexity
from arra.evaluate.report import begun, put
from arra.evaluate.settings import EvaluateConfig
from arra.files import write_json
from arra.generate.pictures import read_prompts
from arra.generate.settings import GenerateConfig
from arra.models import Backbone, load_model
from arra.models.loading import PIPELINE, load_for_training
from arra.resolve import resolve_folder


@dataclass
class Measured:
    """What an evaluation found, and what it looked at.

    Attributes:
        report: JSON-ready.
        scores: of each generated picture, by index: {name: (N,)}, NaN where there is no answer.
        real, generated: the sets, where images were judged.
        size: pixels per side that both were cropped to.
    """

    report: dict[str, Any]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    real: ImageSet | None = None
    generated: ImageSet | None = None
    size: int = 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs the protocol and returns the report, JSON-ready; written to `config.out` if given."""
    measured = Measured(begun(config.seed))
    if config.judges_images:
        _measure_images(config, measured)
    report = measured.report
    if config.text is not None:
        assert config.model is not None
        backbone = load_language_model(config.model, pick_device(config.device))
        documents = read_documents(config.text)
        put(report, text_perplexity(backbone, documents).findings(), None)
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


def _measure_images(config: EvaluateConfig, measured: Measured) -> None:
    metrics, report = config.metric_names, measured.report
    real = None
    if config.real is not None:
        real = _stored(config, config.real, config.split)
        report["real"] = real.described()
    generated = _generated(config, real)
    size = config.size or _common_side(generated)
    extractors = _extractors(config)
    report["extractors"] = {each.name: each.described for each in extractors}
    report["preprocessing"] = {"size": size, "crop": CROP}
    keep = rows_needed(metrics)
    features = [FeaturePass(each, keep, grouped=True) for each in extractors]
    judges = _judges(config, generated)
    keys_M = go_through(generated, [*features, *judges], size, config.batch_size)
    report["generated"] = generated.described()
    findings: dict[str, Finding] = {}
    if extractors and set(metrics) & {*DISTANCES, "vendi"}:
        references = [FeaturePass(each, keep) for each in extractors]
        if real is not None:
            go_through(real, references, size, config.batch_size)
        for reference, found in zip(references, features, strict=True):
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
    for judge in judges:
        put(report, judge.findings(), None)
        measured.scores |= judge.scores()
    measured.real, measured.generated, measured.size = real, generated, size


def _extractors(config: EvaluateConfig) -> list[Extractor]:
    device = pick_device(config.device)
    extractors = [open_extractor(spec, device) for spec in config.extractor]
    if len({each.name for each in extractors}) < len(extractors):
        raise ValueError("two of --extractor have one name: measures are named after them")
    return extractors


def _judges(config: EvaluateConfig, generated: ImageSet) -> Sequence[Judge]:
    """Who looks at each generated picture with its prompt."""
    judges: list[Judge] = []
    if "scenes" in config.metric_names:
        if generated.captions is None:
            raise ValueError(
                f"{generated.source} has no prompts, which the metric 'scenes' reads: give a "
                f"folder written by `arra generate` (it holds images.jsonl)"
            )
        judges.append(ScenePass())
    return judges


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
