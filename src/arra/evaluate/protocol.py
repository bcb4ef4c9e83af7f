"""`arra evaluate`: one report about two sets of images, or about a language model's text.

A measure is named after the extractor whose features it compares, as `fd@NAME`. The name FID means
one network's weights and would be wrong for any other: it is `fd@inception`.

Legend: N, M images of the two sets, D feature width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from arra.config import ModelConfig
from arra.data.images import CROP
from arra.device import pick_device
from arra.evaluate.by_seed import put_by_seed, seeds_of
from arra.evaluate.collected import Gaussian
from arra.evaluate.finding import Finding
from arra.evaluate.folder import Measured, write_evaluation
from arra.evaluate.image_set import ImageSet, StoredSet
from arra.evaluate.judges import circular, galleries_of, open_judges
from arra.evaluate.measures import CLASSIFIED, DISTANCES, compared, likeness
from arra.evaluate.moments import computed_from
from arra.evaluate.ms_ssim import pair_up
from arra.evaluate.outputs import check_out, check_place, is_file
from arra.evaluate.painter import PaintedSet
from arra.evaluate.passes import FeaturePass, go_through
from arra.evaluate.perplexity import read_documents, text_perplexity
from arra.evaluate.reference import Reference, stored_set
from arra.evaluate.report import begun, put
from arra.evaluate.settings import EvaluateConfig
from arra.files import sha256_of
from arra.generate.pictures import read_prompts
from arra.generate.settings import GenerateConfig
from arra.models import Backbone, load_model
from arra.models.loading import PIPELINE, load_for_training
from arra.resolve import resolve_folder


def evaluate(config: EvaluateConfig, reference: Reference | None = None) -> dict[str, Any]:
    """Runs the protocol and returns the report, JSON-ready; written to `config.out` if given.

    `reference` is what evaluations that differ only in what is judged may share.
    """
    if config.out is not None:
        check_out(config.out)
    if config.save_moments is not None:
        check_place(config.save_moments)
    measured = Measured(begun(config.seed))
    if config.judges_images:
        _measure_images(config, measured, reference or Reference(config))
    report = measured.report
    if config.text is not None:
        assert config.model is not None
        backbone = load_language_model(config.model, pick_device(config.device))
        documents = read_documents(config.text)
        put(report, text_perplexity(backbone, documents).findings(), None)
        report["text"] = {
            "file": str(config.text),
            "sha256": sha256_of(config.text),
            "model": config.model,
        }
    if config.out is not None:
        write_evaluation(config.out, measured)
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


def _measure_images(config: EvaluateConfig, measured: Measured, reference: Reference) -> None:
    metrics, report = config.metric_names, measured.report
    real, extractors = reference.real, reference.extractors
    if config.real is not None:
        report["real"] = reference.described()
    generated = generated_set(config, real)
    size = config.size or _common_side(generated)
    if real is not None and "ms_ssim_paired" in metrics:  # refused now, not when all is painted
        pair_up(real.names, real.captions, generated.names, generated.captions)
    report["extractors"] = {each.name: each.described for each in extractors}
    report["warnings"] += reference.doubts()
    report["warnings"] += [*_enlarged(real, size), *_enlarged(generated, size)]
    report["warnings"] += repeated(generated)
    report["preprocessing"] = {"size": size, "crop": CROP}
    kept = [reference.kept(each, size) for each in extractors]
    seeds = seeds_of(generated) if config.by_seed else []
    features = [FeaturePass(each, reference.keep, seeds) for each in extractors]
    judges = open_judges(config, generated, reference, size)
    report["judges"] = {key: value for judge in judges for key, value in judge.described.items()}
    keys_M = go_through(generated, [*features, *judges], size, config.batch_size)
    report["generated"] = generated.described()
    report["warnings"] += circular(report)
    findings: dict[str, Finding] = {}
    of_seeds: dict[int, dict[str, Finding]] = {seed: {} for seed in seeds}
    if set(metrics) & {*DISTANCES, "vendi", CLASSIFIED}:
        compares = real is not None and (set(metrics) & set(DISTANCES) or config.save_moments)
        references = reference.features(size) if compares else [None] * len(features)
        for of_real, found, moments in zip(references, features, kept, strict=True):
            findings |= _compared(config, of_real, found, moments)
            for seed, part in found.by_seed.items():
                of_seeds[seed] |= _compared(config, of_real, part, moments)
    alike, measured.scores = likeness(real, generated, keys_M, metrics, size, config.seed)
    findings |= alike
    of_moments = computed_from(kept, extractors)
    put(report, {k: v for k, v in findings.items() if k in of_moments}, reference.kept_count)
    rest = {k: v for k, v in findings.items() if k not in of_moments}
    put(report, rest, None if real is None else len(real))
    if config.save_moments is not None:
        reference.save_moments(config.save_moments, size)
    for judge in judges:
        put(report, judge.findings(), None)
        measured.scores |= judge.scores()
    if config.out is not None and not is_file(config.out):
        measured.galleries = galleries_of(judges)
    if generated.runs is not None and seeds:
        put_by_seed(report, seeds, of_seeds, measured.scores, generated.runs)
    measured.real, measured.generated, measured.size = real, generated, size


def _compared(
    config: EvaluateConfig,
    real: FeaturePass | None,
    found: FeaturePass,
    kept: Mapping[str, Gaussian],
) -> dict[str, Finding]:
    return compared(
        real,
        found,
        config.metric_names,
        kept=kept,
        paired=config.paired_images,
        subsets=config.kid_subsets,
        subset_size=config.kid_subset_size,
        seed=config.seed,
    )


def generated_set(config: EvaluateConfig, real: StoredSet | None) -> ImageSet:
    """What is judged: images that lie in files, or those that a painter is going to paint.

    Raises:
        ValueError: images or a painter that cannot be used, or nothing says what to paint.
    """
    if config.generated is not None:
        return stored_set(config, config.generated, None)
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


def repeated(images: ImageSet) -> Iterator[str]:
    """A warning where a prompt was painted with the same seed again: that is the same picture."""
    if images.captions is None or images.seeds is None:
        return
    different = len(set(zip(images.captions, images.seeds, strict=True)))
    if different < len(images):
        yield (
            f"{images.source}: {len(images):,} pictures of {different:,} different prompts and "
            f"seeds, so some are the same picture again: paint those with other seeds"
        )


def _enlarged(images: ImageSet | None, size: int) -> Iterator[str]:
    """A warning where pictures are smaller than they are measured at."""
    sides = [min(each) for each in images.sizes] if isinstance(images, StoredSet) else []
    if isinstance(images, PaintedSet):
        sides = [images.side]
    if images is not None and min(sides, default=size) < size:
        yield (
            f"{images.source} has pictures of {min(sides)} pixels, enlarged to {size}: distances "
            f"are then of their blur too"
        )


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
