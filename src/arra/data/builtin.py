"""`builtin:scenes`: captioned pictures that need no download and can be read back from their pixels.

`scene_at` -> `draw`, `caption`; and back: `read` recovers the shapes from pixels by classical image
analysis, `parse` recovers the request from text, `judge` says whether the one fulfils the other.
"""

from arra.data.scenes.drawing import draw
from arra.data.scenes.language import Group, Request, caption, parse
from arra.data.scenes.world import SPLITS, Scene, Shape, scene_at

__all__ = [
    "SPLITS",
    "Group",
    "Request",
    "Scene",
    "Shape",
    "caption",
    "draw",
    "parse",
    "scene_at",
]
