"""What a scene is, and which scene stands at a given index of a split.

Units: pixels of a 64x64 canvas, x to the right, y downwards, pixel i has its centre at i. A shape's
`x`, `y` is its centroid. All kinds of one size have the same area (a disc of radius `RADIUS`), so
that size is never a hint to the kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDE = 64
KINDS = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RADIUS = {"small": 6.5, "large": 10.0}  # of the disc of equal area, pixels
# Chosen far apart in RGB (closest pair: 123 of 442) so that a lossy tokenizer cannot confuse them.
COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 150, 60),
    "blue": (35, 70, 220),
    "yellow": (250, 220, 40),
    "purple": (150, 50, 190),
    "black": (15, 15, 15),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (160, 160, 160), "beige": (225, 205, 170)}
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "val", "test", "compositional")
EVERYTHING = "everything"  # train and compositional together: what an image tokenizer must show
MAX_SHAPES = 4

# Never seen outside `compositional`: four of the 24 shapes, and two of the 15 pairs of colours.
HELD_OUT_SHAPES = frozenset(
    {("green", "circle"), ("yellow", "square"), ("blue", "triangle"), ("red", "cross")}
)
HELD_OUT_TOGETHER = (frozenset({"red", "yellow"}), frozenset({"green", "purple"}))

GAP = 4  # least distance between the boxes of two shapes, pixels
MARGIN = 2  # least distance between a shape's box and the canvas edge, pixels
CLEAR = 6  # "left of" means: farther left than up or down by at least this, pixels
LATTICE = 4  # centres lie on multiples of this, pixels: an image tokenizer of 8-pixel cells then
# meets a shape in 4 positions within a cell instead of 64, and a small one can draw crisp edges


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """`relation` holds between shapes[0] and shapes[1] (only drawn for two unlike shapes).

    The `says_*` fields and `long_form` are the wording of the caption, fixed with the scene.
    """

    shapes: tuple[Shape, ...]
    background: str
    relation: str | None
    says_size: bool
    says_background: bool
    says_relation: bool
    long_form: bool


def held_out(shapes: tuple[tuple[str, str], ...]) -> bool:
    """Whether the (colour, kind) pairs of a scene belong to the compositional split only."""
    colours = {colour for colour, _ in shapes}
    return any(shape in HELD_OUT_SHAPES for shape in shapes) or any(
        pair <= colours for pair in HELD_OUT_TOGETHER
    )


def extent(kind: str, radius: float) -> tuple[float, float, float, float]:
    """(left, right, up, down): how far a shape of area pi*radius^2 reaches from its centroid."""
    root = np.sqrt(np.pi) * radius  # side of the square of equal area
    if kind == "circle":
        return radius, radius, radius, radius
    if kind == "square":
        return root / 2, root / 2, root / 2, root / 2
    if kind == "triangle":  # equilateral, pointing up: area = sqrt(3)/4 side^2
        side = root * 2 / 3**0.25
        height = side * np.sqrt(3) / 2
        return side / 2, side / 2, height * 2 / 3, height / 3
    assert kind == "cross"  # five squares of side reach * 2/3: area = 20/9 reach^2
    reach = root * np.sqrt(9 / 20)
    return reach, reach, reach, reach


def boxes_apart(a: Shape, b: Shape, gap: float = GAP) -> bool:
    """Whether the bounding boxes of two shapes are at least `gap` pixels apart in x or in y."""
    al, ar, au, ad = extent(a.kind, RADIUS[a.size])
    bl, br, bu, bd = extent(b.kind, RADIUS[b.size])
    return (
        b.x - bl - a.x - ar >= gap
        or a.x - al - b.x - br >= gap
        or b.y - bu - a.y - ad >= gap
        or a.y - au - b.y - bd >= gap
    )


def relation_holds(relation: str, dx: float, dy: float, clear: float = CLEAR) -> bool:
    """Whether A stands in `relation` to B, where (dx, dy) leads from A's centre to B's."""
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along >= abs(across) + clear


def scene_at(split: str, index: int, *, seed: int = 0, shapes: tuple[int, int] = (1, 2)) -> Scene:
    """The scene at `index` of `split`: a pure function of its arguments.

    `shapes` is the least and the greatest number of shapes (1 to 4). train, val and test share one
    distribution; `compositional` holds the combinations that the other three never show;
    `everything` shows them all and is for fitting image tokenizers, not for training painters.
    """
    low, high = shapes
    names = (*SPLITS, EVERYTHING)
    if split not in names:
        raise ValueError(f"scenes have no split {split!r}: choose one of {', '.join(names)}")
    if not 1 <= low <= high <= MAX_SHAPES:
        raise ValueError(f"shapes={shapes}: give (least, greatest) between 1 and {MAX_SHAPES}")
    if index < 0 or seed < 0:
        raise ValueError(f"scene index {index} and seed {seed} must not be negative")
    entropy = (seed, names.index(split), index, low, high)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    count = int(rng.integers(low, high + 1))
    looks = _draw_looks(rng, count)
    while split != EVERYTHING and _is_held_out(looks) != (split == "compositional"):
        looks = _draw_looks(rng, count)
    background = str(rng.choice(list(BACKGROUNDS)))
    relation = None
    if count == 2 and looks[0] != looks[1]:
        relation = str(rng.choice(RELATIONS))
    placed = _place_in_quarters(rng, looks) if count > 2 else _place_freely(rng, looks, relation)
    says = rng.random(4)
    return Scene(
        shapes=placed,
        background=background,
        relation=relation,
        says_size=bool(says[0] < 0.8),
        says_background=bool(says[1] < 0.5),
        says_relation=bool(says[2] < 0.8),
        long_form=bool(says[3] < 0.25),
    )


Look = tuple[str, str, str]  # colour, kind, size


def _is_held_out(looks: list[Look]) -> bool:
    return held_out(tuple((colour, kind) for colour, kind, _ in looks))


def _draw_looks(rng: np.random.Generator, count: int) -> list[Look]:
    def look() -> Look:
        colour, kind, size = rng.choice(list(COLOURS)), rng.choice(KINDS), rng.choice(SIZES)
        return str(colour), str(kind), str(size)

    if count > 1 and rng.random() < 0.25:  # "three small red circles"
        return [look()] * count
    if count > 2 and rng.random() < 0.5:  # "two small red circles and a large blue square"
        return [look()] * (count - 1) + [look()]
    return [look() for _ in range(count)]


def _range(kind: str, size: str, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The least and greatest lattice (x, y) for which the shape's box lies within [low, high]."""
    left, right, up, down = extent(kind, RADIUS[size])
    least = np.ceil(np.array([low + left, low + up]) / LATTICE).astype(int)
    return least, np.floor(np.array([high - right, high - down]) / LATTICE).astype(int)


def _place_freely(
    rng: np.random.Generator, looks: list[Look], relation: str | None
) -> tuple[Shape, ...]:
    while True:  # ends: every pair of shapes has room on the canvas (a test draws them all)
        shapes = []
        for colour, kind, size in looks:
            least, most = _range(kind, size, MARGIN - 0.5, SIDE - 0.5 - MARGIN)
            x, y = rng.integers(least, most + 1) * LATTICE
            shapes.append(Shape(kind, colour, size, int(x), int(y)))
        if len(shapes) == 1:
            return tuple(shapes)
        a, b = shapes
        if boxes_apart(a, b) and (
            relation is None or relation_holds(relation, b.x - a.x, b.y - a.y)
        ):
            return a, b


def _place_in_quarters(rng: np.random.Generator, looks: list[Look]) -> tuple[Shape, ...]:
    """Three or four shapes: each in its own quarter of the canvas, anywhere within it."""
    half = SIDE // 2
    shapes = []
    for quarter, (colour, kind, size) in zip(rng.permutation(4), looks, strict=False):
        least, most = _range(kind, size, GAP / 2 - 0.5, half - 0.5 - GAP / 2)
        x, y = rng.integers(least, most + 1) * LATTICE
        shapes.append(
            Shape(kind, colour, size, int(x + half * (quarter % 2)), int(y + half * (quarter // 2)))
        )
    return tuple(shapes)
