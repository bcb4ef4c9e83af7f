"""THE METHOD: next-token cross entropy plus alignment with what a frozen encoder sees.

    L = L_AR + lambda * L_GVA                                       (arXiv 2503.07334, section 3)
    L_GVA = 1 - cos(f_A(h^l_t), f_GF)   mean over an image's <HYBNEXT> positions, then over images

Tensors in, named sums and counts out: no I/O, no trainer, no distributed code. A driver adds the
counts of its micro-batches and ranks **before** the first backward and divides each term once
(`Terms.total`), so that lambda means the same at any accumulation and any world size.

Legend: B sequences, T tokens, N listed positions, d model width, E images of the batch,
D width of a target, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arra.batch import Batch, Positions
from arra.cross_entropy import Kernel, chunked_cross_entropy, wide


class Projector(nn.Module):
    """f_A = Linear(d, D) - GELU - Linear(D, D), as released (4096 -> 512 -> 512)."""

    def __init__(self, hidden_size: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, dim)
        self.down = nn.Linear(dim, dim)
        for linear in (self.up, self.down):
            # nn.Linear's own distribution, from a generator of its own: an aligned run and its
            # plain baseline draw the same numbers for everything else.
            bound = linear.in_features**-0.5
            with torch.no_grad():
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden_ND)))


@dataclass(frozen=True)
class Target:
    """What is aligned to what.

    Attributes:
        name: the feature's name in the dataset.
        dim: D, its width.
        layers: 1 = output of the first decoder block (the paper's layer 1); several = their mean.
        weight: lambda of this target.
        positions: one of `batch.POSITION_SETS`.
        centred: compare with the feature minus the dataset's mean feature. Raw (the paper) features
            of some encoders score 0.9 against a constant.
        kind: "global": one vector an image. "patch": one vector a cell, at the cell's own position.
    """

    name: str
    dim: int
    layers: tuple[int, ...] = (1,)
    weight: float = 1.0
    positions: Literal["hybnext", "holding", "rep", "all", "last"] = "hybnext"
    centred: bool = False
    kind: Literal["global", "patch"] = "global"

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"target {self.name!r}: layers count from 1, got {self.layers}")
        if self.weight < 0:
            raise ValueError(f"target {self.name!r}: weight must be >= 0, got {self.weight}")
        if self.kind == "patch" and self.positions in ("rep", "all"):
            raise ValueError(
                f"target {self.name!r}: positions {self.positions!r} have no cell, so a patch "
                f"target needs hybnext, holding or last"
            )


@dataclass(frozen=True)
class Feature:
    """A target's values for a batch, with what the dataset's manifest knows of them.

    Attributes:
        values: (E, D) for a global, (E, h*w, D) for a patch target; what lies behind the last
            cell of an image with fewer codes is not read.
        mean: (D,) the dataset's mean feature; subtracted if the target is centred.
        constant: (D,) the mean of the unit-length (centred) features: its direction is the best
            constant answer, the score of a projector that learned nothing about the image.
    """

    values: Tensor
    mean: Tensor
    constant: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Feature":
        """The same with `change` applied to every tensor."""
        return Feature(change(self.values), change(self.mean), change(self.constant))

    def to(self, device: torch.device | str) -> "Feature":
        return self.mapped(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class Terms:
    """Sums and counts of one micro-batch.

    `sums` carry gradients and belong to the loss; `metrics` are (sum, count) pairs for the log.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, int]
    weights: Mapping[str, float]
    metrics: Mapping[str, tuple[Tensor, int]]

    def total(self, counts: Mapping[str, int] | None = None) -> Tensor:
        """The loss: each sum times its weight over its (global) count; a count of 0 gives 0."""
        counts = self.counts if counts is None else counts
        parts = [
            self.sums[name] * (self.weights[name] / max(counts[name], 1)) for name in self.sums
        ]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


class Objective(nn.Module):
    """L = L_AR + sum over targets of lambda * L_GVA, plus an optional z-loss.

    Args:
        hidden_size: d, the width of the model's hidden states.
        targets: what to align to; empty is the plain autoregressive objective.
        z_loss: weight of log(Z)^2, independent of the alignment (1e-5 in the paper).
        vocabulary: ids that the softmax runs over; None = all of them, as at inference.
        chunk: positions per chunk of the cross entropy; T x V logits never exist.
        kernel: what computes it (`cross_entropy.kernel_for`).
        seed: of the projectors' initial weights.
    """

    def __init__(
        self,
        hidden_size: int,
        targets: Sequence[Target] = (),
        *,
        z_loss: float = 0.0,
        vocabulary: Sequence[int] | None = None,
        chunk: int = 1024,
        kernel: Kernel = "ours",
        seed: int = 0,
    ) -> None:
        super().__init__()
        # lambda = 0 is the plain baseline: the term is skipped, not multiplied by zero.
        self.targets = tuple(t for t in targets if t.weight > 0)
        self.z_loss, self.chunk, self.kernel = z_loss, chunk, kernel
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ModuleDict(
            {
                _key(target, layer): Projector(hidden_size, target.dim, generator)
                for target in self.targets
                for layer in target.layers
            }
        )
        ids = None if vocabulary is None else torch.tensor(sorted(vocabulary))
        self.vocabulary_V: Tensor | None
        self.register_buffer("vocabulary_V", ids, persistent=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose output must be tapped."""
        return tuple(sorted({layer for t in self.targets for layer in t.layers}))

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many things each term of `batch` averages over; known before any forward pass."""
        tokens = batch.trained_N.numel()
        return {
            "ar": tokens,
            **({"z": tokens} if self.z_loss > 0 else {}),
            **{f"gva/{t.name}": batch.num_images for t in self.targets},
        }

    def forward(
        self,
        taps: Mapping[int, Tensor],
        last_BTD: Tensor,
        head: nn.Module,
        batch: Batch,
        features: Mapping[str, Feature],
        schedule: float = 1.0,
    ) -> Terms:
        """The terms of one micro-batch.

        Args:
            taps: layer -> (B, T, d), the output of that block.
            last_BTD: the final hidden states (after the final norm), the input of `head`.
            head: hidden (N, d) -> logits (N, V), with the model's bias, scale and soft-cap.
            features: target name -> the batch's features; image i of the batch is row i.
            schedule: factor on every lambda at this step; at 0 the terms are skipped.
        """
        hidden_ND = last_BTD.flatten(0, 1).index_select(0, batch.trained_N)
        ce_sum, z_sum = chunked_cross_entropy(
            hidden_ND,
            batch.labels_N,
            head,
            vocabulary_V=self.vocabulary_V,
            with_z=self.z_loss > 0,
            chunk=self.chunk,
            kernel=self.kernel,
        )
        sums, weights = {"ar": ce_sum}, {"ar": 1.0}
        if self.z_loss > 0:
            sums["z"], weights["z"] = z_sum, self.z_loss
        metrics: dict[str, tuple[Tensor, int]] = {}
        for target in self.targets if schedule > 0 else ():
            name = f"gva/{target.name}"
            sums[name], extra = self._align(target, taps, batch, features[target.name])
            weights[name] = target.weight * schedule
            metrics |= {f"{key}/{target.name}": (v, batch.num_images) for key, v in extra.items()}
        counts = self.counts(batch)
        return Terms(sums, {name: counts[name] for name in sums}, weights, metrics)

    def _align(
        self, target: Target, taps: Mapping[int, Tensor], batch: Batch, feature: Feature
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over images of 1 - cos, and what it must be compared with."""
        positions = batch.positions[target.positions]
        dtype = wide(taps[target.layers[0]])
        wanted_ED = feature.values.to(dtype)
        if target.centred:
            wanted_ED = wanted_ED - feature.mean
        wanted_ED = F.normalize(wanted_ED, dim=-1).detach()
        share_N = _share_of_image(positions, batch.num_images, dtype)
        if target.kind == "patch":
            wanted_ND = wanted_ED[positions.image_N, positions.cell_N]
            # Over the aligned cells: an image with fewer codes than another is filled up.
            mean_ED = wanted_ND.new_zeros(batch.num_images, wanted_ND.shape[-1])
            mean_ED.index_add_(0, positions.image_N, wanted_ND * share_N[:, None])
            global_ED = F.normalize(mean_ED, dim=-1)
        else:
            wanted_ND = wanted_ED[positions.image_N]
            global_ED = wanted_ED
        loss = wanted_ED.new_zeros(())
        found_ED = torch.zeros_like(global_ED)
        for layer in target.layers:
            hidden_ND = taps[layer].flatten(0, 1).index_select(0, positions.flat_N)
            projected_ND = self.projectors[_key(target, layer)](hidden_ND).to(dtype)
            projected_ND = F.normalize(projected_ND, dim=-1)
            distance_N = 1 - (projected_ND * wanted_ND).sum(-1)
            loss = loss + (distance_N * share_N).sum() / len(target.layers)
            found_ED.index_add_(0, positions.image_N, projected_ND.detach() * share_N[:, None])
        with torch.no_grad():
            constant_D = F.normalize(feature.constant.to(dtype), dim=-1)
            own = torch.arange(batch.num_images, device=found_ED.device)
            with torch.autocast(own.device.type, enabled=False):
                score_EE = F.normalize(found_ED, dim=-1) @ global_ED.T
            guess_E = score_EE.argmax(-1) if len(own) else own
            extra = {
                # A sum of products, as in the loss: autocast would round a matrix product.
                "gva_constant": ((1 - (wanted_ND * constant_D).sum(-1)) * share_N).sum(),
                "retrieval": (guess_E == own).sum(),
            }
        return loss, extra


def _key(target: Target, layer: int) -> str:
    return f"{target.name}@{layer}".replace(".", "_")


def _share_of_image(positions: Positions, num_images: int, dtype: torch.dtype) -> Tensor:
    """1 / (positions of the same image), so that a sum over N is a mean per image."""
    ones_N = torch.ones_like(positions.image_N, dtype=dtype)
    count_E = ones_N.new_zeros(num_images).index_add_(0, positions.image_N, ones_N)
    return count_E.reciprocal()[positions.image_N]
