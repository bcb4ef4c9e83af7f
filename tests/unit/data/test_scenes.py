"""Scenes: fixed by their index, no overlap, split as promised, readable from text and pixels."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from arra.data.builtin import EVERYTHING, SPLITS, caption, draw, judge, parse, read, scene_at
from arra.data.scenes.components import label
from arra.data.scenes.drawing import coverage
from arra.data.scenes.language import Group, Request, request_of, write
from arra.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_SHAPES,
    KINDS,
    RADIUS,
    RELATIONS,
    SIDE,
    SIZES,
    boxes_apart,
    extent,
    held_out,
    relation_holds,
)

FIELDS = ("shape", "colour", "size", "count", "relation", "background")


def look(scene):
    return tuple((shape.colour, shape.kind) for shape in scene.shapes)


def verdict_of(image, text):
    return judge(read(image), parse(text))


# ------------------------------------------------------------------ the world


def test_a_scene_is_a_function_of_its_arguments():
    first = [scene_at("train", index, seed=3, shapes=(1, 4)) for index in range(50)]
    assert first == [scene_at("train", index, seed=3, shapes=(1, 4)) for index in range(50)]
    assert len(set(first)) == 50
    other = (
        [scene_at("train", index, seed=4, shapes=(1, 4)) for index in range(50)],
        [scene_at("val", index, seed=3, shapes=(1, 4)) for index in range(50)],
    )
    assert not set(first) & set(other[0])
    assert not set(first) & set(other[1])


def test_scenes_stay_as_they_are():
    """Prepared datasets and bundled weights count on these scenes: a change needs new splits."""
    first = [scene_at(split, 0) for split in SPLITS]
    assert [caption(scene) for scene in first] == [
        "a large blue circle on a white background",
        "a yellow cross and a yellow circle on a white background",
        "a small yellow circle above a small yellow triangle",
        "a small yellow square on a white background",
    ]
    sums = [int(draw(scene).astype(np.int64).sum()) for scene in first]
    assert sums == pytest.approx([2881514, 2950714, 1974078, 2980503], abs=20)  # rounding


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shapes", [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_shapes_are_whole_apart_and_related_as_said(split, shapes):
    for index in range(60):
        scene = scene_at(split, index, shapes=shapes)
        assert len(scene.shapes) == shapes[0]
        for shape in scene.shapes:
            left, right, up, down = extent(shape.kind, RADIUS[shape.size])
            assert shape.x - left >= 0.5
            assert shape.y - up >= 0.5
            assert max(shape.x + right, shape.y + down) <= SIDE - 1.5
        assert all(boxes_apart(a, b) for a, b in combinations(scene.shapes, 2))
        if scene.relation:
            a, b = scene.shapes
            assert relation_holds(scene.relation, b.x - a.x, b.y - a.y)


def test_held_out_combinations_are_in_one_split_only():
    for shapes in [(1, 2), (3, 4)]:
        for split in SPLITS:
            out = [held_out(look(scene_at(split, index, shapes=shapes))) for index in range(200)]
            assert all(out) if split == "compositional" else not any(out)
    singles = [look(scene_at("compositional", index, shapes=(1, 1)))[0] for index in range(100)]
    assert set(singles) == HELD_OUT_SHAPES


def test_the_split_for_tokenizers_shows_held_out_combinations_too():
    looks = [look(scene_at(EVERYTHING, index)) for index in range(300)]
    assert {held_out(each) for each in looks} == {True, False}
    assert {shape for each in looks for shape in each} >= HELD_OUT_SHAPES


def test_everything_occurs():
    scenes = [scene_at("train", index) for index in range(2000)]
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert {(s.colour, s.kind) for s in shapes} == {
        (colour, kind) for colour in COLOURS for kind in KINDS
    } - HELD_OUT_SHAPES
    assert {shape.size for shape in shapes} == set(SIZES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    texts = [caption(scene) for scene in scenes]
    for words in [*RELATIONS, "to the left of", " and ", "two ", "on a grey background"]:
        assert any(words in text for text in texts), words


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_all_kinds_have_the_area_of_their_size(kind, size):
    y, x = np.mgrid[0:SIDE, 0:SIDE] - 32.0
    drawn = coverage(kind, RADIUS[size], x, y)
    assert drawn.sum() == pytest.approx(np.pi * RADIUS[size] ** 2, rel=0.06)
    assert (drawn * x).sum() / drawn.sum() == pytest.approx(0, abs=0.05)
    assert (drawn * y).sum() / drawn.sum() == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 0), "no split 'dev'"),
        (("train", -1), "must not be negative"),
        (("train", 0, {"shapes": (0, 2)}), "between 1 and 4"),
        (("train", 0, {"shapes": (2, 5)}), "between 1 and 4"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        scene_at(*positional, **keywords)


# ------------------------------------------------------------------ language


def test_captions_and_requests_are_two_forms_of_the_same():
    for index in range(1500):
        scene = scene_at("train", index, shapes=(1, 4))
        assert parse(caption(scene)) == request_of(scene)


def test_a_text_as_people_write_it():
    expected = Request(
        (Group(1, "large", "red", "circle"), Group(1, "small", "blue", "square")), "left of", None
    )
    assert parse("a large red circle left of a small blue square") == expected
    assert parse(" A large red circle to the left of a small  blue square. ") == expected
    assert parse("two small green triangles on a gray background") == Request(
        (Group(2, "small", "green", "triangle"),), None, "grey"
    )
    assert parse("a cross, two squares, and a red circle").total == 4


@pytest.mark.parametrize(
    "text", ["", "a dog", "a red", "a red circle left of", "four red circles and a blue square"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"describe a scene|at most 4"):
        parse(text)


# ------------------------------------------------------------------ reader and judge


def check_reader(indices, shapes, change=lambda image: image):
    """The part of scenes that are read exactly and judged to be all right."""
    right = 0
    for index in indices:
        scene = scene_at(("test", "compositional")[index % 2], index, shapes=shapes)
        reading = read(change(draw(scene)))
        found = [(shape.kind, shape.colour, shape.size) for shape in reading.shapes]
        exact = sorted(found) == sorted((s.kind, s.colour, s.size) for s in scene.shapes)
        verdict = judge(reading, parse(caption(scene)))
        right += exact and reading.background == scene.background and verdict.all_right
    return right / len(indices)


@pytest.mark.parametrize("shapes", [(1, 2), (3, 4)])
def test_the_reader_reads_what_was_drawn(shapes):
    assert check_reader(range(100), shapes) == 1.0


@pytest.mark.long
@pytest.mark.parametrize("shapes", [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_the_reader_reads_what_was_drawn_many(shapes):
    assert check_reader(range(1000), shapes) >= 0.995


def damaged(image, seed=0):
    """Blurred, tinted and noisy, about as a lossy tokenizer leaves it."""
    rng = np.random.default_rng(seed)
    soft = np.pad(image.astype(np.float64), ((2, 2), (2, 2), (0, 0)), mode="edge")
    for axis in (0, 1):  # (1 4 6 4 1)/16
        for _ in range(2):
            lead, mid, tail = (
                np.take(soft, range(k, soft.shape[axis] - 2 + k), axis) for k in (0, 1, 2)
            )
            soft = (lead + 2 * mid + tail) / 4
    tint = rng.normal(0, 8, 3)
    return np.clip(soft + tint + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shapes", [(1, 2), (3, 4)])
def test_the_reader_forgives_blur_tint_and_noise(shapes):
    assert check_reader(range(100), shapes, damaged) >= 0.97


def wrong(verdict):
    """The names of the fields that are False."""
    return {name for name in FIELDS if getattr(verdict, name) is False}


TEXT = "a large red circle left of a small blue square on a grey background"


@pytest.fixture
def scene():
    template = next(
        found
        for found in (scene_at("train", index, shapes=(2, 2)) for index in range(1000))
        if found.relation == "left of"
    )
    a, b = template.shapes
    a = replace(a, kind="circle", colour="red", size="large", x=16, y=30)
    b = replace(b, kind="square", colour="blue", size="small", x=46, y=36)
    return replace(template, shapes=(a, b), background="grey")


def test_a_right_picture_is_all_right(scene):
    verdict = verdict_of(draw(scene), TEXT)
    assert verdict.all_right
    assert wrong(verdict) == set()
    assert verdict.fragments == 0


@pytest.mark.parametrize(
    ("field", "value", "caught"),
    [("colour", "green", "colour"), ("kind", "triangle", "shape"), ("size", "small", "size")],
)
def test_one_wrong_attribute_is_one_wrong_field(scene, field, value, caught):
    a, b = scene.shapes
    verdict = verdict_of(draw(replace(scene, shapes=(replace(a, **{field: value}), b))), TEXT)
    assert wrong(verdict) == {caught}
    assert not verdict.all_right
    assert verdict.fragments == 0


def test_swapped_sides_are_a_wrong_relation(scene):
    a, b = scene.shapes
    swapped = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    assert wrong(verdict_of(draw(replace(scene, shapes=swapped)), TEXT)) == {"relation"}


def test_exchanged_colours_are_wrong_colours(scene):
    a, b = scene.shapes
    exchanged = replace(a, colour=b.colour), replace(b, colour=a.colour)
    assert wrong(verdict_of(draw(replace(scene, shapes=exchanged)), TEXT)) == {"colour"}


def test_a_wrong_background_is_a_wrong_background(scene):
    image = draw(replace(scene, background="white"))
    assert wrong(verdict_of(image, TEXT)) == {"background"}


def test_a_missing_shape_is_a_wrong_count(scene):
    only = draw(replace(scene, shapes=scene.shapes[:1]))
    assert wrong(verdict_of(only, TEXT.replace("left of", "and"))) == {"count"}
    assert wrong(verdict_of(only, TEXT)) == {"count", "relation"}  # nothing stands left of nothing


def test_a_shape_too_many_is_a_wrong_count(scene):
    more = (*scene.shapes, replace(scene.shapes[0], y=54, x=50, size="small", colour="green"))
    verdict = verdict_of(draw(replace(scene, shapes=more)), TEXT)
    assert wrong(verdict) == {"count"}
    assert verdict.fragments == 0


@pytest.mark.parametrize("axis", [0, 1])
def test_a_broken_shape_is_a_fragment(scene, axis):
    image = draw(scene)
    gap = np.s_[:, 15:18] if axis else np.s_[29:32, :32]  # through the circle only
    image[gap] = BACKGROUNDS["grey"]
    verdict = verdict_of(image, TEXT)
    assert wrong(verdict) == set()
    assert verdict.fragments == 1
    assert not verdict.all_right


def test_a_crumb_and_a_patch_are_fragments(scene):
    image = draw(scene)
    image[50:55, 50:55] = COLOURS["red"]
    verdict = verdict_of(image, TEXT)
    assert (wrong(verdict), verdict.fragments, verdict.all_right) == (set(), 1, False)
    image[2:14, 40:52] = BACKGROUNDS["white"]
    assert verdict_of(image, TEXT).fragments == 2
    image[60, 5] = COLOURS["green"]  # a speck is noise
    assert verdict_of(image, TEXT).fragments == 2


def test_half_a_shape_keeps_its_colour(scene):
    image = draw(scene)
    image[:30, :32] = BACKGROUNDS["grey"]  # the upper half of the circle
    verdict = verdict_of(image, TEXT)
    assert verdict.colour
    assert wrong(verdict) == {"shape", "size", "count"}
    assert verdict.fragments == 1


@pytest.mark.parametrize("value", [0, 128, 245, None])
def test_empty_and_senseless_pictures_are_judged(value):
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    image = noise if value is None else np.full((SIDE, SIDE, 3), value, np.uint8)
    verdict = verdict_of(image, TEXT)
    assert not verdict.all_right
    assert not verdict.count
    assert not verdict.relation


def test_what_the_text_leaves_open_is_not_judged(scene):
    verdict = verdict_of(draw(scene), "a red circle and a square")
    assert verdict.all_right
    assert (verdict.size, verdict.relation, verdict.background) == (None, None, None)


def test_alike_shapes_are_assigned_in_favour_of_the_text(scene):
    a, b = scene.shapes
    both = replace(scene, shapes=(a, replace(a, x=b.x)))
    text = write(parse("a large red circle left of a small red circle"))
    assert wrong(verdict_of(draw(both), text)) == {"size"}


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3))])
def test_the_reader_names_what_it_takes(image):
    with pytest.raises(ValueError, match="uint8 images of shape"):
        read(image)


def test_components_against_a_flood_fill():
    rng = np.random.default_rng(1)
    for _ in range(20):
        classes = rng.integers(-1, 3, (24, 24))
        labels, count = label(classes)
        assert count == labels.max() + 1
        assert (labels < 0).tolist() == (classes < 0).tolist()
        seen = np.full(classes.shape, -1)
        number = 0
        for start in zip(*np.nonzero(classes >= 0), strict=True):
            if seen[start] >= 0:
                continue
            stack = [start]
            seen[start] = number
            while stack:
                y, x = stack.pop()
                for v in range(max(y - 1, 0), min(y + 2, 24)):
                    for u in range(max(x - 1, 0), min(x + 2, 24)):
                        if seen[v, u] < 0 and classes[v, u] == classes[y, x]:
                            seen[v, u] = number
                            stack.append((v, u))
            number += 1
        assert number == count
        assert len(set(zip(seen[seen >= 0], labels[seen >= 0], strict=True))) == count
