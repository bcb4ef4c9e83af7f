"""Fit `builtin:scenes-judge`: a small ViT that only measures distances between sets of images.

    OMP_NUM_THREADS=1 python experiments/bundled/fit_judge.py --out FOLDER

It must not share the teacher's view of the world, or a model that was aligned to the teacher would
be judged by its own target: another architecture (transformers' ViTModel, other width and depth),
no text, another objective. Supervised from the drawing itself: each patch token tells what covers
its 8x8 cell, the class token tells the number of shapes of each (colour, kind) and size, the
background, and how the picture was damaged (so that the features see defects, not just content).
The heads are thrown away. About five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from scene_batches import CELL, MIXTURE, lay_out_positions, pixels, probe_all, scenes, stack_answers
from torch.nn import functional as F
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from arra.data.scenes.drawing import draw
from arra.data.scenes.world import BACKGROUNDS, COLOURS, KINDS, SIDE, SIZES

DAMAGES = ("none", "blur", "noise", "shuffled", "shifted", "tint")


def damage(image: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """One of the ways in which painted pictures go wrong; uint8 HWC in and out."""
    if how == "none":
        return image
    out = image.astype(np.float32)
    if how == "blur":
        for _ in range(int(rng.integers(2, 8))):
            out = (out + np.roll(out, 1, 0) + np.roll(out, -1, 0)) / 3
            out = (out + np.roll(out, 1, 1) + np.roll(out, -1, 1)) / 3
    elif how == "noise":
        out += rng.normal(0, rng.uniform(6, 30), out.shape)
    elif how == "tint":
        out += rng.normal(0, 25, 3)
    elif how == "shuffled":  # cells of the picture change places, as wrong codes do
        for _ in range(int(rng.integers(2, 8))):
            (y, v), (x, u) = rng.integers(0, SIDE // CELL, (2, 2)) * CELL
            here, there = np.s_[y : y + CELL, x : x + CELL], np.s_[v : v + CELL, u : u + CELL]
            out[here], out[there] = out[there].copy(), out[here].copy()
    else:
        assert how == "shifted"  # a band of the picture slides: shapes break in two
        low = int(rng.integers(8, 40))
        high = low + int(rng.integers(8, 24))
        shift = int(rng.choice((-1, 1)) * rng.integers(3, 13))
        if rng.random() < 0.5:
            out[low:high] = np.roll(out[low:high], shift, axis=1)
        else:
            out[:, low:high] = np.roll(out[:, low:high], shift, axis=0)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def build() -> ViTModel:
    return ViTModel(
        ViTConfig(
            image_size=SIDE,
            patch_size=CELL,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )


class Heads(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.cover = torch.nn.Linear(width, len(COLOURS) + len(KINDS))
        self.counts = torch.nn.Linear(width, len(COLOURS) * (len(KINDS) + len(SIZES)))
        self.background = torch.nn.Linear(width, len(BACKGROUNDS))
        self.damage = torch.nn.Linear(width, len(DAMAGES))

    def forward(self, hidden_NTD: torch.Tensor, answer: dict, damage_N: torch.Tensor) -> dict:
        token_ND = hidden_NTD[:, 0]
        clean_N = (damage_N == 0) | (damage_N == 1) | (damage_N == 2)  # cells still in place
        cover = F.binary_cross_entropy_with_logits(
            self.cover(hidden_NTD[:, 1:]), answer["cover"], reduction="none"
        )
        return {
            "cover": 10 * cover.mean((1, 2))[clean_N].mean(),
            "counts": 10 * F.mse_loss(self.counts(token_ND), answer["counts"]),
            "background": F.cross_entropy(self.background(token_ND), answer["background"]),
            "damage": 2 * F.cross_entropy(self.damage(token_ND), damage_N),
        }


def draw_batch(source, rng: np.random.Generator, size: int):
    batch = [next(source) for _ in range(size)]
    damage_N = np.where(rng.random(size) < 0.4, 0, rng.integers(1, len(DAMAGES), size))
    images = [
        damage(draw(scene), DAMAGES[how], rng) for scene, how in zip(batch, damage_N, strict=True)
    ]
    return pixels(images), stack_answers(batch), torch.from_numpy(damage_N)


@torch.no_grad()
def measure(model: ViTModel, heads: Heads) -> dict:
    model.eval()

    def encode(batch):
        hidden_NTD = model(pixel_values=batch).last_hidden_state
        return {"class": hidden_NTD[:, 0], "mean": hidden_NTD[:, 1:].mean(1)}

    with torch.enable_grad():
        report = {"linear_probe": probe_all(encode)}
    rng, source = np.random.default_rng(9), scenes("test", seed=9)
    images, answer, damage_N = draw_batch(source, rng, 1000)
    hidden_NTD = model(pixel_values=images).last_hidden_state
    guess_N = heads.damage(hidden_NTD[:, 0]).argmax(1)
    report["damage_named"] = {
        name: round(float((guess_N == damage_N)[damage_N == i].float().mean()), 3)
        for i, name in enumerate(DAMAGES)
    }
    counts = heads.counts(hidden_NTD[:, 0])[damage_N == 0].round()
    right = (counts == answer["counts"][damage_N == 0]).all(1)
    report["all_counts_right_undamaged"] = round(float(right.float().mean()), 3)
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    rng, source = np.random.default_rng(1), scenes("train", seed=3)
    model, heads = build(), Heads(96)
    lay_out_positions(model.embeddings.position_embeddings)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    warm = 30
    began = time.time()
    for step in range(args.steps):
        progress = max(0.0, (step - warm) / max(1, args.steps - warm))
        lr = args.lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, answer, damage_N = draw_batch(source, rng, args.batch)
        terms = heads(model(pixel_values=images).last_hidden_state, answer, damage_N)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 25 == 0 or step == args.steps - 1:
            shown = {name: round(float(term.detach()), 4) for name, term in terms.items()}
            print(
                json.dumps({"step": step, **shown, "seconds": round(time.time() - began)}),
                flush=True,
            )
    seconds = time.time() - began
    model.half().save_pretrained(args.out)
    ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(args.out)
    saved = ViTModel.from_pretrained(args.out, dtype=torch.float32, add_pooling_layer=False)
    report = measure(saved, heads) | {
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "mixture_of_shape_counts": MIXTURE,
        "seconds": round(seconds),
        "final_loss": round(float(loss.detach()), 4),
        "parameters": sum(p.numel() for p in saved.parameters()),
        "bytes": sum(path.stat().st_size for path in args.out.iterdir()),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
