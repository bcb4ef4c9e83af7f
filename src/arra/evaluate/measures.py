"""Which measures there are, and what each is computed from.

Legend: M generated images, D feature width.
"""

from collections.abc import Collection, Sequence

import numpy as np
from PIL.Image import Image

from arra.data.images import square
from arra.evaluate.cmmd import cmmd
from arra.evaluate.collected import Collected
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
"""Rows that are compared each with each, and that intervals are estimated from: those with the
smallest keys, a random sample."""
NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
"""As published: ADM's evaluator; Naeem et al. 2020."""


def rows_needed(metrics: Collection[str]) -> dict[str, int]:
    """The streams that some metrics look at, each with how many of its rows must be kept."""
    asked, needed = set(metrics), {}
    if {"kid", "fd_infinity"} & asked:
        needed[FEATURES] = KEPT_ROWS
    elif {"fd", "cmmd", "prdc", "vendi"} & asked:
        needed[FEATURES] = PAIRED_ROWS
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
    subsets: int,
    subset_size: int,
    seed: int,
) -> dict[str, Finding]:
    """The measures of one extractor's streams, by key; `real` is None where none needs it.

    What is of a stream that this extractor lacks is left to those that have it.
    """
    name = generated.extractor.name
    found: dict[str, Finding] = {}
    if CLASSIFIED in metrics and generated.classified is not None:
        found[f"{CLASSIFIED}@{name}"] = generated.classified.finding()
    if "sfid" in metrics and SPATIAL in generated.streams:
        assert real is not None
        found[f"sfid@{name}"] = _frechet(real.streams[SPATIAL], generated.streams[SPATIAL])
    if FEATURES not in generated.streams:
        return found
    judged = generated.streams[FEATURES]
    if "vendi" in metrics:
        found[f"vendi@{name}"] = vendi_score(judged.rows_ND[:PAIRED_ROWS])
    if real is None:
        return found
    reference = real.streams[FEATURES]
    if "fd" in metrics:
        found[f"fd@{name}"] = _frechet(reference, judged)
    if "fd_infinity" in metrics:
        found[f"fd_infinity@{name}"] = fd_infinity(reference.gaussian(), judged.rows_ND, seed=seed)
    if "kid" in metrics:
        found[f"kid@{name}"] = kernel_finding(
            reference.rows_ND,
            judged.rows_ND,
            subsets=subsets,
            subset_size=subset_size,
            seed=seed,
        )
    first = reference.rows_ND[:PAIRED_ROWS], judged.rows_ND[:PAIRED_ROWS]
    if "cmmd" in metrics:
        found[f"cmmd@{name}"] = cmmd(*first)
    if "prdc" in metrics:
        by_size = prdc(*first, neighbours=sorted(set(NEIGHBOURS.values())), seed=seed)
        for measure, k in NEIGHBOURS.items():
            found[f"{measure}@{name}"] = getattr(by_size[k], measure)
    return found


def _frechet(real: Collected, generated: Collected) -> Finding:
    if min(real.count, generated.count) < 2:
        return Finding(None, generated.count, reason="needs at least 2 images in each set")
    rows_MD = generated.rows_ND[:PAIRED_ROWS]
    return frechet_distance(real.gaussian(), generated.gaussian(), rows_MD)


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
    if "ms_ssim_paired" in metrics:
        assert real is not None
        pairs_P2 = pair_up(real.names, real.captions, generated.names, generated.captions)
        found["ms_ssim_paired"], values_P = ms_ssim_paired(
            pairs_P2, reader(real), reader(generated), seed=seed
        )
        scores["ms_ssim_paired"] = np.full(len(generated), np.nan)
        scores["ms_ssim_paired"][pairs_P2[: len(values_P), 1]] = values_P
    return found, scores
