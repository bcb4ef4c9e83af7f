"""Sequences without padding, and the batch that they become: ids, labels and listed positions.

`layout.py` says where a family's images lie in a `Sample`; from here on nothing knows a format.

Legend: B sequences, T tokens of a padded sequence, N listed positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not trained (the value `F.cross_entropy` ignores)."""

POSITION_SETS = ("hybnext", "holding", "rep", "all", "last")
"""hybnext: x_{t+1} is a code (the paper's <HYBNEXT>, default). holding: x_t is a code. rep: the
extra token before an image (the paper's ablation). all: every position of the image's span,
separators too. last: the position that holds the last code, the first to have seen the image whole.
"""

LOOKING_AHEAD = ("hybnext", "rep")
"""Those that never lie on the last token of a sequence."""

Place = tuple[int, int]
"""(which image of the sample, which raster cell), with -1 for none."""
NOWHERE: Place = (-1, -1)


@dataclass(frozen=True)
class Sample:
    """One sequence without padding. Lists have one entry per token."""

    ids: list[int]
    trained: list[bool]  # x_t is a label (of position t - 1)
    sets: dict[str, list[Place]]  # position set -> where in an image each position belongs
    num_images: int


@dataclass(frozen=True)
class Positions:
    """A set of positions, listed: no boolean gather, hence no host sync, on the hot path."""

    flat_N: Tensor  # index into the flattened (B*T) positions
    image_N: Tensor  # which image of the batch
    cell_N: Tensor  # which raster cell of it; -1 where the set has no cell (rep, all)


@dataclass(frozen=True)
class Batch:
    """Padded sequences, right-padded, with everything the objective needs to know about them."""

    ids_BT: Tensor
    attention_BT: Tensor  # bool, False on padding
    labels_BT: Tensor  # x_{t+1} where trained, else IGNORE: position t predicts labels_BT[:, t]
    trained_N: Tensor  # flat positions with a label, so that the loss need not search for them
    positions: Mapping[str, Positions]
    num_images: int

    @property
    def labels_N(self) -> Tensor:
        return self.labels_BT.flatten()[self.trained_N]

    def without_last(self) -> "Batch":
        """Without the last column, which no label and no set of `LOOKING_AHEAD` lies in: what only
        has positions that predict need not compute it. The other sets are left out."""
        if self.ids_BT.shape[1] < 2:
            return self

        def moved(flat_N: Tensor) -> Tensor:
            return flat_N - flat_N // self.ids_BT.shape[1]

        positions = {
            name: Positions(moved(p.flat_N), p.image_N, p.cell_N)
            for name, p in self.positions.items()
            if name in LOOKING_AHEAD
        }
        return Batch(
            self.ids_BT[:, :-1].contiguous(),
            self.attention_BT[:, :-1].contiguous(),
            self.labels_BT[:, :-1].contiguous(),
            moved(self.trained_N),
            positions,
            self.num_images,
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with `change` applied to every tensor."""
        positions = {
            name: Positions(change(p.flat_N), change(p.image_N), change(p.cell_N))
            for name, p in self.positions.items()
        }
        return Batch(
            change(self.ids_BT),
            change(self.attention_BT),
            change(self.labels_BT),
            change(self.trained_N),
            positions,
            self.num_images,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return self.mapped(lambda tensor: tensor.to(device))


def collate(samples: Sequence[Sample], pad: int, *, pad_to: int | None = None) -> Batch:
    """Pads samples on the right with the id `pad`, to the longest or to `pad_to` tokens, and lists
    their positions.

    Images are numbered through the batch in order, so that row i of a target tensor belongs to
    image i.
    """
    length = max(pad_to or 0, *(len(s.ids) for s in samples))
    ids = torch.full((len(samples), length), pad)
    labels = torch.full((len(samples), length), IGNORE)
    attention = torch.zeros(len(samples), length, dtype=torch.bool)
    listed: dict[str, list[tuple[int, int, int]]] = {name: [] for name in POSITION_SETS}
    first_image = 0
    for row, sample in enumerate(samples):
        n = len(sample.ids)
        row_ids = torch.tensor(sample.ids)
        ids[row, :n] = row_ids
        attention[row, :n] = True
        predicted = torch.tensor(sample.trained[1:], dtype=torch.bool)
        labels[row, : n - 1] = torch.where(predicted, row_ids[1:], IGNORE)
        for name, places in sample.sets.items():
            listed[name] += [
                (row * length + t, first_image + image, cell)
                for t, (image, cell) in enumerate(places)
                if image >= 0
            ]
        first_image += sample.num_images
    positions = {
        name: Positions(*torch.tensor(rows, dtype=torch.long).view(-1, 3).unbind(1))
        for name, rows in listed.items()
    }
    trained_N = (labels.flatten() != IGNORE).nonzero().flatten()
    return Batch(ids, attention, labels, trained_N, positions, first_image)
