"""The painting loop: fixed shapes, a static cache, guided and unguided rows in one batch.

A picture is a function of the model, the prompt, the seed, the sampling settings and `slots`, to
the last bit, whoever else is being painted. Matrix products differ in the last bit between shapes,
so every shape is fixed: each forward has `slots` images (idle slots paint the empty prompt and are
dropped), and the padded width of a prompt follows from its own length alone.

Legend: N images of a batch (= slots), B rows (N guided, then N unguided if guidance is on), T new
tokens, C cache columns, D model width, K codes, P cells of an image, n tokens of a caption, F width
of its features, S slots of a caption.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arra.generate.sampling import guide, sample, uniforms
from arra.generate.settings import Sampling, check_slots
from arra.layout import DecodePlan
from arra.models.base import Backbone
from arra.text_features import TextFeatures

PROMPT_STEP = 16
"""Prompts are left-padded to a multiple of this, with at least one padding column: without any,
attention would skip the mask, and one unpadded batch would differ in the last bit from the rest."""


@dataclass(frozen=True)
class Request:
    """One picture to paint."""

    prefix: tuple[int, ...]  # `Backbone.condition(prompt, grid)`
    seed: int
    text_nF: Tensor | None = None  # the prompt's features, for a model that takes them; None: empty


@dataclass(frozen=True)
class Painted:
    """A finished batch: `codes_Nhw[i]` (int64, CPU) answers request number `indices[i]`."""

    indices: list[int]
    codes_Nhw: Tensor


def paint(
    backbone: Backbone,
    requests: Sequence[Request],
    grid: tuple[int, int],
    sampling: Sampling,
    slots: int,
) -> Iterator[Painted]:
    """Paints all requests, yielding batch after batch; requests of one width share batches.

    Args:
        grid: (height, width) in codes.
        slots: images per forward pass.

    Raises:
        ValueError: the image does not fit the model's length, or the logits are not finite.
    """
    check_slots(slots)
    steps = _Steps.of(backbone, grid)
    longest = max((len(request.prefix) for request in requests), default=0)
    assert longest <= backbone.room(grid), "Backbone.condition cuts to the room"
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        prefix = request.prefix
        longest = max(len(prefix), len(backbone.without_prompt(prefix, grid)))
        groups.setdefault(_width(longest), []).append(index)
    for width, indices in sorted(groups.items()):
        batch = _Batch(backbone, grid, steps, sampling, slots, width)
        for start in range(0, len(indices), slots):
            chosen = indices[start : start + slots]
            with _evaluating(backbone):
                codes_NP = batch.paint([requests[i] for i in chosen])
            yield Painted(chosen, codes_NP[: len(chosen)].view(-1, *grid))


def _width(length: int) -> int:
    return (length // PROMPT_STEP + 1) * PROMPT_STEP


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    """Without dropout, and as it was afterwards: the training loop paints samples too."""
    was_training = backbone.model.training
    backbone.model.eval()
    try:
        yield
    finally:
        backbone.model.train(was_training)


@dataclass(frozen=True)
class _Steps:
    """A decode plan folded into forwards: one for prompt and opening tokens together, then one per
    token. What follows the last code is not fed at all."""

    opening: list[int]  # forced tokens before the first code
    following: list[list[int]]  # forced tokens after each code, up to the next one; P entries

    @staticmethod
    def of(backbone: Backbone, grid: tuple[int, int]) -> "_Steps":
        plan: DecodePlan = backbone.layout.plan(*grid)
        runs: list[list[int]] = [[]]
        for step, (forced, cell) in enumerate(
            zip(plan.forced_S.tolist(), plan.cell_S.tolist(), strict=True)
        ):
            if cell < 0:
                runs[-1].append(forced)
            else:
                assert cell == len(runs) - 1, f"step {step}: codes come in raster order"
                runs.append([])
        return _Steps(runs[0], runs[1:])

    def columns(self, width: int) -> int:
        """Cache columns that painting behind a prompt of `width` fills."""
        return width + len(self.opening) + sum(1 + len(run) for run in self.following[:-1])


class _Batch:
    """Paints `slots` images at a time behind prompts of one width, in one cache."""

    def __init__(
        self,
        backbone: Backbone,
        grid: tuple[int, int],
        steps: _Steps,
        sampling: Sampling,
        slots: int,
        width: int,
    ) -> None:
        self.backbone, self.grid, self.steps, self.sampling = backbone, grid, steps, sampling
        self.slots, self.width = slots, width
        self.guided = sampling.cfg != 1
        self.cache: Any = None
        self.code_ids_K = torch.tensor(backbone.layout.code_ids, device=backbone.device)

    @torch.inference_mode()
    def paint(self, requests: Sequence[Request]) -> Tensor:
        """Codes (N, P), idle slots included."""
        empty = Request(tuple(self.backbone.null_condition(self.grid)), seed=0)
        painted = [*requests, *([empty] * (self.slots - len(requests)))]
        rows = [request.prefix for request in painted]
        if self.guided:
            rows += [tuple(self.backbone.without_prompt(row, self.grid)) for row in rows]
        cells = len(self.steps.following)
        uniform_NP = uniforms([request.seed for request in painted], cells)
        uniform_NP = uniform_NP.to(self.backbone.device)
        mask_BC, position_B, hidden_BD = self._prefill(rows, self._text(painted))
        column = self.width + len(self.steps.opening)
        finite_N = torch.ones(self.slots, dtype=torch.bool, device=self.backbone.device)
        drawn: list[Tensor] = []
        with self.backbone.decoding():
            for cell, run in enumerate(self.steps.following):
                logits_NK = self._logits(hidden_BD)
                finite_N &= logits_NK.amax(-1).isfinite()
                drawn.append(sample(logits_NK, uniform_NP[:, cell], self.sampling))
                if cell == cells - 1:
                    break
                for ids_B in self._next_ids(drawn[-1], run):
                    mask_BC[:, column] = True
                    ids_B1, position_B1 = ids_B[:, None], position_B[:, None]
                    hidden_BTD = self.backbone.step(ids_B1, position_B1, mask_BC, self.cache)
                    column, position_B = column + 1, position_B + 1
                hidden_BD = hidden_BTD[:, -1]
        if not finite_N[: len(requests)].all():
            raise ValueError(
                "the model's logits are not finite: its weights are damaged or its training "
                "diverged; use an earlier checkpoint"
            )
        return torch.stack(drawn, 1).cpu()

    def _text(self, painted: Sequence[Request]) -> TextFeatures | None:
        """The prompts' features for all rows; an unguided row is dropped, and keeps its mask."""
        slots, width = self.backbone.text_slots, self.backbone.text_width
        if not slots:
            return None
        captions = [request.text_nF for request in painted]
        dropped = [False] * len(captions)
        if self.guided:
            captions, dropped = captions * 2, dropped + [True] * len(captions)
        return TextFeatures.of(captions, dropped, slots, width).to(self.backbone.device)

    def _prefill(
        self, rows: Sequence[tuple[int, ...]], text: TextFeatures | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts and opening tokens in one forward: mask (B, C), next position (B,), hidden."""
        opening, device = list(self.steps.opening), self.backbone.device
        length = self.width + len(opening)
        pads = [self.width - len(row) for row in rows]
        ids = [
            [self.backbone.layout.pad] * pad + [*row, *opening]
            for pad, row in zip(pads, rows, strict=True)
        ]
        ids_BT = torch.tensor(ids, device=device)
        pad_B = torch.tensor(pads, device=device)
        columns_T = torch.arange(length, device=device)
        mask_BC = torch.zeros(
            len(rows), self.steps.columns(self.width), dtype=torch.bool, device=device
        )
        mask_BC[:, :length] = columns_T >= pad_B[:, None]
        if text is not None:  # a caption's own padding stays masked in all later steps
            slot_BS = pad_B[:, None] + torch.arange(text.mask_BN.shape[1], device=device)
            mask_BC.scatter_(1, slot_BS, text.mask_BN)
        positions_BT = (columns_T - pad_B[:, None]).clamp(min=0)
        if self.cache is None:
            self.cache = self.backbone.new_cache(mask_BC.shape[1])
        else:
            self.cache.reset()
        hidden_BTD = self.backbone.step(ids_BT, positions_BT, mask_BC, self.cache, text)
        return mask_BC, length - pad_B, hidden_BTD[:, -1]

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        """Logits of the legal codes with guidance, (N, K)."""
        logits_BK = self.backbone.head(hidden_BD)[:, self.code_ids_K]
        if logits_BK.dtype in (torch.bfloat16, torch.float16):
            # Guidance takes a difference, which 8 bits of each side would not survive.
            logits_BK = logits_BK.float()
        if not self.guided:
            return logits_BK
        guided_NK, unguided_NK = logits_BK.chunk(2)
        return guide(guided_NK, unguided_NK, self.sampling.cfg)

    def _next_ids(self, codes_N: Tensor, run: list[int]) -> list[Tensor]:
        """The drawn codes as token ids, then what follows them by rule, each for all rows (B,)."""
        code_B = self.code_ids_K[codes_N]
        if self.guided:
            code_B = torch.cat([code_B, code_B])
        return [code_B, *(torch.full_like(code_B, token) for token in run)]
