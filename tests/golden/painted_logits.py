"""What pictures are drawn from, as the painter sees it.

Legend: R rows, P cells of a picture, K codes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from arra.generate import lane
from arra.generate.request import Event, Request
from arra.models.base import Backbone


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[Tensor]]]:
    """By ticket, the logits (K,) of every code drawn, guidance applied."""
    found: dict[int, list[Tensor]] = {}
    seen: list[Tensor] = []
    draw, advance = lane.Lane._draw, lane.Lane.advance

    def spy(self: lane.Lane, filtered: bool, greedy: bool) -> None:
        state = self._state
        head_RV = self.backbone.head(state.hidden_RD)
        seen.append(self._guided(head_RV, state.scale_RS.gather(1, state.step_R[:, None])))
        draw(self, filtered, greedy)

    def spied(self: lane.Lane) -> list[Event]:
        seats = [(s.ticket, s.rows[0], s.steps.forced[s.done]) for s in self._seats.values()]
        events = advance(self)
        for ticket, row, forced in seats:
            if forced < 0:
                found.setdefault(ticket, []).append(seen[-1][row])
        seen.clear()
        return events

    with monkeypatch.context() as patch:
        patch.setattr(lane.Lane, "_draw", spy)
        patch.setattr(lane.Lane, "advance", spied)
        yield found


def logits_of(
    backbone: Backbone, requests: list[Request], slots: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """Codes (h, w) and logits (P, K) of each request, painted together."""
    from arra.generate.engine import Engine

    with recorded(monkeypatch) as found:
        codes = Engine(backbone, slots).paint(requests)
    return codes, [torch.stack(found[number]) for number in range(len(requests))]


@contextmanager
def fed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[int]]]:
    """By row of the cache, the ids that it holds: what a model has been fed in their places.

    Padding behind a prompt is there until it is written over: at the end, none is left.
    """
    rows: dict[int, list[int]] = {}
    prefill, step = type(backbone).prefill, type(backbone).step

    def begun(
        self: Backbone, ids_BT: Tensor, cache: object, rows_B: Tensor, *rest: object
    ) -> Tensor:
        rows.update(zip(rows_B.tolist(), ids_BT.tolist(), strict=True))
        return prefill(self, ids_BT, cache, rows_B, *rest)  # type: ignore[arg-type]

    def gone_on(self: Backbone, ids_BT: Tensor, positions_BT: Tensor, cache: object) -> Tensor:
        for row, (ids, positions) in enumerate(
            zip(ids_BT.tolist(), positions_BT.tolist(), strict=True)
        ):
            held = rows.get(row, [])
            rows[row] = [*held[: positions[0]], *ids]
        return step(self, ids_BT, positions_BT, cache)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(backbone), "prefill", begun)
        patch.setattr(type(backbone), "step", gone_on)
        yield rows
