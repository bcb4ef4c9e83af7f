"""Does a picture show what its text asks for?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from arra.data.scenes.language import Group, Request
from arra.data.scenes.reader import FoundShape, Piece, Reading
from arra.data.scenes.world import relation_holds

CONSIDERED = 6  # things in a picture that may stand for an asked shape: the whole ones first


@dataclass(frozen=True)
class Verdict:
    """Each field by itself: is it as asked? None where the text does not ask.

    `shape`, `colour` and `size` judge the things that stand for the asked shapes, in the assignment
    with the fewest errors; a missing shape is an error of `count` only (and of `relation`, which it
    leaves open); with nothing painted at all they are False. A loose piece may stand for a shape:
    its colour counts, its kind and size are wrong. `count`: the number of whole shapes is right.
    `all_right`: every asked field is True and there are no fragments.
    """

    shape: bool
    colour: bool | None
    size: bool | None
    count: bool
    relation: bool | None
    background: bool | None
    all_right: bool
    fragments: int


@dataclass(frozen=True)
class _Thing:
    kind: str | None
    colour: str | None
    size: str | None
    x: float
    y: float


def judge(reading: Reading, request: Request) -> Verdict:
    """Compare what the pixels show with what the text asks for."""
    asked = [group for group in request.groups for _ in range(group.count)]
    things = _things(reading)[: max(CONSIDERED, len(asked))]
    errors, relation = _best_assignment(asked, things, request.relation)
    says_colour = any(group.colour for group in asked)
    says_size = any(group.size for group in asked)
    fields: dict[str, bool | None] = {
        "shape": errors[0] == 0,
        "colour": errors[1] == 0 if says_colour else None,
        "size": errors[2] == 0 if says_size else None,
        "count": len(reading.shapes) == request.total,
        "relation": relation,
        "background": reading.background == request.background if request.background else None,
    }
    return Verdict(
        shape=errors[0] == 0,
        colour=fields["colour"],
        size=fields["size"],
        count=len(reading.shapes) == request.total,
        relation=relation,
        background=fields["background"],
        all_right=reading.fragments == 0 and all(value is not False for value in fields.values()),
        fragments=reading.fragments,
    )


def _things(reading: Reading) -> list[_Thing]:
    """What may stand for an asked shape: whole shapes, then coloured pieces, largest first."""
    pieces = sorted(reading.pieces, key=lambda piece: -piece.area)
    loose: list[FoundShape | Piece] = [piece for piece in pieces if piece.colour is not None]
    return [
        _Thing(thing.kind, thing.colour, thing.size, thing.x, thing.y)
        if isinstance(thing, FoundShape)
        else _Thing(None, thing.colour, None, thing.x, thing.y)
        for thing in [*reading.shapes, *loose]
    ]


def _errors(group: Group, thing: _Thing) -> tuple[int, int, int]:
    """Wrong (kind, colour, size), each 0 or 1."""
    return (
        int(group.kind != thing.kind),
        int(group.colour is not None and group.colour != thing.colour),
        int(group.size is not None and group.size != thing.size),
    )


def _best_assignment(
    asked: list[Group], things: list[_Thing], relation: str | None
) -> tuple[tuple[int, int, int], bool | None]:
    """Errors of (kind, colour, size) summed over the assigned pairs; whether the relation holds.

    Of all assignments of things to asked shapes, the one with the fewest errors counts (a relation
    is one of them, so ties are settled in its favour).
    """
    if not things:
        return (len(asked),) * 3, None if relation is None else False
    padded = [*things, *[None] * (len(asked) - len(things))]
    errors_of = {
        (group, thing): _errors(group, thing) for group in set(asked) for thing in set(things)
    }
    best: tuple[int, tuple[int, int, int], bool | None] | None = None
    for chosen in permutations(padded, len(asked)):
        pairs = [(group, one) for group, one in zip(asked, chosen, strict=True) if one is not None]
        if len(pairs) < min(len(asked), len(things)):
            continue
        kind, colour, size = (
            sum(column) for column in zip(*(errors_of[p] for p in pairs), strict=True)
        )
        holds = None if relation is None else _holds(relation, chosen)
        cost = kind + colour + size + (holds is False)
        if best is None or cost < best[0]:
            best = cost, (kind, colour, size), holds
    assert best is not None
    return best[1], best[2]


def _holds(relation: str, chosen: tuple[_Thing | None, ...]) -> bool:
    """Between the things that stand for the first and the second asked shape."""
    a, b = chosen[0], chosen[1]
    return a is not None and b is not None and relation_holds(relation, b.x - a.x, b.y - a.y, 1.0)
