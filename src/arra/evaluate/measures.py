"""Which measures there are, and what each is computed from.

Legend: M generated images, D feature width.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from PIL.Image import Image

from arra.data.images import square
from arra.evaluate.cmmd import cmmd
from arra.evaluate.collected import Collected, Gaussian
from arra.evaluate.distances import fd_infinity, frechet_distance, kernel_finding
from arra.evaluate.features import FEATURES
from arra.evaluate.finding import Finding
from arra.evaluate.image_set import ImageSet
from arra.evaluate.inception_network import LOGITS, SPATIAL
from arra.evaluate.ms_ssim import Read, ms_ssim_diversity, ms_ssim_paired, pair_up
from arra.evaluate.passes import FeaturePass
from arra.evaluate.prdc import prdc
from arra.evaluate.vendi import vendi_score

DISTANCES = ("fd", "kid", "cmmd", "prdc", "fd_infinity", "sfid")
"""They compare features with those of real images."""
SIMILARITIES = ("vendi", "ms_ssim_diversity", "ms_ssim_paired")
CLASSIFIED = "is"
"""The Inception Score: of the generated images' classes alone."""
INCEPTION_ONLY = ("sfid", CLASSIFIED)
"""They are of streams that no other extractor has."""

KEPT_ROWS = 50_000
"""Rows of features that kid and fd_infinity draw from: all of a usual evaluation."""
PAIRED_ROWS = 10_000
"""Rows that are compared each with each unless more are asked for, and that intervals are estimated
from: those with the smallest keys, a random sample."""
NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
"""As published: ADM's evaluator; Naeem et al. 2020."""
FEW = "needs at least 2 images in each set"
NO_IMAGES = "--real has moments of real images, not the images, which this compares"


def rows_needed(metrics: Collection[str], paired: int) -> dict[str, int]:
    """The streams that some metrics look at, each with how many of its rows must be kept.

    `paired` rows are compared each with each.
    """
    asked, needed = set(metrics), {}
    by_metric = {
        **dict.fromkeys(("kid", "fd_infinity"), KEPT_ROWS),
        **dict.fromkeys(("cmmd", "prdc", "vendi"), paired),
        "fd": PAIRED_ROWS,
    }
    if by_metric.keys() & asked:
        needed[FEATURES] = max(by_metric[name] for name in by_metric.keys() & asked)
    if "sfid" in asked:
        needed[SPATIAL] = PAIRED_ROWS
    if CLASSIFIED in asked:
        needed[LOGITS] = 0
    return needed


def compared(
    real: FeaturePass | None,
    generated: FeaturePass,
    metrics: Collection[str],
    *,
    kept: Mapping[str, Gaussian],
    paired: int,
    subsets: int,
    subset_size: int,
    seed: int,
) -> dict[str, Finding]:
    """The measures of one extractor's streams, by key; null where there is no reference for one.

    `kept` has moments of the reference by stream, in the place of those of `real`; `paired` rows
    are compared each with each. What is of a stream that this extractor lacks is left to those that
    have it.
    """
    name = generated.extractor.name
    found: dict[str, Finding] = {}
    if CLASSIFIED in metrics and generated.classified is not None:
        found[f"{CLASSIFIED}@{name}"] = generated.classified.finding()
    if "sfid" in metrics and SPATIAL in generated.streams:
        gaussian = _reference(SPATIAL, real, kept)
        found[f"sfid@{name}"] = _frechet(gaussian, generated.streams[SPATIAL])
    if FEATURES not in generated.streams:
        return found
    judged = generated.streams[FEATURES]
    if "vendi" in metrics:
        found[f"vendi@{name}"] = vendi_score(judged.rows_ND[:paired])
    if {"fd", "fd_infinity"} & set(metrics):
        gaussian = _reference(FEATURES, real, kept)
    if "fd" in metrics:
        found[f"fd@{name}"] = _frechet(gaussian, judged)
    if "fd_infinity" in metrics:
        found[f"fd_infinity@{name}"] = (
            fd_infinity(gaussian, judged.rows_ND[:KEPT_ROWS], seed=seed)
            if isinstance(gaussian, Gaussian)
            else Finding(None, judged.count, reason=gaussian)
        )
    by_rows = {"kid", "cmmd", "prdc"} & set(metrics)
    if real is None or not by_rows:
        keys = [key for each in metrics if each in by_rows for key in keys_of(each)]
        return found | {
            f"{key}@{name}": Finding(None, judged.count, reason=NO_IMAGES) for key in keys
        }
    reference = real.streams[FEATURES]
    if "kid" in metrics:
        found[f"kid@{name}"] = kernel_finding(
            reference.rows_ND[:KEPT_ROWS],
            judged.rows_ND[:KEPT_ROWS],
            subsets=subsets,
            subset_size=subset_size,
            seed=seed,
        )
    first = reference.rows_ND[:paired], judged.rows_ND[:paired]
    if "cmmd" in metrics:
        found[f"cmmd@{name}"] = cmmd(*first)
    if "prdc" in metrics:
        by_size = prdc(*first, neighbours=sorted(set(NEIGHBOURS.values())), seed=seed)
        for measure, k in NEIGHBOURS.items():
            found[f"{measure}@{name}"] = getattr(by_size[k], measure)
    return found


def keys_of(metric: str) -> tuple[str, ...]:
    """What a metric's keys in a report begin with."""
    return tuple(NEIGHBOURS) if metric == "prdc" else (metric,)


def _reference(
    stream: str, real: FeaturePass | None, kept: Mapping[str, Gaussian]
) -> Gaussian | str:
    """The reference's Gaussian of a stream, or why there is none."""
    if stream in kept:
        return kept[stream]
    if real is None or stream not in real.streams:
        return f"--real has no images, and no moments of this extractor's {stream}"
    collected = real.streams[stream]
    return collected.gaussian() if collected.count > 1 else FEW


def _frechet(real: Gaussian | str, generated: Collected) -> Finding:
    if generated.count < 2:
        real = FEW
    if isinstance(real, str):
        return Finding(None, generated.count, reason=real)
    return frechet_distance(real, generated.gaussian(), generated.rows_ND[:PAIRED_ROWS])


def likeness(
    real: ImageSet | None,
    generated: ImageSet,
    keys_M: np.ndarray,
    metrics: Collection[str],
    size: int,
    seed: int,
) -> tuple[dict[str, Finding], dict[str, np.ndarray]]:
    """The two uses of MS-SSIM, on squares of `size` pixels, and the scores (M,) of each picture."""
    found: dict[str, Finding] = {}
    scores: dict[str, np.ndarray] = {}

    def reader(images: ImageSet) -> Read:
        def read(indices: Sequence[int]) -> list[Image]:
            return [square(picture.image, size) for picture in images.at(indices)]

        return read

    if "ms_ssim_diversity" in metrics:
        found["ms_ssim_diversity"] = ms_ssim_diversity(
            keys_M, reader(generated), captions=generated.captions, seed=seed
        )
    if "ms_ssim_paired" in metrics and real is None:
        found["ms_ssim_paired"] = Finding(None, len(generated), reason=NO_IMAGES)
    elif "ms_ssim_paired" in metrics:
        assert real is not None
        pairs_P2 = pair_up(real.names, real.captions, generated.names, generated.captions)
        # The interval's resampling depends on the order of the pairs.
        pairs_P2 = pairs_P2[np.argsort(keys_M[pairs_P2[:, 1]], kind="stable")]
        found["ms_ssim_paired"], values_P = ms_ssim_paired(
            pairs_P2, reader(real), reader(generated), seed=seed
        )
        scores["ms_ssim_paired"] = np.full(len(generated), np.nan)
        scores["ms_ssim_paired"][pairs_P2[: len(values_P), 1]] = values_P
    return found, scores
