"""A lane whose forward passes hold a tree of drafts for each row (`tree.py`).

In the cache a tree's nodes have columns of their own behind the root's; after the pass, keys and
values of those that became final move to where they belong.

Legend: R rows, N pictures, T nodes, D levels, S steps, K codes.
"""

import torch
from torch import Tensor

from arra.generate.lane import Seat
from arra.generate.settings import Speculation
from arra.generate.speculative_lane import SpeculativeLane
from arra.generate.tree import Branches, gumbel
from arra.models.base import Backbone


class TreeLane(SpeculativeLane):
    """A number of rows that paint several codes per pass where the noise let them be foreseen."""

    def __init__(
        self,
        backbone: Backbone,
        rows: int,
        columns: int,
        speculation: Speculation,
        rows_each: int,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__(backbone, rows, columns, speculation, rows_each, compiled=compiled)
        self._cache = backbone.new_cache(rows, columns + self._window)
        self._cache.branch(self._branches.tree.above_TT.to(backbone.device))

    def _new_drafts(self, pictures: int, speculation: Speculation) -> Branches:
        self._branches = Branches(
            pictures,
            self.columns,
            speculation.width,
            len(self.backbone.layout.code_ids),
            device=self.backbone.device,
            dtype=self._dtype,
        )
        return self._branches

    def _tables_of(self, seat: Seat, p_K: Tensor) -> tuple[Tensor, ...]:
        """A picture's codes to begin with (S,), the first one's distribution (K,), noise (S, K)."""
        steps = len(seat.steps.forced)
        draw = torch.Generator().manual_seed(seat.request.seed)
        # The first ones of this stream draw the first code, and nothing else here.
        torch.rand(steps, generator=draw, dtype=torch.float64)
        noise_SK = gumbel(draw, steps, len(p_K))
        if seat.request.sampling.temperature == 0:
            noise_SK = torch.zeros_like(noise_SK)
        return torch.zeros(steps, dtype=torch.long), p_K, noise_SK

    def _look(self, width: int, filtered: bool, greedy: bool) -> None:
        super()._look(width, filtered, greedy)
        branches = self._branches
        root_N = (branches.final_N - branches.moved_N - 1).clamp(min=0)
        root_R1 = (self._begun_R + root_N[self._picture_R])[:, None]
        to_D = torch.arange(1, branches.tree.levels + 1, device=root_R1.device)
        self._cache.keep(root_R1 + branches.way_ND[self._picture_R], root_R1 + to_D)
