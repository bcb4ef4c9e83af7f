"""The alignment probe: how much of what it is aligned to each decoder layer holds. Nothing is
trained for it.

The first validation images (of training, where there is no such split) pass through the model once.
For each block the hidden states at an image's HYBNEXT positions are averaged, and the images are
compared with one another by these and by the target:

- `cka`: linear CKA (arXiv 1905.00414) with the unbiased estimator of HSIC (Song et al., JMLR 13,
  2012, equation 5). 1 = the same but for rotation and scale; 0 = unrelated, whatever the widths.
- `knn`: mutual nearest neighbours (arXiv 2405.07987): the share of an image's 10 nearest images by
  one that are also nearest by the other. By chance it is 10 of all others (`probe/chance`).

Legend: E images, N positions, D width of a layer or of a target.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from arra.data.loader import Loader, MicroBatch
from arra.files import atomic_write
from arra.train.step import autocast
from arra.train.world import World

if TYPE_CHECKING:
    from arra.train.setup import Run

FOLDER = "probes"
NEIGHBOURS = 10
"""As in both papers that use the measure for this (arXiv 2405.07987 and REPA, 2410.06940)."""
FEWEST, MOST = 8, 2048
"""Images that are compared: fewer say nothing, and every two of them are compared."""


@dataclass(frozen=True)
class Probe:
    """What one probe found.

    Attributes:
        scores: target -> measure -> the score of each layer, the first block first.
        images: how many were compared.
    """

    scores: Mapping[str, Mapping[str, Sequence[float]]]
    images: int

    @property
    def chance(self) -> float:
        """The mutual neighbours of unrelated representations."""
        return _neighbours(self.images) / (self.images - 1)

    def fields(self) -> dict[str, float]:
        """For the log: `probe/cka/layer_03`; several targets are named behind it."""
        several = len(self.scores) > 1
        found = {
            f"probe/{measure}/layer_{layer:02d}{f'/{target}' if several else ''}": value
            for target, measures in self.scores.items()
            for measure, values in measures.items()
            for layer, value in enumerate(values, 1)
        }
        return found | {"probe/chance": self.chance}


def check_probe(run: "Run") -> None:
    """
    Raises:
        ValueError: there is nothing to compare with, or too few images.
    """
    images = min(_limit(run), _source(run).num_samples)
    if images < FEWEST:
        raise ValueError(
            f"--log.probe-every compares images with one another: {images} are too few, it takes "
            f"{FEWEST} (--log.validate-images, or a larger validation split)"
        )
    if not _source(run).targets:
        raise ValueError(
            "--log.probe-every has no feature to compare layers with: prepare the data with "
            "--encoder, or leave it out"
        )


@torch.no_grad()
def probe(run: "Run") -> Probe:
    """Compares every layer with every target; all processes call it."""
    layers = range(1, run.backbone.num_layers + 1)
    hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    wanted: dict[str, list[Tensor]] = {name: [] for name in _source(run).targets}
    run.step.eval()
    with run.engine.painting():
        for micro, counts in _in_lock_step(run):
            with run.backbone.tap(layers) as taps, autocast(run.config, run.world.device):
                run.backbone.last_hidden(micro.batch.ids_BT, micro.text)
            if not counts:
                continue
            for layer in layers:
                hidden[layer].append(_mean_by_image(taps[layer], micro).cpu())
            for name in wanted:
                wanted[name].append(_target_of(micro, name).cpu())
    run.step.train()
    targets = {name: _gathered(parts, run.world) for name, parts in wanted.items()}
    scores: dict[str, dict[str, list[float]]] = {n: {"cka": [], "knn": []} for n in targets}
    for layer in layers:
        found_ED = _gathered(hidden[layer], run.world)
        for name, target_ED in targets.items():
            scores[name]["cka"].append(linear_cka(found_ED, target_ED))
            scores[name]["knn"].append(mutual_neighbours(found_ED, target_ED))
    return Probe(scores, len(next(iter(targets.values()))))


def probed(run: "Run", step: int) -> tuple[dict[str, float], Image.Image]:
    """The fields of the log line for `step` optimizer steps done, and their picture, which process
    0 writes as probes/step-XXXXXXXX.png; all processes call it."""
    found = probe(run)
    title = f"{run.folder.name}, step {step:,}: {found.images:,} images compared"
    picture = drawn(found, run.step.objective.layers, title)

    def write() -> None:
        with atomic_write(run.folder / FOLDER / f"step-{step:08d}.png") as temporary:
            picture.save(temporary, format="PNG")

    run.world.on_main(write)
    return found.fields(), picture


# ---- measures ------------------------------------------------------------------------------------


def linear_cka(one_ED: Tensor, other_ED: Tensor) -> float:
    """Linear CKA of E >= 4 images' representations, by unbiased HSIC; it may be a little below 0.
    0 where all images are represented alike."""
    one_EE, other_EE = (x.double() @ x.double().T for x in (one_ED, other_ED))
    scale = _hsic(one_EE, one_EE) * _hsic(other_EE, other_EE)
    return _hsic(one_EE, other_EE) / scale**0.5 if scale > 0 else 0.0


def _hsic(one_EE: Tensor, other_EE: Tensor) -> float:
    """Unbiased estimate, times E (E - 3), which the quotient cancels."""
    count = len(one_EE)
    one_EE, other_EE = (x - torch.diag(x.diagonal()) for x in (one_EE, other_EE))
    pairs = (one_EE * other_EE).sum()
    apart = one_EE.sum() * other_EE.sum() / ((count - 1) * (count - 2))
    shared = 2 * (one_EE.sum(0) @ other_EE.sum(0)) / (count - 2)
    return float(pairs + apart - shared)


def mutual_neighbours(one_ED: Tensor, other_ED: Tensor) -> float:
    """Mean share of an image's nearest images (cosine) that both representations agree on."""
    near = [_nearest(x) for x in (one_ED, other_ED)]
    return float((near[0] & near[1]).sum(1).double().mean() / near[0][0].sum())


def _nearest(features_ED: Tensor) -> Tensor:
    """(E, E) bool: whether the image of the column is one of the row's nearest."""
    unit_ED = F.normalize(features_ED.double(), dim=-1)
    cosine_EE = (unit_ED @ unit_ED.T).fill_diagonal_(-torch.inf)
    chosen = cosine_EE.topk(_neighbours(len(features_ED)), dim=1).indices
    return torch.zeros_like(cosine_EE, dtype=torch.bool).scatter_(1, chosen, True)


def _neighbours(images: int) -> int:
    return min(NEIGHBOURS, images // 4)


# ---- images --------------------------------------------------------------------------------------


def _source(run: "Run") -> Loader:
    return run.validation or run.loader


def _limit(run: "Run") -> int:
    return min(run.config.log.validate_images, MOST)


def _in_lock_step(run: "Run") -> Iterable[tuple[MicroBatch, bool]]:
    """This process' share of the images, on its device, and whether they count: where weights are
    gathered, all processes make as many forward passes."""
    source, limit = _source(run), _limit(run)
    images = min(limit, source.num_samples)
    rounds = range(-(-images // (source.batch_size * run.world.size)))
    for _, micro in zip_longest(rounds, source.in_order(limit)):
        shown = micro or source.spare()
        yield shown.to(run.world.device), micro is not None


def _mean_by_image(values_BTD: Tensor, micro: MicroBatch) -> Tensor:
    """(E, D) float32: the mean over each image's HYBNEXT positions."""
    positions = micro.batch.positions["hybnext"]
    values_ND = values_BTD.flatten(0, 1).index_select(0, positions.flat_N)
    return _mean(values_ND.float(), positions.image_N, micro.batch.num_images)


def _target_of(micro: MicroBatch, name: str) -> Tensor:
    """(E, D): the target itself, or the mean of an image's patches."""
    values = micro.features[name].values.float()
    if values.ndim == 2:
        return values
    positions = micro.batch.positions["hybnext"]
    values_ND = values[positions.image_N, positions.cell_N]
    return _mean(values_ND, positions.image_N, micro.batch.num_images)


def _mean(values_ND: Tensor, image_N: Tensor, images: int) -> Tensor:
    sums_ED = values_ND.new_zeros(images, values_ND.shape[-1]).index_add_(0, image_N, values_ND)
    counts_E = torch.bincount(image_N, minlength=images)
    return sums_ED / counts_E.clamp(min=1)[:, None]


def _gathered(parts: Sequence[Tensor], world: World) -> Tensor:
    """The rows of all processes, on each of them; processes without any must know the width."""
    own_ED = torch.cat(list(parts)) if parts else torch.zeros(0, 0)
    if world.size == 1:
        return own_ED
    shapes: list[tuple[int, int]] = [(0, 0)] * world.size
    dist.all_gather_object(shapes, tuple(own_ED.shape))
    rows, width = max(r for r, _ in shapes), max(w for _, w in shapes)
    padded_ED = torch.zeros(rows, width)
    padded_ED[: len(own_ED), : own_ED.shape[1]] = own_ED
    all_of = [torch.zeros_like(padded_ED) for _ in shapes]
    dist.all_gather(all_of, padded_ED)
    return torch.cat([each[:count] for each, (count, _) in zip(all_of, shapes, strict=True)])


# ---- picture -------------------------------------------------------------------------------------


def drawn(found: Probe, aligned: Sequence[int], title: str) -> Image.Image:
    """Both measures over the blocks; the aligned ones are marked."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    names = {"cka": "linear CKA", "knn": f"mutual {_neighbours(found.images)} nearest neighbours"}
    for axes, (measure, name) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for target, measures in found.scores.items():
            values = measures[measure]
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4, label=target)
        for layer in aligned:
            axes.axvline(layer, color="0.75", linewidth=6, alpha=0.5, zorder=0)
        if measure == "knn":
            axes.axhline(found.chance, color="0.4", linestyle=":", label="chance")
        axes.set_xlabel("decoder block" + (" (grey: aligned)" if aligned else ""))
        axes.set_ylabel(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
