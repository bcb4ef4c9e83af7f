"""MS-SSIM, and its two uses: the likeness of generated pictures to each other, and to real ones.

Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003, eq. 7): 1 for equal pictures.
The two uses must not be confused, so each has its name everywhere:

    ms_ssim_diversity   mean over pairs of generated pictures; lower is more diverse (Odena et al.
                        2017, arXiv 1610.09585, section 4.2)
    ms_ssim_paired      mean over generated pictures, each with the real picture that its caption
                        belongs to; higher is closer

Own code, for its windows: torchmetrics 1.9 takes the coarsest scale's similarity over a border of
reflected pixels too, which at 256 pixels is most of its window positions. Here, as in the paper's
code, TensorFlow and pytorch-msssim, a window lies within the picture.

Legend: C channels, H, W height and width, N, M real and generated pictures, P pairs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import isqrt
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from arra.evaluate.finding import Finding
from arra.evaluate.intervals import bootstrap_mean

# Wang et al. 2003, section 3.2: exponents of the five scales, the finest first.
EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Wang et al. 2004 (SSIM), section III.C: Gaussian window, and constants for pixels of 0..1.
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
# The window must fit into the coarsest scale.
SMALLEST_SIDE = (WINDOW - 1) * 2 ** (len(EXPONENTS) - 1) + 1

Read = Callable[[Sequence[int]], Sequence[Image.Image]]
"""Pictures by their indices in a set, RGB and all of one size."""


def ms_ssim(first: Image.Image, second: Image.Image) -> float:
    """MS-SSIM of two RGB pictures: the mean of its value for each channel, pixels as 0..1.

    A scale is the mean over 2 x 2 pixels of the one before, an odd last row or column repeated.
    Negative terms count as 0. In float64, so 1e-12 between machines.
    Raises ValueError for pictures of two sizes, or with a side shorter than 161 pixels.
    """
    unfit = _unfit(first, second)
    if unfit is not None:
        raise ValueError(f"MS-SSIM: {unfit}.")
    pictures_2CHW = torch.stack([_pixels(first), _pixels(second)])
    value_C = torch.ones(pictures_2CHW.shape[1], dtype=torch.float64)
    for scale, exponent in enumerate(EXPONENTS):
        if scale:
            odd = [pictures_2CHW.shape[-1] % 2, pictures_2CHW.shape[-2] % 2]
            padded = F.pad(pictures_2CHW, (0, odd[0], 0, odd[1]), mode="replicate")
            pictures_2CHW = F.avg_pool2d(padded, 2)
        contrast_CHW, brightness_CHW = _terms(pictures_2CHW)
        last = scale == len(EXPONENTS) - 1
        term_C = (contrast_CHW * brightness_CHW if last else contrast_CHW).mean((-2, -1))
        value_C *= term_C.clamp(min=0.0) ** exponent
    return float(value_C.mean())


def ms_ssim_diversity(
    keys_M: np.ndarray,
    read: Read,
    *,
    captions: Sequence[str] | None = None,
    pairs: int = 1000,
    seed: int = 0,
) -> Finding:
    """Mean MS-SSIM over random pairs of generated pictures; lower is more diverse.

    The pairs are those of `diversity_pairs`. The interval resamples pairs; they share pictures
    where a set is small, which it does not know. Null with fewer than two pictures, or where their
    sizes do not allow it. `details` says whether pairs are of one caption.
    """
    pairs_P2, within = diversity_pairs(keys_M, captions, pairs, seed)
    if len(pairs_P2) == 0:
        return Finding(None, 0, reason=f"a pair takes two images; the set has {len(keys_M)}")
    details = {"pairs": "of one caption" if within else "of the whole set"}
    return _over_pairs(pairs_P2, read, read, details, seed)[0]


def ms_ssim_paired(
    pairs_P2: np.ndarray, read_real: Read, read_generated: Read, *, seed: int = 0
) -> tuple[Finding, np.ndarray]:
    """Mean MS-SSIM of generated pictures with their real ones, and each pair's value (P,).

    `pairs_P2` holds indices, real then generated, as `pair_up` gives them. The interval resamples
    pairs. Null without pairs, or where sizes do not allow it; the values are then NaN.
    """
    if len(pairs_P2) == 0:
        return Finding(None, 0, reason="no pairs"), np.empty(0)
    return _over_pairs(pairs_P2, read_real, read_generated, {}, seed)


def diversity_pairs(
    keys_M: np.ndarray, captions: Sequence[str] | None, pairs: int, seed: int
) -> tuple[np.ndarray, bool]:
    """Pairs (P, 2) of different indices, at most `pairs`, and whether each is of one caption.

    Where at least half of the pictures share their caption with another, pairs are drawn within
    captions, as many from each (of random captions, if they outnumber the pairs); else from the
    whole set. Drawn from pictures in the order of their keys, so nothing depends on the order in
    which they come.
    """
    if pairs < 1:
        raise ValueError(f"MS-SSIM needs at least 1 pair, asked for {pairs}.")
    texts = captions if captions is not None else [""] * len(keys_M)
    assert len(texts) == len(keys_M)
    ordered = sorted(range(len(keys_M)), key=lambda index: (int(keys_M[index]), texts[index]))
    of_caption: dict[str, list[int]] = defaultdict(list)
    for index in ordered:
        of_caption[texts[index]].append(index)
    groups = [members for _, members in sorted(of_caption.items()) if len(members) > 1]
    within = captions is not None and 2 * sum(map(len, groups)) >= max(len(ordered), 1)
    if not within:
        groups = [ordered]
    generator = np.random.default_rng(seed)
    if len(groups) > pairs:
        kept = np.sort(generator.choice(len(groups), pairs, replace=False))
        groups = [groups[number] for number in kept]
    share = max(1, pairs // len(groups))
    drawn = [pair for members in groups for pair in _drawn(members, share, generator)]
    return np.array(drawn, dtype=np.int64).reshape(-1, 2), within


def pair_up(
    real_names: Sequence[str],
    real_captions: Sequence[str] | None,
    generated_names: Sequence[str],
    generated_captions: Sequence[str] | None,
) -> np.ndarray:
    """Indices (M, 2) of each generated picture's real one (first) and of itself.

    By name, without its folder and ending, where every generated name is one real picture's and no
    caption contradicts that; else by equal captions. Several pictures of one caption are matched in
    the order of their names; generated ones that are left over begin again with the first. Real
    pictures may stay without a partner.

    Raises ValueError naming the generated pictures that have none.
    """
    by_name = _by_name(real_names, generated_names)
    if by_name is not None:
        if real_captions is None or generated_captions is None:
            return by_name
        if all(real_captions[real] == generated_captions[own] for real, own in by_name):
            return by_name
    if real_captions is None or generated_captions is None:
        known = {_stem(name) for name in real_names}
        missing = [name for name in generated_names if _stem(name) not in known]
        what = "have the name of no real image" if missing else "have the name of several real ones"
        raise ValueError(
            f"MS-SSIM to the paired real image: {_some(missing or list(generated_names))} {what}, "
            "and captions to pair by are not in both sets; name images alike or give captions."
        )
    return _by_caption(real_names, real_captions, generated_names, generated_captions)


def _by_name(real_names: Sequence[str], generated_names: Sequence[str]) -> np.ndarray | None:
    index_of = {_stem(name): index for index, name in enumerate(real_names)}
    found = [index_of.get(_stem(name)) for name in generated_names]
    if len(index_of) < len(real_names) or not found or None in found:
        return None
    return np.array([[real, own] for own, real in enumerate(found)], dtype=np.int64)


def _by_caption(
    real_names: Sequence[str],
    real_captions: Sequence[str],
    generated_names: Sequence[str],
    generated_captions: Sequence[str],
) -> np.ndarray:
    real_of: dict[str, list[int]] = defaultdict(list)
    for index in sorted(range(len(real_names)), key=lambda index: real_names[index]):
        real_of[real_captions[index]].append(index)
    missing = [
        f"{name} ({caption!r})"
        for name, caption in zip(generated_names, generated_captions, strict=True)
        if caption not in real_of
    ]
    if missing:
        raise ValueError(
            f"MS-SSIM to the paired real image: {_some(missing)} "
            f"{'has' if len(missing) == 1 else 'have'} neither the name nor the caption of a real "
            "image; give the real images of these captions."
        )
    taken: dict[str, int] = defaultdict(int)
    pairs = np.empty((len(generated_names), 2), dtype=np.int64)
    for own in sorted(range(len(generated_names)), key=lambda index: generated_names[index]):
        caption = generated_captions[own]
        candidates = real_of[caption]
        pairs[own] = candidates[taken[caption] % len(candidates)], own
        taken[caption] += 1
    return pairs


def _over_pairs(
    pairs_P2: np.ndarray,
    read_first: Read,
    read_second: Read,
    details: dict[str, str],
    seed: int,
) -> tuple[Finding, np.ndarray]:
    """The mean over pairs, read a pair at a time, and each pair's value."""
    values_P = np.full(len(pairs_P2), np.nan)
    for number, (first, second) in enumerate(pairs_P2.tolist()):
        pair = read_first([first])[0], read_second([second])[0]
        unfit = _unfit(*pair)
        if unfit is not None:
            reason = f"MS-SSIM: {unfit}"
            return Finding(None, 0, reason=reason, details=details), np.full_like(values_P, np.nan)
        values_P[number] = ms_ssim(*pair)
    interval = bootstrap_mean(values_P, seed=seed)
    assert interval is not None
    return Finding(
        interval.mean,
        interval.n,
        interval.low,
        interval.high,
        "bootstrap over pairs",
        details=details,
    ), values_P


def _terms(pictures_2CHW: Tensor) -> tuple[Tensor, Tensor]:
    """Contrast-structure and brightness of two pictures at each window position (SSIM, eq. 6)."""
    height, width = pictures_2CHW.shape[-2:]
    window_h, window_w = _windows(height), _windows(width)
    one_CHW, two_CHW = pictures_2CHW
    moments = torch.stack([one_CHW, two_CHW, one_CHW**2, two_CHW**2, one_CHW * two_CHW])
    mean_1, mean_2, square_1, square_2, product = window_h @ moments @ window_w.T
    covariance = product - mean_1 * mean_2
    variances = square_1 - mean_1**2 + square_2 - mean_2**2
    contrast = (2 * covariance + C2) / (variances + C2)
    brightness = (2 * mean_1 * mean_2 + C1) / (mean_1**2 + mean_2**2 + C1)
    return contrast, brightness


def _windows(side: int) -> Tensor:
    """(side - 10, side): the Gaussian window at every position within the side."""
    offsets = torch.arange(side)[None] - torch.arange(side - WINDOW + 1)[:, None] - WINDOW // 2
    weights = torch.exp(-(offsets.double() ** 2) / (2 * SIGMA**2))
    weights[offsets.abs() > WINDOW // 2] = 0.0
    return weights / weights.sum(1, keepdim=True)


def _pixels(image: Image.Image) -> Tensor:
    """(C, H, W) float64 in 0..1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float64) / 255.0).permute(2, 0, 1)


def _unfit(first: Image.Image, second: Image.Image) -> str | None:
    if first.size != second.size:
        return (
            f"images of {first.width}x{first.height} and {second.width}x{second.height} pixels "
            "cannot be compared; bring both sets to one size"
        )
    if min(first.size) < SMALLEST_SIDE:
        return (
            f"its {len(EXPONENTS)} scales need sides of at least {SMALLEST_SIDE} pixels; "
            f"an image has {first.width}x{first.height}"
        )
    return None


def _drawn(
    members: list[int], count: int, generator: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Different pairs of members, numbered (0, 1), (0, 2), (1, 2), (0, 3), ... and so on."""
    total = len(members) * (len(members) - 1) // 2
    for number in generator.choice(total, min(count, total), replace=False).tolist():
        second = (1 + isqrt(1 + 8 * number)) // 2
        yield members[number - second * (second - 1) // 2], members[second]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
