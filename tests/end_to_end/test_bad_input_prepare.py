"""`arra prepare` as a user meets it: a folder with every bad file there is, wrong flags."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from arra.cli import main
from arra.data.shards import open_dataset


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(left, right, mode="RGB"):
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def bomb():
    """A PNG of 100 bytes that says it is 30000 x 30000."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def nasty_folder(folder):
    """Name -> what must become of it: an image to compare with, or a word of the reason."""
    red_blue = halves((255, 0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = red_blue.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    grey16 = Image.fromarray(np.repeat([[0, 65535]], 8, axis=1).repeat(16, axis=0).astype("uint16"))
    files = {
        "plain.png": (encoded(red_blue), red_blue),
        "rotated.png": (encoded(red_blue.rotate(90), exif=exif), red_blue),
        "alpha.png": (
            encoded(halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA")),
            halves((255, 0, 0), (255, 255, 255)),
        ),
        "palette.png": (encoded(palette), red_blue),
        "sixteen.png": (encoded(grey16), halves((0, 0, 0), (255, 255, 255))),
        "cmyk.jpg": (
            encoded(Image.new("CMYK", (16, 16)), "JPEG"),
            Image.new("RGB", (16, 16), "white"),
        ),
        "truncated.jpg": (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "truncated"),
        "zero.png": (b"", "empty"),
        "text.png": (b"not an image at all", "not an image"),
        "one.png": (encoded(Image.new("RGB", (1, 1))), "1x1"),
        "bomb.png": (bomb(), "pixels"),
        "missing.png": (None, "missing file"),
    }
    folder.mkdir()
    lines = []
    for name, (data, _) in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
        lines.append(json.dumps({"file_name": name, "text": f"this is {name}"}).encode())
    bad_lines = {
        b'{"file_name": "plain.png", "text": "once more"}': "duplicate id",
        b'{"file_name": "a.png", "text": ""}': "caption is empty",
        b'{"file_name": "b.png", "text": "caf\xe9"}': "not valid UTF-8",
        b'{"file_name": "../c.png", "text": "outside"}': "leaves the folder",
        b'{"file_name": "/etc/d.png", "text": "outside"}': "absolute",
        b'{"file_name": "e.png"}': "caption is missing",
        b"{": "not valid JSON",
    }
    (folder / "metadata.jsonl").write_bytes(b"\n".join([*lines, *bad_lines]))
    reasons = [word for _, word in files.values() if isinstance(word, str)]
    good = {name: image for name, (_, image) in files.items() if not isinstance(image, str)}
    return good, reasons + list(bad_lines.values())


def prepare(source, out, tokenizer, encoder, *more):
    command = [
        "prepare",
        str(source),
        "--image-tokenizer",
        str(tokenizer.folder),
        "--out",
        str(out),
    ]
    return main(
        [*command, "--encoder", f"eye={encoder}", "--size", "16", "--shard-rows", "4", *more]
    )


def test_a_folder_of_nasty_files(tmp_path, tiny_tokenizer, encoder, capsys):
    good, reasons = nasty_folder(tmp_path / "in")
    assert prepare(tmp_path / "in", tmp_path / "out", tiny_tokenizer, encoder) == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.ids == list(good)
    for name, ids, (height, width) in zip(
        dataset.ids, dataset.image_ids, dataset.grids, strict=True
    ):
        pixels = torch.from_numpy(np.asarray(good[name]).copy()).permute(2, 0, 1)[None]
        expected = tiny_tokenizer.encode(pixels)[0]
        assert (height, width) == expected.shape
        assert ids.tolist() == expected.flatten().tolist(), name
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    rejects = [json.loads(line) for line in lines]
    assert len(rejects) == len(reasons)
    for reject, word in zip(rejects, reasons, strict=True):
        assert word in reject["reason"], reject
        assert "\n" not in reject["reason"]
    assert "13 left out" in capsys.readouterr().err


def failure(capsys):
    """The one line that a failed command prints."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("arra: ")]
    assert len(lines) == 1
    return lines[0]


def test_one_sentence_for_each_wrong_option(tmp_path, tiny_tokenizer, encoder, capsys):
    nasty_folder(tmp_path / "in")
    source, out = tmp_path / "in", tmp_path / "out"

    def failed(given=source, eye=encoder, *more):
        assert prepare(given, out, tiny_tokenizer, eye, *more) == 1
        return failure(capsys)

    assert "no column 'caption'" in failed(source, encoder, "--text-column", "caption")
    assert "does not exist" in failed(tmp_path / "nowhere")
    assert "supported are clip" in failed(source, tiny_tokenizer.folder)
    assert "hub cannot be reached" in failed(source, "nobody/nothing")
    assert "no pooling" in failed(source, f"{encoder}@median")
    assert "choose a multiple" in failed(source, encoder, "--size", "15")
    with pytest.raises(SystemExit, match="2"):
        prepare(source, out, tiny_tokenizer, encoder, "--size", "0")
    assert "--size must be at least 1" in capsys.readouterr().err
    assert not out.exists()


def test_a_flipped_byte_and_the_same_command(tmp_path, tiny_tokenizer, encoder, capsys):
    nasty_folder(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out", tiny_tokenizer, encoder)
    shard = tmp_path / "out" / "train-00000.parquet"
    good = shard.read_bytes()
    shard.write_bytes(good[:50] + bytes([good[50] ^ 4]) + good[51:])
    with pytest.raises(ValueError, match=r"train-00000\.parquet is damaged .* `arra prepare`"):
        open_dataset(tmp_path / "out")
    assert prepare(tmp_path / "in", tmp_path / "out", tiny_tokenizer, encoder) == 0
    assert shard.read_bytes() == good
    assert "arra: " not in capsys.readouterr().err
