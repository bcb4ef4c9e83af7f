"""A lane whose forward passes hold a window of drafts for each row (`speculative.py`).

Every picture takes the same number of rows, one or two, so that picture n sits in rows n, or 2n and
2n + 1: what is kept per picture lies in tables of pictures, not of rows. Windows of one width go
together in one pass, of all rows, whoever has another width computes what nobody reads: so a
picture's shapes follow from its own drafts alone, and its pixels do not depend on its neighbours.

One number per picture comes back from the device after each pass: how far it is.

Legend: R rows, N pictures, W steps of a window, S steps, D model width, K codes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from arra.generate.lane import Lane, Seat
from arra.generate.request import Painted, Request
from arra.generate.sampling import RowSampling, code_probabilities, guide, sample
from arra.generate.settings import Speculation
from arra.generate.speculative import Drafts
from arra.generate.tree import Branches
from arra.models.base import Backbone


class SpeculativeLane(Lane):
    """A number of rows that paint several codes per pass where the model foresaw them.

    Args:
        rows_each: of a picture: 2 with guidance, 1 without.
    """

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
        super().__init__(backbone, rows, columns, compiled=compiled)
        device, pictures = backbone.device, rows // rows_each
        self._window = speculation.width
        self._drafts = self._new_drafts(pictures, speculation)
        self._rows_each = rows_each
        self._leader_N = torch.arange(pictures, device=device) * rows_each
        self._picture_R = (torch.arange(rows, device=device) // rows_each).clamp(max=pictures - 1)
        self._begun_R = torch.zeros(rows, dtype=torch.long, device=device)
        self._widths = [self._window] * pictures
        self._look_now = self._look
        if compiled:
            self._look_now = torch.compile(self._look, dynamic=False)

    def _new_drafts(self, pictures: int, speculation: Speculation) -> Drafts | Branches:
        return Drafts(
            pictures,
            self.columns,
            self._window,
            len(self.backbone.layout.code_ids),
            coupled=speculation.mode == "scd",
            adaptive=speculation.adaptive,
            device=self.backbone.device,
            dtype=self._dtype,
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Of probabilities."""
        return torch.promote_types(next(self.backbone.model.parameters()).dtype, torch.float32)

    # ---- who sits where -------------------------------------------------------------------------

    def admit(self, arrivals: Iterable[tuple[int, Request]]) -> None:
        before = set(self._seats)
        super().admit(arrivals)
        self._start([seat for ticket, seat in self._seats.items() if ticket not in before])

    @torch.inference_mode()
    def release(self, ticket: int) -> Request | None:
        seat = self._seats.get(ticket)
        if seat is not None:
            self._drafts.end([self._picture(seat)])
            self._begun_R[list(seat.rows)] = 0
        return super().release(ticket)

    def _start(self, seats: list[Seat]) -> None:
        """Draws first codes, from what the prompts' pass left, and opens windows behind them."""
        if not seats:
            return
        state, drafts = self._state, self._drafts
        assert state.hidden_RD is not None
        rows = RowSampling(
            state.temperature_R, state.top_k_R, state.top_p_R, self._filtered, self._greedy
        )
        logits_RK = self._guided(self.backbone.head(state.hidden_RD), state.scale_RS[:, :1])
        state.finite_R.logical_and_(logits_RK.amax(-1).isfinite() | (state.active_R == 0))
        first_R = sample(logits_RK, state.uniform_RS[:, 0], rows)
        p_RK = code_probabilities(logits_RK, rows)
        for seat in seats:
            start_S, *tables = self._tables_of(seat, p_RK[seat.rows[0]])
            start_S = start_S.to(first_R.device)
            start_S[0] = first_R[seat.rows[0]]
            forced_S = torch.tensor(seat.steps.forced) >= 0
            picture = self._picture(seat)
            drafts.begin([picture], *(table[None] for table in (start_S, forced_S, *tables)))
            self._widths[picture] = drafts.first_width
            self._begun_R[list(seat.rows)] = state.position_R[list(seat.rows)]
            seat.done = 1

    def _tables_of(self, seat: Seat, p_K: Tensor) -> tuple[Tensor, ...]:
        """A picture's codes to begin with (S,), sources of drafts (S,) and uniforms (S, W).

        The first draft of a code is a copy of the one above it, in the first row of the one before.
        """
        steps, width = len(seat.steps.forced), seat.request.grid[1]
        draw = torch.Generator().manual_seed(seat.request.seed)
        shape = (steps, self._window + 1)
        # The first ones of this stream draw the first code, and nothing else here.
        torch.rand(steps, generator=draw, dtype=torch.float64)
        uniform = torch.rand(shape, generator=draw, dtype=torch.float64)
        start_S = (uniform[:, -1] * len(self.backbone.layout.code_ids)).long()
        source_S = torch.zeros(steps, dtype=torch.long)
        step_of_P = [step for step, token in enumerate(seat.steps.forced) if token < 0]
        for cell in range(1, len(step_of_P)):
            source_S[step_of_P[cell]] = step_of_P[cell - width if cell >= width else cell - 1]
        return start_S, source_S, uniform[:, :-1]

    # ---- going on -------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """One pass over every picture's window."""
        drafts = self._drafts
        pictures = [self._picture(seat) for seat in self._seats.values() if not seat.finished]
        for width in sorted({self._widths[picture] for picture in pictures}):
            self._look_now(width, self._filtered, self._greedy)
            self.forwards += 1
        ends, self._widths = torch.stack([drafts.final_N, drafts.width_N]).tolist()
        for seat in self._seats.values():
            seat.done = ends[self._picture(seat)]

    def _picture(self, seat: Seat) -> int:
        return seat.rows[0] // self._rows_each

    def _painted(self, seat: Seat) -> Painted:
        picture = self._picture(seat)
        forwards, kept = int(self._drafts.passes_N[picture]) - 1, int(self._drafts.kept_N[picture])
        return Painted(seat.ticket, self._codes(seat), forwards=forwards, kept=kept)

    def _drawn(self, seat: Seat) -> Tensor:
        return self._drafts.code_NS[self._picture(seat)]

    def _look(self, width: int, filtered: bool, greedy: bool) -> None:
        """A forward pass over the windows of this width, and what follows from it."""
        drafts, state, leader_N = self._drafts, self._state, self._leader_N
        step_NW = drafts.propose(width)
        # What a step follows from is the token before it.
        fed_NW = (step_NW - 1).clamp(min=0)
        forced_NW = state.forced_RS[leader_N].gather(1, fed_NW.clamp(max=self.columns - 1))
        code_NW = self._code_ids_K[drafts.fed(step_NW)]
        token_NW = torch.where(forced_NW >= 0, forced_NW, code_NW)
        # Beyond the picture all stands at its last code's place, which no step sees.
        last_NW = fed_NW.minimum((drafts.length_N[:, None] - 1).clamp(min=0))
        position_RW = self._begun_R[:, None] + last_NW[self._picture_R]
        hidden_RWD = self.backbone.step(token_NW[self._picture_R], position_RW, self._cache)
        scale_NW = state.scale_RS[leader_N].gather(1, step_NW.clamp(max=self.columns - 1))
        logits_NWK = self._guided_windows(hidden_RWD, scale_NW)
        is_code_NW = drafts.live(step_NW) & ~drafts.forced_NS.gather(1, step_NW)
        is_fine_N = (logits_NWK.amax(-1).isfinite() | ~is_code_NW).all(1)
        state.finite_R.logical_and_(is_fine_N[self._picture_R])
        drafts.judge(self._distributions(logits_NWK, filtered, greedy))

    def _guided_windows(self, hidden_RWD: Tensor, scale_NW: Tensor) -> Tensor:
        """Logits of the legal codes with guidance, (N, W, K)."""
        rows, width, _ = hidden_RWD.shape
        head_XV = self.backbone.head(hidden_RWD.flatten(0, 1))
        logits_RWK = self._code_logits(head_XV).view(rows, width, -1)
        guided_NWK = logits_RWK[self._leader_N]
        if self._rows_each == 1:
            return guided_NWK
        scale_NW1 = scale_NW[..., None]
        mixed_NWK = guide(guided_NWK, logits_RWK[self._leader_N + 1], scale_NW1)
        return torch.where(scale_NW1 == 1, guided_NWK, mixed_NWK)

    def _distributions(self, logits_NWK: Tensor, filtered: bool, greedy: bool) -> Tensor:
        """What a code is drawn from at each step, (N, W, K)."""
        state, (_, width, codes) = self._state, logits_NWK.shape
        each_X = self._leader_N.repeat_interleave(width)
        rows = RowSampling(
            state.temperature_R[each_X],
            state.top_k_R[each_X],
            state.top_p_R[each_X],
            filtered,
            greedy,
        )
        p_NWK = code_probabilities(logits_NWK.flatten(0, 1), rows)
        p_NWK = p_NWK.view_as(logits_NWK)
        if filtered:
            p_NWK = p_NWK / p_NWK.sum(-1, keepdim=True)
        if greedy:
            best_NWK = torch.nn.functional.one_hot(logits_NWK.argmax(-1), codes).to(p_NWK.dtype)
            is_greedy_N = state.temperature_R[self._leader_N] == 0
            p_NWK = torch.where(is_greedy_N[:, None, None], best_NWK, p_NWK)
        return p_NWK
