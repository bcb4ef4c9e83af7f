"""The painter: pictures join and leave while others are being painted (continuous batching).

Requests that fill about as many columns share a lane (`lane.py`). Which lane a request takes
follows from its own length, so that no picture depends on its neighbours.

Legend: h and w codes per side.
"""

import itertools
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from arra.generate.lane import Lane
from arra.generate.request import Event, Painted, Request, columns_of
from arra.generate.settings import DEFAULT_SLOTS, NO_SPECULATION, Speculation, check_slots
from arra.generate.speculative_lane import SpeculativeLane
from arra.generate.tree_lane import TreeLane
from arra.models.base import Backbone

COLUMN_STEP = 64
"""Lanes have a multiple of this many columns, so that there are few of them."""
_Kind = tuple[int, int]
"""Of a lane: its columns and, where it speculates, the rows of each of its pictures (else 0)."""


@dataclass
class Tally:
    """What painting took, over all pictures."""

    pictures: int = 0
    codes: int = 0
    forwards: int = 0  # of each picture by itself, however many went along
    kept: int = 0  # codes that were drafts and stayed

    def add(self, painted: Painted) -> None:
        self.pictures += 1
        self.codes += painted.codes_hw.numel()
        self.forwards += painted.forwards
        self.kept += painted.kept

    def __str__(self) -> str:
        if not self.pictures:
            return "nothing painted"
        per_picture, codes = self.forwards / self.pictures, self.codes / self.pictures
        kept = self.kept / self.codes
        return f"{per_picture:.1f} forward passes for {codes:.0f} codes, {kept:.0%} as drafted"


class Engine:
    """Paints requests, as many at a time as there are slots.

    Args:
        slots: rows of a forward pass. A picture takes two with guidance, one without.
        compiled: compile the decode step.
        speculation: whether a forward pass may paint several codes of a picture.

    Attributes:
        forwards: decode steps so far, each of all rows.
        tally: of the pictures painted so far.
    """

    def __init__(
        self,
        backbone: Backbone,
        slots: int = DEFAULT_SLOTS,
        *,
        compiled: bool = False,
        speculation: Speculation = NO_SPECULATION,
    ) -> None:
        check_slots(slots)
        self.backbone, self.slots, self.compiled = backbone, slots, compiled
        self.speculation, self.tally = speculation, Tally()
        self._decoding = backbone.decoding()
        self._lanes: dict[_Kind, Lane] = {}
        self._waiting: dict[_Kind, deque[tuple[int, Request]]] = {}  # by lane, in order
        self._tickets = itertools.count()
        self._forwards_of_closed = 0

    # ---- asking ---------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Takes a request; returns its ticket, which its events carry.

        Raises:
            ValueError: it needs more rows than there are slots, or a longer sequence than the model
                takes.
        """
        if request.rows > self.slots:
            raise ValueError(
                f"a picture with guidance takes two rows of a forward pass, but --slots is "
                f"{self.slots}: use at least 2"
            )
        room = self.backbone.room(request.grid)
        if len(request.prefix) > room:
            raise ValueError(
                f"the prompt has {len(request.prefix)} tokens, but beside the image the model "
                f"takes {room}: shorten it"
            )
        ticket = next(self._tickets)
        self._waiting.setdefault(self._kind(request), deque()).append((ticket, request))
        return ticket

    def cancel(self, ticket: int) -> bool:
        """Drops a request, whose rows are free at once; False: it is finished, or never was."""
        for queue in self._waiting.values():
            for entry in queue:
                if entry[0] == ticket:
                    queue.remove(entry)
                    return True
        return any(lane.release(ticket) is not None for lane in self._lanes.values())

    @property
    def busy(self) -> bool:
        """Whether anything waits or is being painted."""
        return any(self._waiting.values()) or any(lane.busy for lane in self._lanes.values())

    @property
    def forwards(self) -> int:
        return self._forwards_of_closed + sum(lane.forwards for lane in self._lanes.values())

    # ---- painting -------------------------------------------------------------------------------

    def paint(self, requests: Sequence[Request]) -> list[Tensor]:
        """The codes (h, w) of each request, in their order."""
        number_of = {self.submit(request): number for number, request in enumerate(requests)}
        codes: list[Tensor] = [torch.empty(0)] * len(requests)
        for events in self.events():
            for event in events:
                if isinstance(event, Painted) and event.ticket in number_of:
                    codes[number_of[event.ticket]] = event.codes_hw
        return codes

    def events(self) -> Iterator[list[Event]]:
        """Paints until nothing is left, telling what happened in each step in which something did.

        Requests may be submitted and cancelled between two of them. A picture that memory ran out
        for begins again, and its rows are told again.

        Raises:
            ValueError: the logits are not finite, or memory does not suffice for one picture.
        """
        while self.busy:
            with self._ready():
                told: list[Event] = []
                while not told and self.busy:
                    told = self._step()
            yield told

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Without dropout, and as it was afterwards: the training loop paints samples too."""
        was_training = self.backbone.model.training
        self.backbone.model.eval()
        try:
            with self._decoding, torch.inference_mode():
                yield
        finally:
            self.backbone.model.train(was_training)

    def _step(self) -> list[Event]:
        """One token in each lane."""
        told: list[Event] = []
        for kind in sorted({*self._waiting, *self._lanes}):
            try:
                told += self._step_of(kind)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                self._shrink(error)
                break
        return told

    def _step_of(self, kind: _Kind) -> list[Event]:
        waiting = self._waiting.setdefault(kind, deque())
        lane = self._lanes.get(kind)
        if lane is None:
            if not waiting:
                return []
            lane = self._lanes[kind] = self._new_lane(*kind)
        lane.admit(_first(waiting, lane.free))
        events = lane.advance() if lane.busy else []
        for event in events:
            if isinstance(event, Painted):
                self.tally.add(event)
        return events

    def _new_lane(self, columns: int, rows_each: int) -> Lane:
        if self.speculation.mode == "off":
            return Lane(self.backbone, self.slots, columns, compiled=self.compiled)
        of_mode = TreeLane if self.speculation.mode == "tree" else SpeculativeLane
        return of_mode(
            self.backbone,
            self.slots,
            columns,
            self.speculation,
            rows_each,
            compiled=self.compiled,
        )

    def _kind(self, request: Request) -> _Kind:
        _, needed = columns_of(self.backbone, request)
        columns = min(-(-needed // COLUMN_STEP) * COLUMN_STEP, self.backbone.max_length)
        return columns, 0 if self.speculation.mode == "off" else request.rows

    def _shrink(self, error: Exception) -> None:
        """Half the slots, and all pictures begin again."""
        if self.slots <= 2:
            raise ValueError(
                f"memory does not suffice to paint one picture ({str(error).splitlines()[0]}): use "
                f"a smaller --grid, smaller weights or another --device"
            ) from error
        self.slots = max(2, self.slots // 2)
        warnings.warn(
            f"memory ran out: painting goes on with --slots {self.slots}, in which pictures differ "
            f"in rounding from those of more slots",
            stacklevel=2,
        )
        for kind, lane in self._lanes.items():
            begun = [(ticket, lane.release(ticket)) for ticket in lane.tickets]
            queue = self._waiting.setdefault(kind, deque())
            queue.extendleft((t, r) for t, r in reversed(begun) if r is not None)
            self._forwards_of_closed += lane.forwards
        self._lanes.clear()
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()


def _first(waiting: deque[tuple[int, Request]], rows: int) -> list[tuple[int, Request]]:
    """Takes out the first that fit into so many rows; none overtakes."""
    taken = []
    while waiting and waiting[0][1].rows <= rows:
        rows -= waiting[0][1].rows
        taken.append(waiting.popleft())
    return taken


def _out_of_memory(error: RuntimeError) -> bool:
    """PyTorch has a class of its own for this on GPUs, and words alone on CPUs."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
