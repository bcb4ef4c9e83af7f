"""Recipes for image tokenizers: functions that return a full config; each names its source.

arra tokenizer train SOURCE --out DIR [--recipe f16] [any field of the config as a flag]
arra tokenizer train SOURCE --out DIR --init PUBLISHED [...]

What the sources have and this fit has not: their perceptual loss is LPIPS (a trained VGG), here it
is any encoder (--feature-encoder, at the weight they give LPIPS; without one there is none); their
codebook has gradients, here it follows averages, so only the commitment term is theirs; their
learning rate is constant, here it falls along a cosine. They take means over the width of a code
where the commitment here is a sum, so their weight is divided by the width.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

from arra.image_tokenizers.fit_config import TokenizerConfig, architecture_of
from arra.image_tokenizers.fit_model import kind_of, published_model


def small(source: str, out: str) -> TokenizerConfig:
    """64 codes of pictures of 64 pixels, fitted on a CPU in minutes: experiments/tokenizers.

    No published model: the VQGAN family with pixels folded by 4 first, one block a level, and codes
    that start on the latents of a working autoencoder.
    """
    return TokenizerConfig(source, out)


def f16(source: str, out: str) -> TokenizerConfig:
    """LlamaGen's VQ-16: 256 codes of 16,384 for 256 pixels.

    FoundationVision/LlamaGen ce98ec4: sizes from tokenizer_image/vq_model.py (VQ_16, ModelArgs);
    batch 128, rate 1e-4, 40 epochs of ImageNet (400,000 steps), squared error 1, LPIPS 1,
    commitment 0.25, discriminator 0.5 from step 20,000, clip 1, bf16, random flips, random crops
    from 256 to 320 pixels (here from 288): vq_train.py, its defaults. Reconstruction FID 2.19 on
    ImageNet at 256 pixels (its README.md).
    """
    return TokenizerConfig(
        source,
        out,
        recipe="f16",
        size=256,
        crop_from=288,
        flip=True,
        steps=400_000,
        batch_size=128,
        codebook_size=16384,
        codebook_dim=8,
        l2_normalize=True,
        base_channels=128,
        channel_multipliers=(1, 1, 2, 2, 4),
        patch_size=1,
        res_blocks=2,
        attention=True,
        attention_levels=(4,),
        z_channels=256,
        norm="group",
        norm_groups=32,
        lr=1e-4,
        warmup=0.0,
        weight_decay=0.0,
        l1=0.0,
        l2=1.0,
        commitment=0.25 / 8,
        feature_weight=1.0,
        gan_weight=0.5,
        gan_from=0.05,
        gan_lr=1e-4,
        ema_decay=0.9999,
        quantize_from=0.01,
        dtype="bfloat16",
        memory_gb=16.0,
        checkpoint_every=5000,
        log_every=100,
    )


def f8(source: str, out: str) -> TokenizerConfig:
    """LlamaGen's VQ-8: 1,024 codes of 16,384 for 256 pixels.

    The same training; VQ_8 in FoundationVision/LlamaGen ce98ec4, tokenizer_image/vq_model.py: one
    level fewer. Reconstruction FID 0.59 (arXiv 2406.06525, table 2).
    """
    return dataclasses.replace(
        f16(source, out),
        recipe="f8",
        channel_multipliers=(1, 2, 2, 4),
        attention_levels=(3,),
    )


def f4(source: str, out: str) -> TokenizerConfig:
    """Latent diffusion's VQ-f4: 4,096 codes of 8,192 for 256 pixels.

    CompVis/latent-diffusion a506df5, models/first_stage_models/vq-f4/config.yaml: codes of 3
    values, not normalised, attention at the bottom only, discriminator 0.75 from the start, batch 8
    a device, rate 4.5e-6 an image of the batch. Absolute error 1, LPIPS 1, the commitment's weight
    1 (the quantiser's `beta` is on the codebook's term): CompVis/taming-transformers 3ba01b2,
    modules/losses/vqperceptual.py and modules/vqvae/quantize.py. --steps is a start, not theirs.
    """
    return dataclasses.replace(
        f16(source, out),
        recipe="f4",
        crop_from=None,
        flip=False,
        steps=200_000,
        batch_size=8,
        codebook_size=8192,
        codebook_dim=3,
        l2_normalize=False,
        channel_multipliers=(1, 2, 4),
        attention_levels=(),
        z_channels=3,
        lr=8 * 4.5e-6,
        l1=1.0,
        l2=0.0,
        commitment=1.0 / 3,
        gan_weight=0.75,
        gan_from=0.0,
        gan_lr=8 * 4.5e-6,
    )


RECIPES: dict[str, Callable[[str, str], TokenizerConfig]] = {
    "small": small,
    "f4": f4,
    "f8": f8,
    "f16": f16,
}
"""Name -> function of (source, folder of the finished tokenizer)."""


def further(init: str, config: TokenizerConfig) -> TokenizerConfig:
    """`config` for fitting the tokenizer `init` further: its architecture and its image size.

    It is quantised from the first step, at a rate of 1e-4 at most (LlamaGen's fine-tuning keeps its
    rate of 1e-4: vq_train.py, --finetune).

    Raises:
        ValueError: there is no such tokenizer, or it is of another kind.
    """
    model = published_model(init)
    return dataclasses.replace(
        config,
        init=init,
        kind=kind_of(model),
        size=model.image_size,
        crop_from=None,
        quantize_from=0.0,
        lr=min(config.lr, 1e-4),
        **architecture_of(model.config),
    )


def starting_from(arguments: Sequence[str]) -> TokenizerConfig:
    """What all flags of a command line start from: its --recipe, and its --init where there is one.

    Raises:
        ValueError: no such recipe or tokenizer.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--init", default=None)
    try:
        found, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if found.recipe not in RECIPES:
        raise ValueError(f"there is no recipe {found.recipe!r}; there is {', '.join(RECIPES)}")
    config = RECIPES[found.recipe]("", "")
    return config if found.init is None else further(found.init, config)
