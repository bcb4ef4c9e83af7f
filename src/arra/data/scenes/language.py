"""Scenes to captions, and captions back to what they ask for.

caption     = group | group relation group | group {", " group} " and " group
group       = ("a" | "two" | "three" | "four") [size] colour kind["s"]
relation    = ["to the"] "left of" | ["to the"] "right of" | "above" | "below"
background  = "on a" ("white" | "grey" | "beige") "background"      (at the end, optional)
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from arra.data.scenes.world import BACKGROUNDS, COLOURS, KINDS, MAX_SHAPES, RELATIONS, SIZES, Scene

COUNT_WORDS = {1: "a", 2: "two", 3: "three", 4: "four"}
EXAMPLE = "a large red circle left of a small blue square on a white background"


@dataclass(frozen=True)
class Group:
    """`count` shapes that look alike; None: the text does not say."""

    count: int
    size: str | None
    colour: str | None
    kind: str


@dataclass(frozen=True)
class Request:
    """What a text asks for; `relation` holds between the first and the second group."""

    groups: tuple[Group, ...]
    relation: str | None
    background: str | None

    @property
    def total(self) -> int:
        return sum(group.count for group in self.groups)


def _plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def request_of(scene: Scene) -> Request:
    """What the caption of a scene says of it, given the scene's wording."""
    looks = [
        (shape.size if scene.says_size else None, shape.colour, shape.kind)
        for shape in scene.shapes
    ]
    groups = tuple(Group(count, *look) for look, count in Counter(looks).items())
    says_relation = scene.says_relation and len(groups) == 2
    return Request(
        groups,
        scene.relation if says_relation else None,
        scene.background if scene.says_background else None,
    )


def write(request: Request, long_form: bool = False) -> str:
    """The text of a request; `long_form` says "to the left of" instead of "left of"."""
    phrases = []
    for group in request.groups:
        kind = group.kind if group.count == 1 else _plural(group.kind)
        words = [COUNT_WORDS[group.count], group.size, group.colour, kind]
        phrases.append(" ".join(word for word in words if word))
    if request.relation:
        relation = request.relation
        if long_form and relation in ("left of", "right of"):
            relation = f"to the {relation}"
        text = f"{phrases[0]} {relation} {phrases[1]}"
    else:
        text = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    return text + (f" on a {request.background} background" if request.background else "")


def caption(scene: Scene) -> str:
    """The caption of a scene, as fixed by its wording."""
    return write(request_of(scene), scene.long_form)


_GROUP = (
    rf"(a|an|one|two|three|four)(?: ({'|'.join(SIZES)}))?(?: ({'|'.join(COLOURS)}))?"
    rf" ({'|'.join(KINDS)})(?:e?s)?"
)
_GROUP_RE = re.compile(_GROUP)
_BACKGROUND_RE = re.compile(rf" on an? ({'|'.join(BACKGROUNDS)}) background$")
_RELATION_RE = re.compile(rf"^(.*?) (?:to the )?({'|'.join(RELATIONS)}) (.*)$")
_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}


def parse(text: str) -> Request:
    """What a text asks for. ValueError for a text outside the grammar above."""
    rest = re.sub(r"\s+", " ", text.strip().lower().rstrip(".")).replace("gray", "grey")
    background = None
    if match := _BACKGROUND_RE.search(rest):
        background, rest = match[1], rest[: match.start()]
    relation = None
    if match := _RELATION_RE.match(rest):
        relation, phrases = match[2], [match[1], match[3]]
    else:
        phrases = re.split(r", and |, | and ", rest)
    groups = []
    for phrase in phrases:
        match = _GROUP_RE.fullmatch(phrase)
        if match is None:
            raise ValueError(
                f"{text!r} does not describe a scene (at {phrase!r}): write it like {EXAMPLE!r}"
            )
        groups.append(Group(_COUNTS[match[1]], match[2], match[3], match[4]))
    request = Request(tuple(groups), relation, background)
    if request.total > MAX_SHAPES:
        raise ValueError(f"{text!r} asks for {request.total} shapes: at most {MAX_SHAPES} fit")
    return request
