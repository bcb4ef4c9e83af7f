"""`builtin:scenes`: captioned pictures that need no download and can be read back.

`scene_at` -> `draw`, `caption`; and back: `read` recovers the shapes from pixels by classical image
analysis, `parse` recovers the request from text, `judge` says whether the one fulfils the other.
"""

from arra.data.scenes.drawing import draw
from arra.data.scenes.judge import Verdict, judge
from arra.data.scenes.language import Group, Request, caption, parse
from arra.data.scenes.reader import FoundShape, Piece, Reading, read
from arra.data.scenes.world import EVERYTHING, SPLITS, Scene, Shape, scene_at

__all__ = [
    "EVERYTHING",
    "SPLITS",
    "FoundShape",
    "Group",
    "Piece",
    "Reading",
    "Request",
    "Scene",
    "Shape",
    "Verdict",
    "caption",
    "draw",
    "judge",
    "parse",
    "read",
    "scene_at",
]
