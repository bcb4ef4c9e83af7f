"""Every kind of file that a folder of pictures may hold, decoded right or refused with a reason."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from arra.data.images import BadImage, grid, load_rgb, square, to_pil, to_uint8


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height=20, width=30, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_plain_pixels_are_unchanged(kind):
    value = noise()
    assert np.array_equal(pixels(load_rgb(encoded(Image.fromarray(value), kind))), value)


def test_bytes_path_and_image_give_the_same(tmp_path):
    image = Image.fromarray(noise())
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    for given in (path, str(path), path.read_bytes(), image):
        loaded = load_rgb(given)
        assert loaded.mode == "RGB"
        assert np.array_equal(pixels(loaded), pixels(image))


def test_alpha_is_composed_on_white():
    value = np.zeros((10, 10, 4), np.uint8)
    value[:, :, 0] = 200
    value[:, :5, 3] = 255
    value[:, 5:7, 3] = 128
    loaded = pixels(load_rgb(encoded(Image.fromarray(value))))
    assert (loaded[:, :5] == [200, 0, 0]).all()
    expected = np.round(np.array([200, 0, 0]) * 128 / 255 + 255 * 127 / 255)
    assert np.abs(loaded[:, 5:7] - expected).max() <= 1
    assert (loaded[:, 7:] == 255).all()


def test_grey_with_alpha():
    value = np.zeros((9, 9, 2), np.uint8)
    value[:, :4] = [90, 255]
    loaded = pixels(load_rgb(encoded(Image.fromarray(value, "LA"))))
    assert (loaded[:, :4] == 90).all()
    assert (loaded[:, 4:] == 255).all()


@pytest.mark.parametrize("transparent", [None, 1])
def test_palette(transparent):
    image = Image.new("P", (12, 12), 0)
    image.putpalette([10, 20, 30, 40, 50, 60] + [0] * 762)
    image.paste(1, (6, 0, 12, 12))
    options = {} if transparent is None else {"transparency": transparent}
    loaded = pixels(load_rgb(encoded(image, **options)))
    assert (loaded[:, :6] == [10, 20, 30]).all()
    assert (loaded[:, 6:] == ([40, 50, 60] if transparent is None else [255] * 3)).all()


def test_transparent_colour():
    value = np.full((8, 8, 3), 7, np.uint8)
    value[4:] = [1, 2, 3]
    loaded = pixels(load_rgb(encoded(Image.fromarray(value), transparency=(1, 2, 3))))
    assert (loaded[:4] == 7).all()
    assert (loaded[4:] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_by_65535(kind):
    value = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    loaded = pixels(load_rgb(encoded(Image.fromarray(value), kind)))
    expected = np.round(value.astype(float) * 255 / 65535)
    assert np.array_equal(loaded[..., 0], expected)
    assert (loaded[..., 0] == loaded[..., 1]).all()
    assert loaded[0, 0, 0] == 0
    assert loaded[-1, -1, 0] == 255


def test_16_bit_colour():
    rows = np.linspace(0, 65535, 16 * 16 * 3).astype(">u2").reshape(16, 16, 3)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    loaded = pixels(load_rgb(png(16, 16, 16, 2, raw)))
    assert np.abs(loaded - rows.astype(float) * 255 / 65535).max() <= 1


def png(width, height, depth, colour, raw):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    upright = noise(16, 24)
    stored = {
        1: lambda v: v,
        2: lambda v: v[:, ::-1],
        3: lambda v: v[::-1, ::-1],
        4: lambda v: v[::-1],
        5: lambda v: v.transpose(1, 0, 2),
        6: lambda v: np.rot90(v),  # a camera held so that the reader must turn it clockwise
        7: lambda v: v[::-1, ::-1].transpose(1, 0, 2),
        8: lambda v: np.rot90(v, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    assert np.array_equal(pixels(load_rgb(encoded(image, exif=exif))), upright)
    loaded = load_rgb(encoded(image, "JPEG", exif=exif, quality=95))
    assert loaded.size == (24, 16)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("CMYK", (10, 10), (0, 255, 255, 0)), "JPEG"),
        (Image.new("1", (10, 10), 1), "PNG"),
        (Image.new("YCbCr", (10, 10)), "JPEG"),
    ],
)
def test_other_modes_become_rgb(image, kind):
    assert load_rgb(encoded(image, kind)).mode == "RGB"


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (10, 10), c) for c in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(load_rgb(data)) == [255, 0, 0]).all()


def cut(kind, share):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    return data[: int(len(data) * share)]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is no image", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "truncated or damaged|not an image"),
        (cut("JPEG", 0.5), "truncated"),
        (cut("PNG", 0.5), "truncated"),
        (cut("WEBP", 0.5), "truncated|not an image"),
        (cut("TIFF", 0.5), "truncated"),
        (cut("GIF", 0.5), "truncated"),
        (cut("BMP", 0.5), "truncated"),
        (encoded(Image.new("RGB", (1, 1))), "1x1 pixels"),
        (encoded(Image.new("RGB", (100, 3))), "100x3 pixels"),
        (encoded(Image.new("F", (10, 10)), "TIFF"), "floating-point"),
        (encoded(Image.new("I", (10, 10)), "TIFF"), "32-bit"),
        (png(60000, 60000, 1, 0, b""), "pixels"),
        (png(16000, 12000, 1, 0, b""), "pixels"),
    ],
)
def test_refused_with_a_reason(data, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        load_rgb(data)
    assert "\n" not in caught.value.reason


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(BadImage, match="missing file"):
        load_rgb(tmp_path / "nothing.png")
    with pytest.raises(BadImage, match="not a file"):
        load_rgb(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_never_raise_anything_else():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF"):
        good = encoded(Image.fromarray(noise(16, 16)), kind)
        for _ in range(60):
            data = bytearray(good)
            for position in generator.integers(0, len(data), 3):
                data[position] = generator.integers(0, 256)
            with contextlib.suppress(BadImage):
                assert load_rgb(bytes(data)).mode == "RGB"


def test_square_is_the_centre():
    value = noise(10, 16)
    image = square(Image.fromarray(value), 10)
    assert np.array_equal(pixels(image), value[:, 3:13])
    assert np.array_equal(pixels(square(image, 10)), pixels(image))


def test_square_scales_down_without_aliasing_and_up():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = pixels(square(Image.fromarray(stripes), 16))
    assert np.abs(small[2:-2, 2:-2] - 127.5).max() < 4
    assert square(Image.fromarray(noise(20, 30)), 64).size == (64, 64)


def test_tensor_round_trip():
    values = [noise(8, 12, seed=i) for i in range(3)]
    tensor = to_uint8([Image.fromarray(v) for v in values])
    assert tensor.shape == (3, 3, 8, 12)
    assert tensor.dtype == torch.uint8
    for value, image in zip(values, to_pil(tensor), strict=True):
        assert np.array_equal(np.asarray(image), value)


def test_contact_sheet():
    images = [Image.new("RGB", (16, 16), c) for c in ("red", "green", "blue")]
    sheet = grid(images, 2, gap=2)
    assert sheet.size == (38, 38)
    assert sheet.getpixel((3, 3)) == (255, 0, 0)
    assert sheet.getpixel((3, 21)) == (0, 0, 255)
    assert sheet.getpixel((30, 30)) == (255, 255, 255)
    captioned = grid(images, 2, ["one", "two", "a very long caption that needs several lines"])
    assert captioned.height > sheet.height
    with pytest.raises(ValueError, match="2 captions for 3"):
        grid(images, 2, ["a", "b"])
