"""Stand-ins for models that see one thing in an image, its red level, and say it in codes and in
features: so that it shows when a code and a feature come from different images.
"""

import json
import os
import signal
import time

import numpy as np
import torch
from PIL import Image

from arra.data.prepare_config import PrepareConfig

SIZE, FACTOR = 16, 8
CRASHES, HANGS, KILLED, FAILS = 11, 14, 9, 5


class RedTokenizer:
    """Every code is the red level of its cell."""

    codebook_size, factor, fingerprint = 256, FACTOR, "red-tokenizer"

    def __init__(self):
        self.batches = []

    def encode(self, pixels_NCHW):
        assert pixels_NCHW.dtype == torch.uint8
        self.batches.append(pixels_NCHW.clone())
        return pixels_NCHW[:, 0, ::FACTOR, ::FACTOR].long()


class RedEncoder:
    """Features [red / 256, 1], and what the test makes of certain levels."""

    dtype, gives_grids = "float32", False

    def __init__(self, spec="red", name="red", odd=()):
        self.spec, self.name, self.pooling, self.dim = spec, name, "class", 2
        self.fingerprint, self.odd, self.seen = f"fp-{spec}", dict(odd), []

    def pixels(self, images):
        self.seen += [np.asarray(image) for image in images]
        return torch.stack(
            [torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) for i in images]
        )

    def pool(self, pixels_NCHW):
        assert torch.is_inference_mode_enabled()
        red_N = pixels_NCHW[:, 0, 0, 0].float()
        features = torch.stack([red_N / 256, torch.ones_like(red_N)], dim=1)
        for level, value in self.odd.items():
            features[red_N == level] = value
        return features


def make_source(folder, count, *, size=20):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        Image.new("RGB", (size, size + i % 3), (i, 255 - i, 7)).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"red {i}", "id": f"id{i}", "label": i % 2})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def config(source, out, **changes):
    options = {"image_tokenizer": "red", "encoder": ("red",), "size": SIZE, "batch_size": 4}
    options |= {"shard_rows": 10, "val_fraction": 0.1, "threads": 1}
    return PrepareConfig(source=str(source), out=out, **(options | changes))


def content(folder):
    """Every file's bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def red_pixels(images):
    """Of an image whose red level says so, what ends a process."""
    for image in images:
        level = image.getpixel((0, 0))[0]
        if level == HANGS:
            time.sleep(60)
        elif level == FAILS:
            raise ValueError("these pixels cannot be made")
        elif level in (CRASHES, KILLED):
            os.kill(os.getpid(), level)
    return torch.stack([torch.tensor(np.asarray(i)).permute(2, 0, 1).float() for i in images])


def killed_pixels(images):
    """As when memory runs out."""
    if any(image.getpixel((0, 0))[0] == KILLED for image in images):
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(len(images), 3, 16, 16)
