"""What can be asked of the painter, and what it answers.

Legend: n tokens of a caption, F width of its features, h and w codes per side.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from arra.generate.settings import Sampling
from arra.layout import Layout
from arra.models.base import Backbone, Grid


@dataclass(frozen=True)
class Request:
    """One picture to paint."""

    prefix: tuple[int, ...]  # `Backbone.condition(prompt, grid)`
    seed: int
    grid: Grid
    sampling: Sampling
    text_nF: Tensor | None = None  # the prompt's features, for a model that takes them; None: empty
    streamed: bool = False  # whether its rows of codes are told as they are painted

    @property
    def rows(self) -> int:
        """Rows of a forward pass that it takes: with guidance, an unguided one besides its own."""
        return 1 if self.sampling.cfg == 1 else 2


@dataclass(frozen=True)
class Painted:
    """A finished picture."""

    ticket: int
    codes_hw: Tensor  # int64, CPU
    forwards: int  # passes that it took part in, the prompt's not counted
    kept: int = 0  # codes that were drafts and stayed (speculative decoding)


@dataclass(frozen=True)
class RowsPainted:
    """A part of a streamed picture: all of its rows of codes up to now."""

    ticket: int
    codes_hw: Tensor  # int64, CPU; the height is that of what is painted


Event = Painted | RowsPainted


@dataclass(frozen=True)
class Steps:
    """A decode plan in the painter's words: one entry per token behind the prompt, up to the last
    code. What follows the last code is not fed at all."""

    opening: tuple[int, ...]  # forced tokens before the first code: they come with the prompt
    forced: tuple[int, ...]  # from the first code on: the token the format dictates, -1: a code

    @classmethod
    def of(cls, layout: Layout, grid: Grid) -> "Steps":
        plan = layout.plan(*grid)
        forced = tuple(plan.forced_S.tolist())
        cells = [cell for cell in plan.cell_S.tolist() if cell >= 0]
        assert cells == list(range(len(cells))), "codes come in raster order"
        first = forced.index(-1)
        last = len(forced) - forced[::-1].index(-1)
        return cls(forced[:first], forced[first:last])

    @cached_property
    def cells_before(self) -> tuple[int, ...]:
        """How many codes there are before each step, and at the end."""
        counts = [0]
        for token in self.forced:
            counts.append(counts[-1] + (token < 0))
        return tuple(counts)


def columns_of(backbone: Backbone, request: Request) -> tuple[int, int]:
    """(tokens before the first code, cache columns) that a request fills."""
    unguided = backbone.without_prompt(request.prefix, request.grid)
    steps = Steps.of(backbone.layout, request.grid)
    begun = max(len(request.prefix), len(unguided)) + len(steps.opening)
    return begun, begun + len(steps.forced)
