"""Batches of scenes drawn on the fly, and the linear probes by which both encoders are measured.

Names: N images, C channels (RGB), D feature size; pixels are float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from arra.data.scenes.drawing import coverage, draw
from arra.data.scenes.language import caption
from arra.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    RADIUS,
    RELATIONS,
    SIDE,
    SIZES,
    Scene,
    held_out,
    scene_at,
)

CELL = 8  # pixels; the patches of both encoders
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)

# How often (least, greatest) numbers of shapes are drawn: the demo paints one or two.
MIXTURE = (((1, 1), 0.25), ((2, 2), 0.5), ((3, 4), 0.25))
MIRRORED = {"left of": "right of", "right of": "left of"}


def scenes(split: str, seed: int, start: int = 0) -> Iterator[Scene]:
    """An endless sequence of scenes of a split in the mixture above."""
    counts, weights = zip(*MIXTURE, strict=True)
    index = start
    while True:
        pick = np.random.default_rng((seed, index)).choice(len(counts), p=weights)
        yield scene_at(split, index, seed=seed, shapes=counts[pick])
        index += 1


def said(scene: Scene) -> Scene:
    """The same scene with a caption that leaves nothing out."""
    return replace(scene, says_size=True, says_background=True, says_relation=True)


def twin(scene: Scene) -> Scene | None:
    """A scene that differs only in what binds to what: mirrored, or with two colours exchanged."""
    if len(scene.shapes) != 2 or scene.relation is None:
        return None
    a, b = scene.shapes
    if scene.relation in ("left of", "right of") and a.x % 2:
        shapes = tuple(replace(shape, x=63 - shape.x) for shape in (a, b))
        return replace(scene, shapes=shapes, relation=MIRRORED[scene.relation])
    shapes = (replace(a, colour=b.colour), replace(b, colour=a.colour))
    if a.colour == b.colour or held_out(tuple((shape.colour, shape.kind) for shape in shapes)):
        return None
    return replace(scene, shapes=shapes)


def pixels(drawn: list[np.ndarray]) -> torch.Tensor:
    """uint8 HWC images -> float32 NCHW in [-1, 1]: what the saved preprocessor config does."""
    stacked = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1


def to_batch(batch: list[Scene]) -> tuple[torch.Tensor, list[str]]:
    return pixels([draw(scene) for scene in batch]), [caption(scene) for scene in batch]


def answers(scene: Scene) -> dict[str, np.ndarray]:
    """What the drawing itself tells of a scene, for supervision.

    cover (64, 10): the part of each 8x8 cell under shapes of each colour and of each kind;
    counts (36,): per colour, the number of shapes of each kind and of each size;
    place (6, 2) and seen (6,): per colour, the mean centre in [-1, 1] and whether there is one;
    background: its index.
    """
    colours, kinds, sizes = list(COLOURS), list(KINDS), list(SIZES)
    cover = np.zeros((len(colours) + len(kinds), SIDE, SIDE), np.float32)
    counts = np.zeros((len(colours), len(kinds) + len(sizes)), np.float32)
    place = np.zeros((len(colours), 2), np.float32)
    number = np.zeros(len(colours), np.float32)
    for shape in scene.shapes:
        colour, kind = colours.index(shape.colour), kinds.index(shape.kind)
        alpha = coverage(shape.kind, RADIUS[shape.size], _X - shape.x, _Y - shape.y)
        for channel in (colour, len(colours) + kind):
            cover[channel] = np.maximum(cover[channel], alpha)
        counts[colour, kind] += 1
        counts[colour, len(kinds) + sizes.index(shape.size)] += 1
        place[colour] += np.array([shape.x, shape.y]) / 31.5 - 1
        number[colour] += 1
    cells = SIDE // CELL
    cover = cover.reshape(-1, cells, CELL, cells, CELL).mean((2, 4)).reshape(len(cover), -1)
    return {
        "cover": cover.T,
        "counts": counts.ravel(),
        "place": place / np.maximum(number, 1)[:, None],
        "seen": (number > 0).astype(np.float32),
        "background": np.array(list(BACKGROUNDS).index(scene.background)),
    }


def stack_answers(batch: list[Scene]) -> dict[str, torch.Tensor]:
    rows = [answers(scene) for scene in batch]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


@torch.no_grad()
def lay_out_positions(weight: torch.Tensor) -> None:
    """Start the learned positions (class token first, then the cells in raster order) as sines.

    The architectures start them at a fiftieth of the patches' size, and a run of minutes then
    never learns where anything is (linear probe of the quarter: 29 %, chance 25 %).
    """
    width = weight.shape[-1]
    cells = SIDE // CELL
    at = (torch.arange(cells) + 0.5) / cells * torch.pi
    waves = torch.arange(1, width // 4 + 1).sqrt()
    one_side = torch.cat([torch.sin(at[:, None] * waves), torch.cos(at[:, None] * waves)], 1)
    down, right = one_side.repeat_interleave(cells, 0), one_side.repeat(cells, 1)
    weight.view(-1, width)[1:] = 0.5 * torch.cat([down, right], 1)


def probe_scenes(split: str, count: int) -> dict[str, tuple[list[Scene], torch.Tensor]]:
    """Per question: scenes and the class of each. One shape: its colour, kind, size, background.

    Two shapes of unlike colour: how the one whose colour comes first in the alphabet stands to the
    other (four classes); its kind (which needs binding); and the quarter that the first shape of
    single-shape scenes is in.
    """
    ones = [scene_at(split, index, seed=77, shapes=(1, 1)) for index in range(count)]
    pairs: list[Scene] = []
    index = 0
    while len(pairs) < count:
        scene = scene_at(split, index, seed=78, shapes=(2, 2))
        if scene.relation and scene.shapes[0].colour != scene.shapes[1].colour:
            pairs.append(scene)
        index += 1
    backgrounds = ("white", "grey", "beige")
    colours = list(COLOURS)
    first = [int(scene.shapes[0].colour > scene.shapes[1].colour) for scene in pairs]
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    relation = [
        RELATIONS.index(opposite[scene.relation] if swap else scene.relation)
        for scene, swap in zip(pairs, first, strict=True)
    ]
    bound_kind = [
        KINDS.index(scene.shapes[swap].kind) for scene, swap in zip(pairs, first, strict=True)
    ]
    one = [scene.shapes[0] for scene in ones]
    return {
        "colour": (ones, torch.tensor([colours.index(shape.colour) for shape in one])),
        "kind": (ones, torch.tensor([KINDS.index(shape.kind) for shape in one])),
        "size": (ones, torch.tensor([SIZES.index(shape.size) for shape in one])),
        "background": (ones, torch.tensor([backgrounds.index(s.background) for s in ones])),
        "quarter": (ones, torch.tensor([(s.x > 31) + 2 * (s.y > 31) for s in one])),
        "relation": (pairs, torch.tensor(relation)),
        "bound_kind": (pairs, torch.tensor(bound_kind)),
    }


def linear_probe(
    train_ND: torch.Tensor, train_N: torch.Tensor, test_ND: torch.Tensor, test_N: torch.Tensor
) -> float:
    """Accuracy on the test rows of multinomial logistic regression on standardised features."""
    mean_D, std_D = train_ND.mean(0), train_ND.std(0) + 1e-6
    train_ND, test_ND = (train_ND - mean_D) / std_D, (test_ND - mean_D) / std_D
    layer = torch.nn.Linear(train_ND.shape[1], int(train_N.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(train_ND), train_N)
        loss = loss + 1e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float((layer(test_ND).argmax(1) == test_N).float().mean())


@torch.no_grad()
def features(encode, scenes_N: list[Scene], chunk: int = 250) -> dict[str, torch.Tensor]:
    """`encode` maps pixels to a dict of features; concatenated over chunks."""
    parts = [
        encode(pixels([draw(scene) for scene in scenes_N[i : i + chunk]]))
        for i in range(0, len(scenes_N), chunk)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def probe_all(encode, train_count: int = 2000, test_count: int = 1000) -> dict[str, dict]:
    """{feature: {question: accuracy}} of every feature that `encode` returns."""
    train, test = probe_scenes("train", train_count), probe_scenes("test", test_count)
    by_scene = {}
    for which in ("colour", "relation"):  # the questions share two sets of scenes
        by_scene[which] = features(encode, train[which][0]), features(encode, test[which][0])
    report: dict[str, dict] = {}
    for question in train:
        of = by_scene["relation" if question in ("relation", "bound_kind") else "colour"]
        for name in of[0]:
            accuracy = linear_probe(of[0][name], train[question][1], of[1][name], test[question][1])
            report.setdefault(name, {})[question] = round(accuracy, 4)
    return report
