"""The class-conditional protocols that ARRA-Base was measured with, on ImageNet at 256 pixels."""

import dataclasses

from arra.config import OptimConfig, TrainConfig
from arra.recipes.base import base

EPOCHS = 300
IMAGES, SUBSET = 1_281_167, 260_000
BATCH = 256


def imagenet(data: str, out: str) -> TrainConfig:
    """LlamaGen's 300 epochs of ImageNet at 256 pixels, aligned (--model.size B or L).

    FID / IS on 50,000 images at guidance 2.0, arXiv 2503.07334v4, table 4 and its appendix:

        111M (B)   5.464 / 193.6 -> 5.08 / 201.2
        343M (L)   4.327 / 286.6 -> 3.61 / 262.6

    LlamaGen's own table (arXiv 2406.06525) has 3.80 for L at guidance 1.75: compare both arms each
    at its own best. Target: CLIP-L's class token, lambda 1, layer 1.

    256 images a step, learning rate 1e-4, constant, 300 epochs = 1,501,200 steps (1,281,167 images,
    the last incomplete batch of an epoch dropped), bf16, AdamW (0.9, 0.95), decay 0.05, clip 1,
    dropouts 0.1, no moving average: FoundationVision/LlamaGen ce98ec4,
    autoregressive/train/train_c2i.py. The paper says batch 32 and the same rate; its plain numbers
    are LlamaGen's published ones, which are of 256, so 32 may be per device.

    Not the same here: LlamaGen takes each image from ten crops and flips at random, a dataset here
    has the views it was prepared with; and token tables do not decay.
    """
    return _protocol(data, out, "imagenet", IMAGES)


def imagenet_subset(data: str, out: str) -> TrainConfig:
    """The same on 0.26M of the images: the paper's cheap protocol.

    FID / IS at guidance 2.0, arXiv 2503.07334v4, appendix, table 6, after 100, 200 and 300 epochs:

        111M (B)   9.328 / 126.4 -> 8.710 / 133.0   8.010 / 145.4 -> 7.483 / 145.8
                   7.283 / 156.7 -> 6.653 / 159.0
        343M (L)   5.192 / 187.8 -> 4.982 / 192.1   4.419 / 202.0 -> 4.182 / 206.8
                   4.294 / 218.6 -> 3.971 / 219.1

    and for 300 epochs of all 1.28M images: 5.464 -> 5.08 (B), 4.327 -> 3.61 (L). How the subset was
    drawn is not said; --steps is 300 epochs of 260,000 images at 256 a step.
    """
    return _protocol(data, out, "imagenet-subset", SUBSET)


def _protocol(data: str, out: str, recipe: str, images: int) -> TrainConfig:
    start = base(data, out)
    return dataclasses.replace(
        start,
        recipe=recipe,
        steps=EPOCHS * (images // BATCH),
        batch_size=BATCH,
        model=dataclasses.replace(start.model, architecture="llamagen"),
        optim=OptimConfig(
            lr=1e-4, schedule="constant", warmup=0.0, weight_decay=0.05, clip=1.0, ema=0.0
        ),
    )
