"""From logits and one uniform number per row to a code: inverse CDF, no host sync.

A `multinomial` on the device would tie an image to its row, its batch and its device. Here all
uniforms of an image are drawn before painting from a CPU generator of its own seed, and the code is
where the cumulative probability passes the uniform: the same picture in any row of any batch.

Legend: N images, R rows, P positions of an image (its cells), K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


def guide(guided_RK: Tensor, unguided_RK: Tensor, cfg: float | Tensor) -> Tensor:
    """Classifier-free guidance on logits: unguided + cfg * (guided - unguided), as LlamaGen.

    To the last bit, what is unguided at 0 and what is guided at 1.
    """
    if isinstance(cfg, Tensor):
        cfg = cfg.to(guided_RK.dtype)
    return torch.lerp(unguided_RK, guided_RK, cfg)


@dataclass(frozen=True)
class RowSampling:
    """How each row draws: the fields of `Sampling` as tensors (R,).

    `filtered` says whether any row may have a top-k or top-p, `greedy` whether any may have
    temperature 0: sorting the codes, or looking for the likeliest, is left out where none does, and
    changes no bit of the other rows.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    filtered: bool
    greedy: bool

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device | str = "cpu") -> "RowSampling":
        """Of one `Sampling` per row."""
        return cls(
            torch.tensor([row.temperature for row in rows], device=device),
            torch.tensor([row.top_k for row in rows], device=device),
            torch.tensor([row.top_p for row in rows], device=device, dtype=torch.float64),
            any(filters(row) for row in rows),
            any(row.temperature == 0 for row in rows),
        )


def is_plain(rows: RowSampling) -> Tensor:
    """Rows (R,) that are not greedy and leave no code out."""
    return (rows.temperature_R != 0) & (rows.top_k_R == 0) & (rows.top_p_R >= 1)


def filters(sampling: Sampling) -> bool:
    """Whether it leaves codes out."""
    return sampling.top_k > 0 or sampling.top_p < 1


def sample(logits_RK: Tensor, uniform_R: Tensor, rows: RowSampling) -> Tensor:
    """Draws a code per row, (R,) int64, with temperature, then top-k, then top-p.

    Args:
        logits_RK: of the legal codes only, guidance already applied.
        uniform_R: float64 in [0, 1).
    """
    weights_RK = code_probabilities(logits_RK, rows)
    cdf_RK = weights_RK.cumsum(-1, dtype=torch.float64)
    # Scaling the uniform by the total instead of the probabilities by its inverse: the last code
    # with any weight then always ends above the threshold, and one without weight is never drawn.
    threshold_R1 = (uniform_R * cdf_RK[:, -1]).unsqueeze(1)
    drawn_R = torch.searchsorted(cdf_RK, threshold_R1, right=True).squeeze(1)
    drawn_R = drawn_R.clamp(max=cdf_RK.shape[1] - 1)  # past the end only where logits are NaN
    if not rows.greedy:
        return drawn_R
    return torch.where(rows.temperature_R == 0, logits_RK.argmax(-1), drawn_R)


def code_probabilities(logits_RK: Tensor, rows: RowSampling) -> Tensor:
    """Probabilities after temperature, top-k and top-p, not yet renormalised over what is left.

    float32, or float64 where the logits are. Among equal logits the smaller code is kept first. At
    temperature 0 they are those of temperature 1, and `sample` does not ask for them.
    """
    wide_RK = logits_RK if logits_RK.dtype == torch.float64 else logits_RK.float()
    temperature_R = rows.temperature_R
    if rows.greedy:
        temperature_R = torch.where(temperature_R == 0, 1.0, temperature_R)
    probability_RK = (wide_RK / temperature_R[:, None].to(wide_RK.dtype)).softmax(-1)
    if not rows.filtered:
        return probability_RK
    codes = probability_RK.shape[-1]
    falling_RK, order_RK = probability_RK.sort(dim=-1, descending=True, stable=True)
    kept_R1 = torch.where(rows.top_k_R == 0, codes, rows.top_k_R)[:, None]
    falling_RK = falling_RK.where(torch.arange(codes, device=order_RK.device) < kept_R1, 0)
    # Kept by top-p: codes before which less than top_p has been collected, of what top-k left.
    collected_RK = falling_RK.double().cumsum(-1)
    before_RK = collected_RK - falling_RK
    enough_RK = before_RK >= rows.top_p_R[:, None] * collected_RK[:, -1:]
    falling_RK = falling_RK.masked_fill(enough_RK & (rows.top_p_R < 1)[:, None], 0)
    return torch.zeros_like(probability_RK).scatter_(-1, order_RK, falling_RK)
