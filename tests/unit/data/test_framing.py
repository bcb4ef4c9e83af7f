"""Framing: what of a picture is seen. Facts are held against the originals' own rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from arra.data.framing import Framing, bucket_sizes, framing_of, nearest
from arra.data.images import CROP, BadImage, square

SIDES = st.integers(8, 400)


def gradient(width, height):
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def walked(cells, step):
    """The sizes by walking along the edge of the allowed ones, from the widest to the highest."""
    found, columns, rows = [], cells, 1
    while columns > 0:
        if max(columns, rows) <= 4 * min(columns, rows):
            found.append((columns * step, rows * step))
        fits = (rows + 1) * columns <= cells
        columns, rows = (columns, rows + 1) if fits else (columns - 1, rows)
    return found


@pytest.mark.parametrize(("size", "step", "count"), [(512, 32, 49), (768, 32, 73), (64, 16, 13)])
def test_buckets_are_lumina_mgpts(size, step, count):
    sizes = bucket_sizes(size, step)
    assert list(sizes) == walked((size // step) ** 2, step)
    assert len(sizes) == count  # 49 and 73: printed by Lumina-mGPT's own function
    assert (size, size) in sizes


@settings(deadline=None)
@given(SIDES, SIDES)
def test_the_nearest_bucket_keeps_most_of_the_picture(width, height):
    sizes = bucket_sizes(128, 16)
    chosen = nearest((width, height), sizes)

    def kept(bucket):
        scales = [bucket[0] / width, bucket[1] / height]
        return min(scales) / max(scales)

    assert kept(chosen) >= max(map(kept, sizes)) - 1e-12


@settings(deadline=None, max_examples=50)
@given(SIDES, SIDES)
def test_every_framing_gives_the_size_it_says(width, height):
    image = gradient(width, height)
    assert Framing(64).frame(image).size == (64, 64)
    assert Framing(64, "pad").frame(image).size == (64, 64)
    framed = Framing(64, "buckets", bucket_step=16).frame(image)
    assert framed.size in bucket_sizes(64, 16)
    assert framed.width * framed.height <= 64 * 64


def test_a_square_picture_is_framed_alike_by_all():
    image = gradient(100, 100)
    for kind in ("crop", "pad", "buckets"):
        assert np.array_equal(Framing(64, kind).frame(image), square(image, 64))
    for kind in ("crop", "pad", "buckets"):  # and what has the size already stays as it is
        small = gradient(64, 64)
        assert np.array_equal(Framing(64, kind).frame(small), small)


def test_crop_cuts_the_sides_pad_fills_them_and_buckets_keep_them():
    image = gradient(200, 100)
    crop = np.asarray(Framing(64).frame(image))
    assert 60 <= crop[32, 0, 0] <= 70  # a quarter of the picture is gone on either side
    padded = np.asarray(Framing(64, "pad", pad_colour="#102030").frame(image))
    assert padded.shape == (64, 64, 3)
    assert (padded[:16] == [16, 32, 48]).all()
    assert (padded[48:] == [16, 32, 48]).all()
    assert padded[32, 0, 0] < 5
    assert padded[32, 63, 0] > 250
    bucket = np.asarray(Framing(64, "buckets", bucket_step=16).frame(image))
    assert bucket.shape == (48, 80, 3)  # of 80x48, 96x32, ... the nearest to 2:1
    assert 15 <= bucket[24, 0, 0] <= 30


def test_names_differ_where_pixels_do():
    framings = [
        Framing(64),
        Framing(64, "pad"),
        Framing(64, "pad", pad_colour="black"),
        Framing(64, "buckets", bucket_step=16),
        Framing(64, "buckets", bucket_step=32),
    ]
    assert framings[0].name == CROP
    assert len({framing.name for framing in framings}) == len(framings)
    for framing in framings:
        assert framing_of(64, framing.described()) == framing
    assert framing_of(64, {}) == Framing(64)


def test_a_mirrored_view_is_the_frame_mirrored_unless_the_caption_says_a_side():
    image = gradient(120, 80)
    for kind in ("crop", "pad", "buckets"):
        framing = Framing(64, kind, views="flip")
        views = framing.views_of(image, "a bright picture, copyright")
        assert list(views) == ["flip"]
        assert np.array_equal(views["flip"], ImageOps.mirror(framing.frame(image)))
        for caption in ("a cup to the LEFT of a plate", "the rightmost of three"):
            assert framing.views_of(image, caption) == {}
    assert Framing(64).views_of(image, "a picture") == {}


def test_ten_crops_are_corners_and_centre_of_a_larger_square_and_their_mirrored_ones():
    image = gradient(300, 200)
    framing = Framing(100, views="ten-crop")
    views = framing.views_of(image, "a picture")
    large = np.asarray(square(image, 110))  # int(100 * 1.1), as LlamaGen's --crop-range
    where = {
        "top-left": large[:100, :100],
        "top-right": large[:100, 10:],
        "bottom-left": large[10:, :100],
        "bottom-right": large[10:, 10:],
        "centre": large[5:105, 5:105],
    }
    assert len(views) == 10
    for name, pixels in where.items():
        assert np.array_equal(views[name], pixels)
        assert np.array_equal(views[f"{name}-flip"], pixels[:, ::-1])
    assert list(framing.views_of(image, "left lung")) == list(where)


def test_sizes_that_are_left_out():
    with pytest.raises(BadImage, match=r"filtered: a side is shorter than 100 pixels \(99\)"):
        Framing(64, min_side=100).frame(gradient(300, 99))
    Framing(64, min_side=100).frame(gradient(300, 100))
    with pytest.raises(BadImage, match=r"filtered: the aspect ratio is above 2 \(301:150\)"):
        Framing(64, max_aspect=2).frame(gradient(150, 301))
    Framing(64, max_aspect=2).frame(gradient(150, 300))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "stretch"}, "crop, pad, buckets"),
        ({"views": "mirror"}, "none, flip, ten-crop"),
        ({"kind": "buckets", "bucket_step": 48}, "not a multiple of --bucket-step 48"),
        ({"kind": "pad", "pad_colour": "blackish"}, "is no colour"),
        ({"kind": "pad", "views": "ten-crop"}, "needs --framing crop"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Framing(64, **options)
