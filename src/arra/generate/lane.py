"""Painting in one shape: so many rows, so many columns, one token per row and forward pass.

A picture is a function of the model, the prompt, the seed, the sampling settings, the number of
rows and the columns of its lane, to the last bit, whoever else is being painted. Matrix products
differ in the last bit between shapes, so every shape is fixed: a forward pass always has all rows
(idle ones compute what nobody reads), prompts are begun in groups of a fixed size, padded to a
width that follows from their own length alone. All that decides a row lies in tensors on the
device, so a step needs nothing from the host and tells it nothing: when a picture is finished
follows from its size.

Legend: R rows, C columns, S steps (tokens behind the prompt, from the first code on), B rows of a
prefill, T tokens, D model width, K codes, N pictures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from arra.generate.native_draw import NativeDraw
from arra.generate.replay import Step
from arra.generate.request import Event, Painted, Request, RowsPainted, Steps
from arra.generate.sampling import RowSampling, filters, guide, is_plain, sample, uniforms
from arra.generate.state import State
from arra.models.base import Backbone
from arra.text_features import TextFeatures

PROMPT_STEP = 16
"""Prompts are padded to a multiple of this, so that few widths occur."""
PREFILL_ROWS = 8
"""Rows that begin together in one forward pass; where fewer begin, the others are idle."""


@dataclass
class Seat:
    """A picture being painted."""

    ticket: int
    request: Request
    rows: tuple[int, ...]  # guided, then unguided if there is one
    steps: Steps
    done: int = 0  # steps

    @property
    def finished(self) -> bool:
        return self.done == len(self.steps.forced)

    @property
    def rows_painted(self) -> int:
        """Whole rows of codes."""
        return self.steps.cells_before[self.done] // self.request.grid[1]


class Lane:
    """A number of rows that paint side by side, each picture at its own place.

    Args:
        rows: of a forward pass.
        columns: tokens that a row may have.
        compiled: compile the decode step (`torch.compile`); the first step then takes long.
    """

    def __init__(
        self, backbone: Backbone, rows: int, columns: int, *, compiled: bool = False
    ) -> None:
        self.backbone, self.rows, self.columns = backbone, rows, columns
        self.forwards = 0  # decode steps of all rows, prompts not counted
        self._seats: dict[int, Seat] = {}
        self._free = list(range(rows))
        self._cache = backbone.new_cache(rows, columns)
        self._state = State.idle(rows, columns, backbone.device)
        self._code_ids_K = torch.tensor(backbone.layout.code_ids, device=backbone.device)
        self._code_columns = _columns_of(self._code_ids_K)
        self._native_draw: NativeDraw | None = None
        dtype = next(backbone.model.parameters()).dtype
        follow_each_other = isinstance(self._code_columns, slice)
        if not compiled and follow_each_other and NativeDraw.serves(backbone.device, dtype):
            self._native_draw = NativeDraw(self._state, self._code_ids_K)
        self._filtered = self._greedy = False  # whether any row may be, as RowSampling says it
        self._draw_now = {
            kind: Step(partial(self._draw, *kind), backbone.device, compiled=compiled)
            for kind in product((False, True), repeat=2)
        }
        self._feed_now = Step(self._feed, backbone.device, compiled=compiled)

    # ---- who sits where -------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._seats)

    @property
    def tickets(self) -> list[int]:
        return sorted(self._seats)

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    def admit(self, arrivals: Iterable[tuple[int, Request]]) -> None:
        """Seats pictures, which must not need more rows than are free, and begins them."""
        seats = []
        for ticket, request in arrivals:
            rows = tuple(self._free[: request.rows])
            assert len(rows) == request.rows, "there are not so many rows free"
            del self._free[: request.rows]
            steps = Steps.of(self.backbone.layout, request.grid)
            self._seats[ticket] = Seat(ticket, request, rows, steps)
            seats.append(self._seats[ticket])
        if seats:
            self._prepare(seats)
            self._prefill(seats)

    @torch.inference_mode()  # as whoever made the state
    def release(self, ticket: int) -> Request | None:
        """Frees a picture's rows at once; None: it does not sit here."""
        seat = self._seats.pop(ticket, None)
        if seat is None:
            return None
        rows = list(seat.rows)
        self._free = sorted(self._free + rows)
        state = self._state
        state.active_R[rows] = state.position_R[rows] = state.step_R[rows] = 0
        if not self._seats:
            self._filtered = self._greedy = False
        return seat.request

    # ---- beginning ------------------------------------------------------------------------------

    def _prepare(self, seats: Sequence[Seat]) -> None:
        """Writes what decides these pictures into their rows."""
        state = self._state
        for seat in seats:
            request, rows, length = seat.request, list(seat.rows), len(seat.steps.forced)
            prefixes = self._prefixes(seat)
            begun = [len(prefix) for prefix in prefixes]
            state.leader_R[rows], state.partner_R[rows] = rows[0], rows[-1]
            state.position_R[rows] = torch.tensor(begun, device=state.position_R.device)
            state.step_R[rows], state.active_R[rows], state.finite_R[rows] = 0, 1, True
            tables = _tables(seat)
            for table_RS, values_S in zip(
                (state.forced_RS, state.uniform_RS, state.scale_RS), tables, strict=True
            ):
                table_RS[rows, :length] = values_S.to(table_RS.device)
            sampling = request.sampling
            state.temperature_R[rows] = sampling.temperature
            state.top_k_R[rows], state.top_p_R[rows] = sampling.top_k, sampling.top_p
            self._filtered |= filters(sampling)
            self._greedy |= sampling.temperature == 0

    def _prefixes(self, seat: Seat) -> list[list[int]]:
        """What stands before the first code, for each of a picture's rows."""
        request = seat.request
        prefixes = [list(request.prefix)]
        if len(seat.rows) > 1:
            prefixes.append(list(self.backbone.without_prompt(request.prefix, request.grid)))
        return [[*prefix, *seat.steps.opening] for prefix in prefixes]

    def _prefill(self, seats: Sequence[Seat]) -> None:
        """Prompts and opening tokens, rows of one width together."""
        groups: dict[int, list[Opening]] = {}
        for seat in seats:
            for number, prefix in enumerate(self._prefixes(seat)):
                row, unguided = seat.rows[number], number > 0
                opening = Opening(row, prefix, seat.request.text_nF, unguided)
                groups.setdefault(self._width(len(prefix)), []).append(opening)
        at_once = min(self.rows, PREFILL_ROWS)
        for width, openings in sorted(groups.items()):
            for start in range(0, len(openings), at_once):
                self._begin(openings[start : start + at_once], at_once, width)

    def _width(self, length: int) -> int:
        return min(-(-length // PROMPT_STEP) * PROMPT_STEP, self.backbone.max_length)

    def _begin(self, openings: Sequence["Opening"], at_once: int, width: int) -> None:
        device, pad = self.backbone.device, self.backbone.layout.pad
        idle = at_once - len(openings)
        ids = [[*each.prefix, *([pad] * (width - len(each.prefix)))] for each in openings]
        ids += [ids[0]] * idle
        rows = [each.row for each in openings]
        rows_B = torch.tensor(rows + [self._cache.nobody] * idle, device=device)
        text = None
        if self.backbone.text_slots:
            text = TextFeatures.of(
                [each.text_nF for each in openings] + [None] * idle,
                [each.unguided for each in openings] + [True] * idle,
                self.backbone.text_slots,
                self.backbone.text_width,
            ).to(device)
        ids_BT = torch.tensor(ids, device=device)
        hidden_BTD = self.backbone.prefill(ids_BT, self._cache, rows_B, text)
        last = torch.tensor([len(each.prefix) - 1 for each in openings], device=device)
        if self._state.hidden_RD is None:
            self._state.hidden_RD = hidden_BTD.new_zeros(self.rows, hidden_BTD.shape[2])
        own = torch.arange(len(openings), device=device)
        self._state.hidden_RD[rows_B[: len(openings)]] = hidden_BTD[own, last]

    # ---- going on -------------------------------------------------------------------------------

    def advance(self) -> list[Event]:
        """Goes on with every row; what is finished leaves."""
        assert self._seats, "nobody sits here"
        seats = list(self._seats.values())
        before = {seat.ticket: seat.rows_painted for seat in seats if seat.request.streamed}
        self._go_on()
        finished = [seat for seat in seats if seat.finished]
        shown = [
            seat
            for seat in seats
            if seat.ticket in before
            and not seat.finished
            and seat.rows_painted > before[seat.ticket]
        ]
        events: list[Event] = [RowsPainted(seat.ticket, self._codes(seat)) for seat in shown]
        if finished:
            self._check_finite(finished)
            events += [self._painted(seat) for seat in finished]
            for seat in finished:
                self.release(seat.ticket)
        return events

    def _go_on(self) -> None:
        """Paints one token in every row."""
        self._draw_now[self._filtered, self._greedy]()
        if any(seat.done + 1 < len(seat.steps.forced) for seat in self._seats.values()):
            self._feed_now()
            self.forwards += 1
        for seat in self._seats.values():
            seat.done += 1

    def _codes(self, seat: Seat) -> Tensor:
        """A picture's whole rows of codes up to now, (h, w)."""
        drawn_S = self._drawn(seat)[: seat.done].cpu()
        is_code_S = torch.tensor([token < 0 for token in seat.steps.forced[: seat.done]])
        width = seat.request.grid[1]
        return drawn_S[is_code_S][: seat.rows_painted * width].view(-1, width)

    def _painted(self, seat: Seat) -> Painted:
        return Painted(seat.ticket, self._codes(seat), forwards=len(seat.steps.forced) - 1)

    def _drawn(self, seat: Seat) -> Tensor:
        """The code of each of its steps, at least up to where it is."""
        return self._state.drawn_RS[seat.rows[0]]

    def _check_finite(self, seats: Sequence[Seat]) -> None:
        if not self._state.finite_R[[seat.rows[0] for seat in seats]].all():
            raise ValueError(
                "the model's logits are not finite: its weights are damaged or its training "
                "diverged; use an earlier checkpoint"
            )

    def _draw(self, filtered: bool, greedy: bool) -> None:
        """The next token of every row: a code that is drawn, or what the format dictates."""
        state = self._state
        assert state.hidden_RD is not None
        head_RV = self.backbone.head(state.hidden_RD)
        rows = RowSampling(state.temperature_R, state.top_k_R, state.top_p_R, filtered, greedy)
        if self._native_draw is not None and head_RV.dtype == torch.bfloat16:
            given_R = None
            if filtered or greedy:  # of other rows: they change no bit of the plain ones
                given_R = torch.where(is_plain(rows), -1, self._sample(head_RV, rows))
            self._native_draw(head_RV, given_R)
            return
        step_R1 = state.step_R[:, None]
        forced_R = state.forced_RS.gather(1, step_R1)[:, 0]
        code_R = self._sample(head_RV, rows)
        state.drawn_RS.scatter_(1, step_R1, code_R[:, None])
        state.step_R.add_(state.active_R)
        state.token_R.copy_(torch.where(forced_R >= 0, forced_R, self._code_ids_K[code_R]))

    def _sample(self, head_RV: Tensor, rows: RowSampling) -> Tensor:
        """A code for every row (R,)."""
        state, step_R1 = self._state, self._state.step_R[:, None]
        logits_RK = self._guided(head_RV, state.scale_RS.gather(1, step_R1))
        state.finite_R.logical_and_(logits_RK.amax(-1).isfinite())
        return sample(logits_RK, state.uniform_RS.gather(1, step_R1)[:, 0], rows)

    def _feed(self) -> None:
        """Appends its next token to every row."""
        state = self._state
        assert state.hidden_RD is not None
        token_R1, position_R1 = state.token_R[:, None], state.position_R[:, None]
        hidden_RTD = self.backbone.step(token_R1, position_R1, self._cache)
        state.hidden_RD.copy_(hidden_RTD[:, 0])
        state.position_R.add_(state.active_R)

    def _guided(self, head_RV: Tensor, scale_R1: Tensor) -> Tensor:
        """Logits of the legal codes with guidance (R, K); both rows of a picture have the same."""
        logits_RK = self._code_logits(head_RV)
        guided_RK = logits_RK.index_select(0, self._state.leader_R)
        unguided_RK = logits_RK.index_select(0, self._state.partner_R)
        # Infinity has no difference to itself.
        return torch.where(scale_R1 == 1, guided_RK, guide(guided_RK, unguided_RK, scale_R1))

    def _code_logits(self, head_RV: Tensor) -> Tensor:
        """Those of the legal codes, (R, K), in float32 at least."""
        logits_RK = head_RV[:, self._code_columns]
        if logits_RK.dtype in (torch.bfloat16, torch.float16):
            # Guidance takes a difference, which 8 bits of each side would not survive.
            logits_RK = logits_RK.float()
        return logits_RK


def _columns_of(ids_K: Tensor) -> slice | Tensor:
    """An index of these columns: one that copies nothing where they follow each other."""
    first, count = int(ids_K[0]), len(ids_K)
    return slice(first, first + count) if bool((ids_K.diff() == 1).all()) else ids_K


@dataclass(frozen=True)
class Opening:
    """A row that begins."""

    row: int
    prefix: list[int]
    text_nF: Tensor | None
    unguided: bool


def _tables(seat: Seat) -> tuple[Tensor, Tensor, Tensor]:
    """A picture's forced tokens, uniforms and scales of guidance, one per step (S,)."""
    steps, sampling = seat.steps, seat.request.sampling
    forced_S = torch.tensor(steps.forced)
    is_code_S = forced_S < 0
    cells = steps.cells_before[-1]
    uniform_S = torch.zeros(len(forced_S), dtype=torch.float64)
    uniform_S[is_code_S] = uniforms([seat.request.seed], cells)[0]
    first, last = sampling.cfg_interval
    share_S = torch.tensor(steps.cells_before[:-1]) / cells
    within_S = (share_S >= first) & (share_S < last)
    return forced_S, uniform_S, torch.where(within_S, sampling.cfg, 1.0).float()
