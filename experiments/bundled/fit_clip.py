"""Fit `builtin:scenes-clip`, the teacher: a small CLIP (Radford et al. 2021, arXiv 2103.00020).

    OMP_NUM_THREADS=1 python experiments/bundled/fit_clip.py --out FOLDER

Image and text towers are transformers' CLIPModel, trained contrastively on scenes drawn on the fly
(train split, so no held-out combination is ever shown). Captions that read the same are positives
of each other; every batch holds hard negatives (`twin`). The contrast alone learns colour, size and
background within ten minutes of one core, but neither kind nor place (LOG.md), so what the drawing
knows is asked of the image tower as well, by linear heads that are thrown away: of each patch what
covers it, of the class token which shapes there are and where. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from scene_batches import (
    MIXTURE,
    lay_out_positions,
    probe_all,
    said,
    scenes,
    stack_answers,
    to_batch,
    twin,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from arra.data.scenes.language import caption

LENGTH = 40  # tokens of a caption at most; the longest of 20,000 has 37


def fit_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with CLIP's marks around the text (any text can be written with it)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[start, end],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        model_max_length=LENGTH,
    )


def build(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPModel(
        CLIPConfig(
            vision_config={
                "image_size": 64,
                "patch_size": 8,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            },
            text_config={
                "vocab_size": len(tokenizer),
                "max_position_embeddings": LENGTH,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                **marks,
            },
            projection_dim=64,
        )
    )


def contrastive(image_ND: torch.Tensor, text_ND: torch.Tensor, scale, same_NN: torch.Tensor):
    """Symmetric InfoNCE where all rows with the same caption are positives of each other."""
    logits_NN = scale * image_ND @ text_ND.T
    target_NN = same_NN / same_NN.sum(1, keepdim=True)
    return (F.cross_entropy(logits_NN, target_NN) + F.cross_entropy(logits_NN.T, target_NN)) / 2


class Heads(torch.nn.Module):
    """Linear questions to the image tower about what was drawn."""

    def __init__(self, width: int, answer: dict):
        super().__init__()
        self.cover = torch.nn.Linear(width, answer["cover"].shape[-1])
        self.counts = torch.nn.Linear(width, answer["counts"].shape[-1])
        self.place = torch.nn.Linear(width, answer["place"][0].numel())

    def forward(self, vision, answer: dict) -> dict[str, torch.Tensor]:
        class_ND, patch_NTD = vision.pooler_output, vision.last_hidden_state[:, 1:]
        seen_NC1 = answer["seen"][..., None]
        place_NC2 = self.place(class_ND).view_as(answer["place"])
        cover = F.binary_cross_entropy_with_logits(self.cover(patch_NTD), answer["cover"])
        off_NC2 = (place_NC2 - answer["place"]).square() * seen_NC1
        return {
            "cover": 10 * cover,
            "counts": 10 * F.mse_loss(self.counts(class_ND), answer["counts"]),
            "place": 3 * off_NC2.sum() / seen_NC1.sum(),
        }


def embed(model: CLIPModel, tokenizer, pixels, texts):
    """Normalised embeddings of images and texts, and the image tower's own output."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    vision = model.vision_model(pixel_values=pixels)
    text = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    image_ND = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    text_ND = F.normalize(model.text_projection(text.pooler_output), dim=-1)
    return image_ND, text_ND, vision


def draw_batch(source, rng: random.Random, size: int):
    batch = []
    while len(batch) < size:
        scene = next(source)
        if rng.random() < 0.5:
            scene = said(scene)
        batch.append(scene)
        other = twin(scene)
        if other is not None:
            batch.append(other)
    return *to_batch(batch[:size]), stack_answers(batch[:size])


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer, split: str, count: int = 256, rounds: int = 4) -> float:
    """Part of the images whose best caption among `count` is (worded like) their own."""
    hits = 0
    source = scenes(split, seed=5)
    for _ in range(rounds):
        pixels, texts = to_batch([said(next(source)) for _ in range(count)])
        image_ND, text_ND, _ = embed(model, tokenizer, pixels, texts)
        best_N = (image_ND @ text_ND.T).argmax(1).tolist()
        hits += sum(texts[best] == text for best, text in zip(best_N, texts, strict=True))
    return hits / (count * rounds)


def measure(model: CLIPModel, tokenizer) -> dict:
    model.eval()

    def encode(pixels):
        out = model.vision_model(pixel_values=pixels)
        class_ND = out.pooler_output  # after the post layer norm, as arra.encoders takes it
        return {"class": class_ND, "projected": model.visual_projection(class_ND)}

    report = {
        f"retrieval_256_{split}": round(retrieval(model, tokenizer, split), 4)
        for split in ("test", "compositional")
    }
    report["linear_probe"] = probe_all(encode)
    model.train()
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, source = random.Random(0), scenes("train", seed=1)
    words = scenes("train", seed=2)
    tokenizer = fit_tokenizer([caption(next(words)) for _ in range(5000)])
    model = build(tokenizer)
    lay_out_positions(model.vision_model.embeddings.position_embedding.weight)
    heads = Heads(model.config.vision_config.hidden_size, stack_answers([next(words)]))
    parameters = [*model.parameters(), *heads.parameters()]
    decay = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
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
        pixels, texts, answer = draw_batch(source, rng, args.batch)
        same_NN = torch.tensor([[float(a == b) for b in texts] for a in texts])
        image_ND, text_ND, vision = embed(model, tokenizer, pixels, texts)
        terms = heads(vision, answer)
        terms["contrast"] = contrastive(image_ND, text_ND, model.logit_scale.exp(), same_NN)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 25 == 0 or step == args.steps - 1:
            shown = {name: round(float(term.detach()), 4) for name, term in terms.items()}
            shown |= {"step": step, "seconds": round(time.time() - began)}
            print(json.dumps(shown), flush=True)
    seconds = time.time() - began
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    CLIPImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(args.out)
    saved = CLIPModel.from_pretrained(args.out, dtype=torch.float32)
    report = measure(saved, tokenizer)
    report |= {
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "mixture_of_shape_counts": MIXTURE,
        "seconds": round(seconds),
        "final_losses": shown,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "bytes": sum(path.stat().st_size for path in args.out.iterdir()),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
