"""Gathers what run.sh measured into results.json and reconstructions.png beside this file.

python experiments/semantic-tokenizer/collect.py runs/semantic-tokenizer
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from arra.data.images import grid, load_rgb, square, to_pil, to_uint8
from arra.data.sources import Record, open_source
from arra.encoders import load_encoder
from arra.files import read_json, write_json
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.probe import explained

HERE = Path(__file__).parent
NAMES = ("plain", "regularised", "semantic")
TEACHER = "builtin:scenes-clip"
KEPT = ("fingerprint", "codebook_size", "codes_per_image")


def test_scenes(count: int) -> list[Image.Image]:
    source = open_source("builtin:scenes:1-4", split="test", limit=count)
    return [square(load_rgb(r.image), 64) for r in source.read(0, count) if isinstance(r, Record)]


def references(images: list[Image.Image]) -> dict[str, float | None]:
    """What bounds the numbers: the teacher's own patches as a reading, and the loss of a constant.

    `constant` is 1 - cos of every patch to the one direction that fits all best.
    """
    patches = load_encoder(TEACHER, "patch", grids=True)
    patches_NPd = torch.cat([patches(images[i : i + 50]) for i in range(0, len(images), 50)])
    whole = load_encoder(TEACHER)
    class_ND = torch.cat([whole(images[i : i + 50]) for i in range(0, len(images), 50)])
    mean_Nd = patches_NPd.mean(dim=1).double().numpy()
    constant = 1 - F.normalize(patches_NPd, dim=-1).mean(dim=(0, 1)).norm()
    return {
        "probe_of_mean_patches": explained(mean_Nd, np.asarray(class_ND.double())),
        "constant": float(constant),
    }


def pictures(out: Path, images: list[Image.Image]) -> Image.Image:
    """Originals, then a row of reconstructions for each tokenizer."""
    cells = [image.resize((128, 128), Image.Resampling.NEAREST) for image in images]
    for name in NAMES:
        tokenizer = load_image_tokenizer(out / name)
        rebuilt = to_pil(tokenizer.decode(tokenizer.encode(to_uint8(images))))
        cells += [image.resize((128, 128), Image.Resampling.NEAREST) for image in rebuilt]
    return grid(cells, len(images))


def painters(out: Path) -> dict[str, Any]:
    """What the pairs of painters.sh came to, by tokenizer."""
    found = {}
    for path in sorted(out.glob("painters-*/results.json")):
        study = read_json(path)
        pair = study["pairs"][0]
        found[path.parent.name.removeprefix("painters-")] = {
            "groups": study["groups"],
            "guidance": {name: arm["guidance"] for name, arm in pair["arms"].items()},
            "metrics": {name: arm["metrics"] for name, arm in pair["arms"].items()},
            "differences": pair["differences"],
            "ceiling": study["ceiling"],
        }
    return found


def main(out: Path) -> None:
    results: dict[str, Any] = {"references": references(test_scenes(400))}
    for name in NAMES:
        line = json.loads((out / name / "log.jsonl").read_text().splitlines()[-1])
        results[name] = {"fit": line}
        for split in ("test", "compositional"):
            path = out / f"measured-{name}-{split}" / "report.json"
            if not path.exists():  # LOG.md says what was not measured
                continue
            report = read_json(path)
            results[name]["tokenizer"] = {key: report["tokenizer"][key] for key in KEPT}
            results[name][split] = report["metrics"]
    results["painters"] = painters(out)
    write_json(HERE / "results.json", results)
    picture = pictures(out, test_scenes(8)).convert("RGB").quantize(128)
    picture.save(HERE / "reconstructions.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
