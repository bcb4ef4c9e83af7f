"""From logits and one uniform number per image to a code: inverse CDF, no host sync.

A `multinomial` on the device would tie an image to its row, its batch and its device. Here all
uniforms of an image are drawn before painting from a CPU generator of its own seed, and the code is
where the cumulative probability passes the uniform: the same picture in any row of any batch.

Legend: N images, P positions of an image (its cells), K codes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from arra.generate.settings import Sampling, check_seed


def uniforms(seeds: Sequence[int], positions: int) -> Tensor:
    """One number in [0, 1) per image and position, (N, P) float64 on the CPU."""
    rows = []
    for seed in seeds:
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(positions, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def guide(guided_NK: Tensor, unguided_NK: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance on logits: unguided + cfg * (guided - unguided), as LlamaGen."""
    return unguided_NK + cfg * (guided_NK - unguided_NK)


def sample(logits_NK: Tensor, uniform_N: Tensor, sampling: Sampling) -> Tensor:
    """Draws a code per row, (N,) int64, with temperature, then top-k, then top-p.

    Args:
        logits_NK: of the legal codes only, guidance already applied.
        uniform_N: float64 in [0, 1).
    """
    if sampling.temperature == 0:
        return logits_NK.argmax(-1)
    weights_NK = code_probabilities(logits_NK, sampling)
    cdf_NK = weights_NK.double().cumsum(-1)
    # Scaling the uniform by the total instead of the probabilities by its inverse: the last code
    # with any weight then always ends above the threshold, and one without weight is never drawn.
    threshold_N1 = (uniform_N * cdf_NK[:, -1]).unsqueeze(1)
    drawn_N = torch.searchsorted(cdf_NK, threshold_N1, right=True).squeeze(1)
    return drawn_N.clamp(max=cdf_NK.shape[1] - 1)  # past the end only where logits are NaN


def code_probabilities(logits_NK: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, top-k and top-p, not yet renormalised over what is left.

    float32, or float64 where the logits are. Among equal logits the smaller code is kept first.
    """
    wide_NK = logits_NK if logits_NK.dtype == torch.float64 else logits_NK.float()
    if sampling.temperature != 1:
        wide_NK = wide_NK / sampling.temperature
    probability_NK = wide_NK.softmax(-1)
    codes = probability_NK.shape[-1]
    by_k, by_p = 0 < sampling.top_k < codes, sampling.top_p < 1
    if not (by_k or by_p):
        return probability_NK
    falling_NK, order_NK = probability_NK.sort(dim=-1, descending=True, stable=True)
    if by_k:
        falling_NK[:, sampling.top_k :] = 0
    if by_p:
        # Kept: codes before which less than top_p has been collected, of what top-k left.
        collected_NK = falling_NK.double().cumsum(-1)
        before_NK = collected_NK - falling_NK
        falling_NK[before_NK >= sampling.top_p * collected_NK[:, -1:]] = 0
    return torch.zeros_like(probability_NK).scatter_(-1, order_NK, falling_NK)
