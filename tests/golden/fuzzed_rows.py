"""Rows that no careful person would make: images of every kind, cut, garbled; odd metadata."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F")
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000", "PCX", "SGI")


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG without pixels that says how large it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def picture(chance: random.Random) -> bytes:
    """An image file of any kind that Pillow can write, or of a large size that it only claims."""
    special = chance.random()
    if special < 0.05:
        return png_header(chance.choice((30_000, 2**31 - 1)), 40_000)
    if special < 0.08:
        return png_header(40, 40, chance.choice((1, 3, 16, 200)), chance.choice((0, 2, 3, 9)))
    sizes = ((8, 8), (40, 30), (64, 64), (33, 90), (300, 20), (9, 200))
    size = chance.choice(((1, 1), (7, 300), (2, 3000), *sizes, *sizes))
    values = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (*size[::-1], 3))
    image = Image.fromarray(values.astype(np.uint8))
    mode, kind = chance.choice(MODES), chance.choice(KINDS)
    options: dict[str, Any] = {}
    if chance.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = chance.choice((3, 6, 8, 0, 77))
        options["exif"] = exif
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and chance.random() < 0.4:
        options |= {"save_all": True, "append_images": [image.rotate(180)] * 3}
    buffer = io.BytesIO()
    try:
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, kind, **options)
    except (OSError, ValueError, KeyError, SystemError, TypeError):  # not every mode in every kind
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
    return buffer.getvalue()


def garbled(data: bytes, chance: random.Random) -> bytes:
    """The same, whole or not."""
    kind = chance.randrange(10)
    if kind == 0:
        return data[: chance.randrange(len(data) + 1)]
    if kind == 1:
        bytes_ = bytearray(data)
        for _ in range(chance.randint(1, 30)):
            bytes_[chance.randrange(len(bytes_))] = chance.randrange(256)
        return bytes(bytes_)
    if kind == 2:
        place = chance.randrange(len(data))
        return data[:place] + chance.randbytes(chance.randint(1, 500)) + data[place:]
    if kind == 3:
        odd = (b"", b"\0" * 600, b"<html></html>", b"GIF89a", b"\xff\xd8\xff", b"II*\0", b"P6\n")
        return chance.choice((*odd, chance.randbytes(500), b"RIFF\xff\xff\xff\xffWEBPVP8X"))
    return data


def nested(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


CAPTIONS: tuple[Callable[[random.Random], Any], ...] = (
    *[lambda c: f"a picture number {c.randrange(1000)}"] * 6,
    lambda c: c.choice((None, 7, 2.5, True, [], {}, ["a", "b"], {"text": "a"})),
    lambda c: c.choice(("", "   ", "\0", "a\0b", "\n\t", "\ufeff", "\u202eback", "👩‍👩‍👧 é" * 50)),
    lambda c: "\ud800 alone" if c.random() < 0.5 else "tail \udfff",
    lambda c: "long " * c.choice((2000, 60_000)),
    lambda c: nested(c.choice((5, 80))),
)
NAMES: tuple[Callable[[random.Random], Any], ...] = (
    lambda c: c.choice((None, 5, "", " ", ".", "..", "../x.png", "/etc/hosts", "a\0b.png")),
    lambda c: c.choice(
        ("missing.png", "x" * 300 + ".png", "C:\\x.png", "\ud800.png", [], {"a": 1})
    ),
)
IDS = (None, 1, 1, 2.5, "same", "same", "", "\0", "\ud800", [1], {"a": {"b": 1}}, 10**40, True)
EXTRAS = (None, 1, -(2**70), 1.5, float("nan"), float("inf"), "text", "\ud800", [1, [2]], {"a": 1})
LINES = (b"{", b"[]", b"null", b'"text"', b"7", b"\xff\xfe{}", b'{"file_name": "a.png"', b"{}")


def write_rows(folder: Path, number: int, seed: int) -> int:
    """An image folder with metadata.jsonl. Returns how many rows it has: its lines."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    lines = []
    for i in range(number):
        (folder / f"{i}.img").write_bytes(garbled(picture(chance), chance))
        if chance.random() < 0.06:
            lines.append(chance.choice(LINES))
            continue
        odd_name = chance.random() < 0.06
        row: dict[str, Any] = {
            "file_name": chance.choice(NAMES)(chance) if odd_name else f"{i}.img"
        }
        row["text"] = chance.choice(CAPTIONS)(chance)
        if chance.random() < 0.1:
            row["id"] = chance.choice(IDS)
        if chance.random() < 0.1:
            row[chance.choice(("label", "sample", "image_index", "patient", "b\0c", ""))] = (
                chance.choice(EXTRAS)
            )
        if chance.random() < 0.03:
            del row[chance.choice(list(row))]
        lines.append(json.dumps(row).encode())
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return len(lines)


def write_table(path: Path, number: int, seed: int) -> int:
    """A Parquet file whose images are bytes of the same kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = random.Random(seed)
    images, texts = [], []
    for _ in range(number):
        data: bytes | None = garbled(picture(chance), chance)
        images.append({"bytes": None if chance.random() < 0.03 else data, "path": "x.png"})
        text = chance.choice(CAPTIONS)(chance)
        text = text if isinstance(text, str) else None
        texts.append(None if text is None else text.encode("utf-8", "surrogatepass"))
    binary = pa.array(texts, pa.binary())
    captions = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(images), "text": captions}), path, row_group_size=50)
    return number
