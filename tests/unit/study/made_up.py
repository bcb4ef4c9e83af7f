"""Results and pictures of a study that never happened, for tests of how they are shown."""

import math

import numpy as np
from PIL import Image

from arra.data.scenes.drawing import draw
from arra.data.scenes.language import caption
from arra.data.scenes.world import scene_at
from arra.study.report import Film, Sample

FIELDS = ("all_right", "shape", "colour", "size", "count", "relation", "background")


def interval(mean, spread, n):
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": n}


def arm(name, gain):
    batch, steps = 32, 5000
    log = []
    for step in range(20, steps + 1, 20):
        progress = step / steps
        line = {"step": step, "images_seen": step * batch}
        line["loss_ar"] = 1.1 + 2.4 * math.exp(-6 * progress) - gain * progress * 0.3
        line["loss_ar"] += 0.03 * math.sin(step * 1.7)
        if name == "aligned":
            line["loss_gva"] = 0.32 - 0.2 * (1 - math.exp(-4 * progress)) + 0.01 * math.sin(step)
            line["gva_constant"] = 0.3
            line["retrieval"] = 0.05 + 0.4 * progress
        if step % 1000 == 0:
            line["val_loss_ar"] = line["loss_ar"] + 0.05
        log.append(line)
    points = []
    for step in range(1000, steps + 1, 1000):
        progress = step / steps
        points.append(
            {
                "step": step,
                "images_seen": step * batch,
                "metrics": {
                    "all_right": interval(0.03 + (0.2 + gain) * progress, 0.05, 96),
                    "colour": interval(0.1 + (0.4 + gain) * progress, 0.06, 96),
                    "fd@made-up-judge": interval(9 - (5 + 9 * gain) * progress, 0.4, 96),
                },
            }
        )
    metrics = {}
    for group, drop, n in (("test", 0.0, 512), ("compositional", 0.12, 256)):
        metrics[group] = {
            field: interval(0.2 + 0.09 * number + gain - drop, 0.04, n)
            for number, field in enumerate(FIELDS)
        }
        metrics[group]["fragments"] = interval(0.6 - gain + drop, 0.05, n)
        metrics[group]["fd@made-up-judge"] = interval(4.1 - 9 * gain, 0.3, n)
    metrics["val"] = {"val_loss_ar": {"mean": log[-1]["val_loss_ar"], "low": None, "high": None}}
    return {
        "log": log,
        "points": points,
        "metrics": metrics,
        "guidance": 3.0,
        "batch_size": batch,
        "seconds": 431.0,
    }


def results(gain=0.09):
    arms = {"plain": arm("plain", 0.0), "aligned": arm("aligned", gain)}
    differences = {}
    for group, measures in arms["plain"]["metrics"].items():
        differences[group] = {}
        for name, value in measures.items():
            mean = arms["aligned"]["metrics"][group][name]["mean"] - value["mean"]
            known = value["low"] is not None
            spread = 0.04 if name != "relation" else abs(mean) + 0.01
            differences[group][name] = {
                "mean": mean,
                "low": mean - spread if known else None,
                "high": mean + spread if known else None,
                "p": (0.0002 if abs(mean) > spread else 0.31) if known else None,
                "n": value.get("n", 1),
            }
    return {
        "format_version": 1,
        "kind": "scenes",
        "title": "MADE-UP NUMBERS: does alignment help a small painter?",
        "data": {"label": "captioned scenes that were never drawn"},
        "guidance_chosen": True,
        "groups": {
            "test": "512 unseen captions",
            "compositional": "256 captions with combinations held out of training",
            "val": "validation images",
        },
        "pairs": [{"seed": 0, "arms": arms, "differences": differences}],
        "over_seeds": None,
        "ceiling": {"test": dict.fromkeys(FIELDS, 0.97)},
        "reasons": {},
        "depth": {
            "layers": 6,
            "used": 3,
            "source": "From experiments/made-up/results.json, seeds 1 and 2 (made up).",
            "rows": [
                {"layer": None, "metrics": {"val_loss_ar": 1.21, "all_right": 0.2}},
                {"layer": 1, "metrics": {"val_loss_ar": 1.21, "all_right": 0.19}},
                {"layer": 3, "metrics": {"val_loss_ar": 1.13, "all_right": 0.29}},
                {"layer": 6, "metrics": {"val_loss_ar": 1.16, "all_right": 0.24}},
            ],
        },
        "run": {
            "stages": {"prepare": 41.0, "train": 455.0, "paint": 92.0, "measure": 9.0},
            "facts": {
                "data": "made up",
                "model": "6 blocks of width 192, 3.1 M parameters (made up)",
                "teacher": "none, this is a test",
                "commit": "0000000",
                "hardware": "2 imaginary cores",
                "versions": "torch 0, transformers 0",
            },
            "commands": ["arra train scenes --data nowhere --align.weight 0 --out plain"],
        },
    }


def samples(count=16, size=64, reference=False):
    found = []
    for index in range(count):
        scene = scene_at("test", index)
        other = draw(scene_at("test", index + 100))
        picture = Image.fromarray(draw(scene)).resize((size, size))
        broken = np.where(np.arange(64)[:, None, None] % 9 == 0, 255 - other, other)
        found.append(
            Sample(
                caption(scene),
                Image.fromarray(broken.astype(np.uint8)).resize((size, size)),
                picture,
                picture if reference else None,
                "✗ colour, size",
                "✓ all right",
            )
        )
    return found


def films(count=3):
    found = []
    seen = (32_000, 64_000, 96_000, 128_000, 160_000)
    for index in range(count):
        scene = scene_at("test", index)
        clean = draw(scene).astype(float)
        noise = np.random.default_rng(index).integers(0, 256, (64, 64, 3))
        frames = [
            Image.fromarray((clean * k / 5 + noise * (1 - k / 5)).astype(np.uint8))
            for k in range(1, 6)
        ]
        found.append(Film(caption(scene), seen, tuple(frames[:1] + frames[:4]), tuple(frames)))
    return found
