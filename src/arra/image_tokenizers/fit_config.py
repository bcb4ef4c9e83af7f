"""What a fit of an image tokenizer is. The fields' docstrings are the `--help` text."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from arra.image_tokenizers.layers import VQConfig


@dataclass(frozen=True)
class TokenizerConfig:
    """Fit an image tokenizer on the images of SOURCE. The same command again resumes."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder, file, hub id or builtin:scenes; captions are not used."""
    out: str
    """Folder of the finished tokenizer (config.json, model.safetensors) and of its log."""
    recipe: str = "small"
    """small, f4, f8 or f16: the settings that all other flags start from."""
    init: str | None = None
    """Tokenizer to fit further: a folder, a hub id or a published file (see docs/tokenizers.md);
    its architecture is taken over."""
    kind: Literal["plain", "semantic"] = "plain"
    """plain: codes of the pixels; semantic: codes of a frozen encoder's features (--teacher), which
    the finished folder holds (docs/semantic-tokenizer.md)."""
    size: int = 64
    """Pixels of the side of the squares that are fitted on."""
    crop_from: int | None = None
    """Pixels of the side of the squares that are read, of which random ones of --size are cut;
    nothing is cut unless given."""
    flip: bool = False
    """Mirror every other image, left to right, at random."""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 16
    """Images per step."""
    seed: int = 0
    """Decides initial weights, order of images and revived codes."""
    split: str | None = None
    """Split to read; train, or the only one, unless given."""
    image_column: str = "image"
    """Column that holds the images."""
    text_column: str = "text"
    """Column that holds the captions; a row without one is left out, as in prepare."""
    limit: int | None = None
    """Read at most this many rows."""
    codebook_size: int = 512
    """Codes."""
    train_codes: bool = True
    """Let the codes follow the latents; off: those of --init stay as they are."""
    codebook_dim: int = 8
    """Width of a code's vector."""
    l2_normalize: bool = True
    """Compare codes as unit vectors."""
    base_channels: int = 64
    """Channels of a level with multiplier 1."""
    channel_multipliers: tuple[int, ...] = (1, 1)
    """Multiplier per level; one code covers patch-size * 2^(levels - 1) pixels a side."""
    patch_size: int = 4
    """Pixels a side that are folded into channels first: larger is faster, 1 the classic VQGAN."""
    res_blocks: int = 1
    """Residual blocks per encoder level; a decoder level has one more."""
    attention: bool = False
    """Self-attention at the bottom of encoder and decoder."""
    attention_levels: tuple[int, ...] = ()
    """Levels, from 0, with self-attention behind each residual block."""
    z_channels: int | None = None
    """Channels between convolutions and codes; those of the last level unless given."""
    norm: Literal["group", "pixel"] = "group"
    """group: the classic; pixel: codes depend on nothing remote."""
    norm_groups: int = 16
    """Groups of a group norm."""
    encoder_kernel: Literal[1, 3] = 3
    """Side of the encoder's residual convolutions; 1 with norm pixel: codes depend on little more
    than their own cell, so plain areas have always the same codes."""
    lr: float = 2e-3
    """Peak learning rate of AdamW; falls to 0 along a cosine."""
    warmup: float = 0.02
    """Fraction of the steps over which the learning rate rises."""
    weight_decay: float = 1e-4
    """Of AdamW, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm."""
    l1: float = 1.0
    """Weight of the mean absolute error (pixels from -1 to 1)."""
    l2: float = 1.0
    """Weight of the mean squared error (pixels from -1 to 1)."""
    commitment: float = 0.25
    """Weight of the squared distance between a latent and its code."""
    feature_encoder: str | None = None
    """Encoder (folder, hub id or builtin:NAME) whose features are compared as well."""
    feature_weight: float = 0.1
    """Weight of the feature loss, if there is an encoder."""
    teacher: str | None = None
    """Encoder E that teaches the codes, or E@3,6,12 for blocks of it, from 1 (semantic: those that
    become codes, four spread over its depth unless named). The decoder's first features predict
    the patch features of the last."""
    teacher_weight: float = 0.5
    """Weight of 1 - cos between them, if there is a teacher: 0.5 in GigaTok, 1 in VFMTok."""
    gan_weight: float = 0.0
    """Weight of the patch discriminator, relative to the pull to the pixels; 0 = there is none."""
    gan_from: float = 0.5
    """Fraction of the steps before which there is no discriminator."""
    gan_lr: float = 1e-4
    """Peak learning rate of the discriminator; falls as --lr does."""
    gan_layers: int = 3
    """Its convolutions with stride 2: it judges patches of 70 pixels with 3, of 34 with 2."""
    gan_channels: int = 64
    """Its channels behind the first of them."""
    ema_decay: float = 0.0
    """Decay per step of the average of all weights that becomes the finished tokenizer; 0 = none,
    the last weights are."""
    quantize_from: float = 0.1
    """Fraction of the steps before which latents are decoded as they are: codes that start on the
    latents of a working autoencoder do not collapse."""
    code_decay: float = 0.95
    """Decay per step of the averages that the codes follow."""
    revive_every: int = 10
    """Steps between checks for dead codes, over the first `revive-until` of the run; 0 = never."""
    revive_share: float = 0.05
    """A code used less than this share of an equal share is dead, and moved."""
    revive_until: float = 0.7
    """Fraction of the run after which codes are left alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 = autocast (weights stay float32)."""
    save_dtype: Literal["float32", "float16"] = "float32"
    """Stored weights; float16 halves the folder."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, …"""
    memory_gb: float = 2.0
    """GiB of decoded images kept; a larger source is shuffled within windows of this size."""
    log_every: int = 50
    """Steps between lines of log.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    snapshot_every: int = 0
    """Steps between copies of the tokenizer that are kept under snapshots/, to be measured; 0 =
    none."""

    def __post_init__(self) -> None:
        for name in ("size", "steps", "batch_size", "log_every", "checkpoint_every", "gan_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        factor = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
        if self.size % factor:
            raise ValueError(
                f"--size {self.size} is not a multiple of {factor}, the side of one code's cell: "
                f"change --size, --patch-size or the number of --channel-multipliers"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema-decay is {self.ema_decay}, but must be from 0 to below 1")
        if self.crop_from is not None and self.crop_from < self.size:
            raise ValueError(f"--crop-from {self.crop_from} is less than --size {self.size}")
        if not self.train_codes and self.init is None:
            raise ValueError("--no-train-codes keeps the codes of a tokenizer: name it by --init")
        if self.kind == "semantic" and (self.teacher is None) == (self.init is None):
            raise ValueError(
                "--kind semantic makes codes of an encoder's features: name it by --teacher, or "
                "--init a semantic tokenizer, which has its own"
            )
        smallest = 3 * 2**self.gan_layers
        if self.gan_weight > 0 and self.size < smallest:
            raise ValueError(
                f"--gan-layers {self.gan_layers} needs images of {smallest} pixels, not "
                f"{self.size}: take fewer, or --gan-weight 0"
            )

    def model_config(self) -> VQConfig:
        """The tokenizer that this fits, where it starts from new weights."""
        widest = self.base_channels * self.channel_multipliers[-1]
        return VQConfig(
            image_size=self.size,
            base_channels=self.base_channels,
            channel_multipliers=list(self.channel_multipliers),
            res_blocks=self.res_blocks,
            attention_levels=list(self.attention_levels),
            middle_attention=self.attention,
            patch_size=self.patch_size,
            norm=self.norm,
            norm_groups=self.norm_groups,
            encoder_kernel=self.encoder_kernel,
            z_channels=widest if self.z_channels is None else self.z_channels,
            codebook_size=self.codebook_size,
            codebook_dim=self.codebook_dim,
            l2_normalize=self.l2_normalize,
        )


ARCHITECTURE = (
    *("codebook_size", "codebook_dim", "l2_normalize", "base_channels", "channel_multipliers"),
    *("patch_size", "res_blocks", "attention", "attention_levels", "z_channels", "norm"),
    *("norm_groups", "encoder_kernel"),
)
"""Fields that say how the tokenizer is built."""


def architecture_of(config: VQConfig) -> dict[str, Any]:
    """The values of `ARCHITECTURE` that a tokenizer has."""
    found = {name: getattr(config, name) for name in ARCHITECTURE if name != "attention"}
    for name in ("channel_multipliers", "attention_levels"):
        found[name] = tuple(found[name])
    return {**found, "attention": config.middle_attention}


MAY_CHANGE = {"out", "device", "memory_gb", "log_every", "checkpoint_every", "snapshot_every"}
"""Fields that may differ when a fit is resumed; any other change would make it another fit."""


def schedule(step: int, config: TokenizerConfig) -> float:
    """Share of the peak rates at optimizer step `step` (from 0): linear warm-up, a cosine to 0."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))
