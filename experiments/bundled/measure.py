"""Measure what is bundled: the reader (also behind the tokenizer) and the judge's distance.

OMP_NUM_THREADS=1 python experiments/bundled/measure.py        (one JSON object; a few minutes)
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import torch
from fit_judge import DAMAGES, damage
from PIL import Image
from scene_batches import scenes

from arra.data.builtin import Scene, caption, draw, judge, parse, read, scene_at
from arra.encoders import load_encoder
from arra.image_tokenizers import load_image_tokenizer

FIELDS = ("shape", "colour", "size", "count", "relation", "background")
COUNT = 600  # images of each set whose distance is measured


def reconstruct(tokenizer, images: list[np.ndarray]) -> list[np.ndarray]:
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        back = [tokenizer.decode(tokenizer.encode(chunk)) for chunk in pixels.split(50)]
    return list(torch.cat(back).permute(0, 2, 3, 1).contiguous().numpy())


def score_reader(drawn: list[Scene], images: list[np.ndarray]) -> dict:
    verdicts = [
        judge(read(image), parse(caption(scene)))
        for scene, image in zip(drawn, images, strict=True)
    ]
    wrong = Counter(name for v in verdicts for name in FIELDS if getattr(v, name) is False)
    wrong["fragments"] = sum(v.fragments > 0 for v in verdicts)
    all_right = sum(v.all_right for v in verdicts) / len(verdicts)
    return {"scenes": len(verdicts), "all_right": round(all_right, 4), "wrong": dict(wrong)}


def frechet(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2), A and B the covariances; float64."""
    a_DD, b_DD = np.cov(a_ND.T), np.cov(b_ND.T)
    roots_D = np.sqrt(np.maximum(np.linalg.eigvals(a_DD @ b_DD).real, 0))
    shift_D = a_ND.mean(0) - b_ND.mean(0)
    return float(shift_D @ shift_D + np.trace(a_DD) + np.trace(b_DD) - 2 * roots_D.sum())


def distances(spec: str, sets: dict[str, list[np.ndarray]]) -> dict[str, float]:
    encoder = load_encoder(spec)
    of = {
        name: torch.cat(
            [encoder([Image.fromarray(image) for image in images[i : i + 100]])
             for i in range(0, len(images), 100)]
        ).double().numpy()
        for name, images in sets.items()
    }  # fmt: skip
    return {
        name: round(frechet(of["reference"], of[name]), 3) for name in sets if name != "reference"
    }


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = load_image_tokenizer("builtin:scenes")
    report: dict = {"reader": {}, "reader_behind_tokenizer": {}, "distance_from_test_scenes": {}}
    for split, shapes, count in (
        ("test", (1, 2), 1000),
        ("test", (3, 4), 500),
        ("compositional", (1, 2), 500),
    ):
        drawn = [scene_at(split, index, shapes=shapes) for index in range(count)]
        images = [draw(scene) for scene in drawn]
        name = f"{split} {shapes[0]}-{shapes[1]}"
        report["reader"][name] = score_reader(drawn, images)
        behind = score_reader(drawn, reconstruct(tokenizer, images))
        report["reader_behind_tokenizer"][name] = behind
    source, rng = scenes("test", seed=30), np.random.default_rng(30)
    sets = {"reference": [draw(scene) for scene in islice(source, COUNT)]}
    sets["other test scenes"] = [draw(scene) for scene in islice(source, COUNT)]
    sets["their reconstructions"] = reconstruct(tokenizer, sets["other test scenes"])
    for how in DAMAGES[1:]:
        sets[how] = [damage(image, how, rng) for image in sets["other test scenes"]]
    sets["backgrounds only"] = [np.full_like(image, image[0, 0]) for image in sets["reference"]]
    for spec in (
        "builtin:scenes-judge@class",
        "builtin:scenes-judge@mean",
        "builtin:scenes-clip@class",
    ):
        report["distance_from_test_scenes"][spec] = distances(spec, sets)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
