"""Learning a codebook: each code follows the mean of the latents that choose it.

Exponential moving averages (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1), and codes
that nobody chooses are put where latents are badly served (Dhariwal et al. 2020, arXiv 2005.00341,
section 3.1, moves them to random latents; here the chance is proportional to the squared error, as
in k-means++, or the many cells of plain background would take them all).

Legend: R latents (one per cell of a batch), K codes, D code width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from arra.image_tokenizers.vq import VQModel


class CodebookAverage:
    """The running counts and sums behind a model's codebook.

    Attributes:
        count_K: moving average of how many latents of a batch choose each code.
        sum_KD: moving average of their sum.
        moves: whether the codes follow; if not, they are only counted.
    """

    def __init__(self, model: VQModel, decay: float, *, moves: bool = True) -> None:
        self.model, self.decay, self.moves = model, decay, moves
        weight_KD = model.codes.weight
        self.count_K = torch.zeros(len(weight_KD), device=weight_KD.device)
        self.sum_KD = torch.zeros_like(weight_KD)

    @torch.no_grad()
    def start_from_codes(self, cells: int) -> None:
        """Begins at the codebook as it is, as if all codes had been chosen equally often.

        Args:
            cells: latents of a batch.
        """
        self.count_K.fill_(cells / len(self.count_K))
        self.sum_KD.copy_(self.model.codebook * self.count_K[:, None])

    @torch.no_grad()
    def update(self, z_RD: Tensor, codes_R: Tensor) -> None:
        """Counts who chose what in one batch, and moves the codes towards it if they move."""
        chosen_K = torch.bincount(codes_R, minlength=len(self.count_K)).to(z_RD.dtype)
        sum_KD = torch.zeros_like(self.sum_KD).index_add_(0, codes_R, z_RD)
        self.count_K.lerp_(chosen_K, 1 - self.decay)
        self.sum_KD.lerp_(sum_KD, 1 - self.decay)
        if not self.moves:
            return
        used_K1 = (self.count_K > 1e-6)[:, None]
        mean_KD = self.sum_KD / self.count_K.clamp(min=1e-6)[:, None]
        self._set(torch.where(used_K1, mean_KD, self.model.codes.weight))

    @torch.no_grad()
    def revive(self, z_RD: Tensor, share: float, generator: torch.Generator) -> int:
        """Moves codes used less than `share` of an equal share onto latents; returns how many.

        A moved code starts with the count of an equal share, so it lives for some updates before
        it is judged again.
        """
        equal = len(z_RD) / len(self.count_K)
        dead = (self.count_K < share * equal).nonzero().squeeze(1)
        alive = len(dead) < len(self.count_K)
        error_R = self._errors(z_RD) if alive else torch.ones(len(z_RD), device=z_RD.device)
        error_R = error_R.cpu().double() + 1e-12  # equal chances where no latent has an error
        count = min(len(dead), len(z_RD))
        if count == 0:
            return 0
        picked = torch.multinomial(error_R, count, generator=generator).to(z_RD.device)
        dead = dead[:count]
        weight_KD = self.model.codes.weight.clone()
        weight_KD[dead] = z_RD[picked]
        self.count_K[dead] = equal
        self.sum_KD[dead] = z_RD[picked] * equal
        self._set(weight_KD)
        return count

    def _errors(self, z_RD: Tensor) -> Tensor:
        codes_R = self.model.nearest(z_RD[:, :, None, None]).flatten()
        return (z_RD - F.embedding(codes_R, self.model.codebook)).square().sum(dim=1)

    def _set(self, weight_KD: Tensor) -> None:
        unit = self.model.config.l2_normalize
        self.model.codes.weight.copy_(F.normalize(weight_KD, dim=-1) if unit else weight_KD)
