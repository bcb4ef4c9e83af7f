"""Scenes to pixels: anti-aliased shapes from their signed distances.

Names: `_HW` height x width, `_HW3` RGB; distances in pixels, negative inside.
"""

from __future__ import annotations

import numpy as np

from arra.data.scenes.world import BACKGROUNDS, COLOURS, RADIUS, SIDE, Scene, extent


def coverage(kind: str, radius: float, dx_HW: np.ndarray, dy_HW: np.ndarray) -> np.ndarray:
    """The part (0..1) of each pixel that the shape covers; (dx, dy) lead from its centroid.

    `radius` is that of the disc of equal area. The edge is one pixel wide.
    """
    left, _, up, down = extent(kind, radius)
    if kind == "circle":
        distance_HW = np.hypot(dx_HW, dy_HW) - radius
    elif kind == "square":
        distance_HW = np.maximum(np.abs(dx_HW), np.abs(dy_HW)) - left
    elif kind == "triangle":  # the lower side, and the two upper ones folded into one
        slope_HW = np.abs(dx_HW) * (np.sqrt(3) / 2) - dy_HW / 2 - up / 2
        distance_HW = np.maximum(dy_HW - down, slope_HW)
    else:
        assert kind == "cross"
        x_HW, y_HW = np.abs(dx_HW), np.abs(dy_HW)
        long_HW, short_HW = np.maximum(x_HW, y_HW), np.minimum(x_HW, y_HW)
        distance_HW = np.maximum(long_HW - left, short_HW - left / 3)
    return np.clip(0.5 - distance_HW, 0.0, 1.0)


_Y_HW, _X_HW = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def draw(scene: Scene) -> np.ndarray:
    """The picture of a scene: uint8 (64, 64, 3)."""
    image_HW3 = np.empty((SIDE, SIDE, 3), np.float32)
    image_HW3[:] = BACKGROUNDS[scene.background]
    for shape in scene.shapes:
        dx_HW, dy_HW = _X_HW - shape.x, _Y_HW - shape.y
        alpha_HW1 = coverage(shape.kind, RADIUS[shape.size], dx_HW, dy_HW)[..., None]
        image_HW3 += alpha_HW1 * (np.array(COLOURS[shape.colour], np.float32) - image_HW3)
    return np.rint(image_HW3).astype(np.uint8)
