"""Who looks at each generated picture, by what `arra evaluate` is asked to measure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from arra.device import pick_device
from arra.evaluate.copies import CopiesPass
from arra.evaluate.gallery import Gallery
from arra.evaluate.image_set import ImageSet
from arra.evaluate.passes import Judge, ScenePass
from arra.evaluate.pathology import labels_of
from arra.evaluate.pathology_pass import PathologyPass
from arra.evaluate.reference import Reference, stored_set
from arra.evaluate.settings import EvaluateConfig
from arra.evaluate.text_image import ClipJudge, ClipPass
from arra.evaluate.xrv import XrvFeatures
from arra.teachers import painter_in, same_encoder

READING = ("scenes", "clip_score")
"""Metrics that compare a picture with its prompt."""


def open_judges(
    config: EvaluateConfig, generated: ImageSet, reference: Reference, size: int
) -> list[Judge]:
    """The judges of a set.

    Args:
        generated: the set.
        reference: what it is compared with.
        size: pixels that pictures are cropped to.

    Raises:
        ValueError: a set without prompts where one reads them, or networks that cannot be used.
    """
    metrics, device = config.metric_names, pick_device(config.device)
    reading = [name for name in READING if name in metrics]
    if reading and generated.captions is None:
        raise ValueError(
            f"{generated.source} has no prompts, which the metric {reading[0]!r} reads: give a "
            f"folder written by `arra generate` (it holds images.jsonl) or another set with "
            f"captions"
        )
    judges: list[Judge] = []
    if "scenes" in metrics:
        judges.append(ScenePass(generated.captions or ()))
    clips = [ClipPass(ClipJudge(spec, device)) for spec in config.clip]
    if len({each.judge.name for each in clips}) < len(clips):
        raise ValueError("two of --clip have one name: scores are named after them")
    judges += clips
    if "auroc" in metrics:
        judges.append(_of_pathologies(config, generated, reference, size))
    if "copies" in metrics:
        judges += _of_copies(config, generated, reference, size)
    return judges


def galleries_of(judges: Sequence[Judge]) -> list[Gallery]:
    """What judges have to show beside their scores."""
    return [each.gallery() for each in judges if isinstance(each, CopiesPass)]


def _of_copies(
    config: EvaluateConfig, generated: ImageSet, reference: Reference, size: int
) -> list[CopiesPass]:
    """The training pictures are all of them, whatever --limit says: a copy may be of any."""
    real = reference.real
    everything = replace(config, limit=None)
    if config.training is not None:
        training = stored_set(everything, config.training, config.training_split)
        if real is not None and real.described()["sha256"] == training.described()["sha256"]:
            real = None
    elif real is not None:
        assert config.real is not None
        whole = config.limit is None
        training = real if whole else stored_set(everything, config.real, config.split)
        real = None
    else:
        raise ValueError("--metrics copies needs pictures of --training, or of --real")
    return [
        CopiesPass(each, generated, training, real, size, config.batch_size)
        for each in reference.extractors
    ]


def _of_pathologies(
    config: EvaluateConfig, generated: ImageSet, reference: Reference, size: int
) -> Judge:
    if reference.real is None:
        raise ValueError(f"--metrics auroc classifies real images, and {config.real} holds none")
    (network,) = (each for each in reference.extractors if isinstance(each, XrvFeatures))
    judge = PathologyPass(
        network,
        reference.real,
        generated,
        size,
        config.batch_size,
        config.labels,
        config.unmentioned,
        config.seed,
    )
    # Labels that cannot be read are told now, not when all is painted.
    extras, column = reference.real.extras, config.labels
    labels_of(extras, list(network.classes), column=column, unmentioned=config.unmentioned)
    return judge


def circular(report: dict[str, Any]) -> list[str]:
    """A warning for each network of a report that the painter of its images was aligned to."""
    painter = painter_in(report["generated"].get("painted") or {})
    used = [*report["extractors"].values(), *report["judges"].values()]
    found = (same_encoder(described, painter) for described in used)
    return list(dict.fromkeys(warning for warning in found if warning is not None))
