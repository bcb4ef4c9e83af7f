"""What the VQGAN family is built of: its configuration, encoder and decoder.

Legend: N images, C channels, H and W pixels or cells.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


class VQConfig(PreTrainedConfig):
    """Sizes of a VQ image tokenizer.

    Level i works at 1 / (patch_size * 2**i) of the image's side; the last level is the code grid.

    Attributes:
        image_size: pixels of the squares it was fitted on. Others work if `factor` divides them.
        base_channels: channels of a level with multiplier 1.
        channel_multipliers: one per level.
        res_blocks: residual blocks per encoder level.
        decoder_res_blocks: residual blocks per decoder level; None = res_blocks + 1 (the family's).
        attention_levels: levels with self-attention behind each residual block.
        middle_attention: self-attention between the two residual blocks at the bottom.
        patch_size: pixels folded into channels before the first convolution and unfolded after
            the last one (1 in the family; 2 quarters the cost of the finest level).
        norm: "group" (the family's) or "pixel": over the channels of each position alone, so that
            a code says nothing about remote parts of the image.
        norm_groups: groups of a group norm; a width that they do not divide takes fewer.
        encoder_kernel: side of the encoder's residual convolutions: 3 (the family's), or 1, which
            leaves them blind to their surroundings. With norm "pixel" a code then depends on little
            more than its own cell and plain areas have always the same codes, which a small painter
            learns sooner.
        z_channels: channels between the convolutions and `quant_conv`.
        codebook_size: K.
        codebook_dim: D.
        l2_normalize: codes and latents are compared, and decoded, as unit vectors.
        dropout: inside residual blocks, in training only.

    Published members: multipliers (1, 1, 2, 2, 4), base 128, 2 residual blocks, z 256; with
    attention_levels (4,), K 16384, D 8, l2_normalize (LlamaGen's ds16; ds8 has (1, 2, 2, 4) and
    levels (3,)); with no attention levels, K 8192, D 256, not normalised (Chameleon's).
    """

    model_type = "arra_vq"

    image_size: int = 256
    base_channels: int = 128
    channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    decoder_res_blocks: int | None = None
    attention_levels: Sequence[int] = ()
    middle_attention: bool = True
    patch_size: int = 1
    norm: str = "group"
    norm_groups: int = 32
    encoder_kernel: int = 3
    z_channels: int = 256
    codebook_size: int = 8192
    codebook_dim: int = 256
    l2_normalize: bool = False
    dropout: float = 0.0

    @classmethod
    def sizes(cls) -> list[str]:
        """Names of the attributes above, those of a subclass included."""
        kinds = [kind for kind in cls.__mro__ if issubclass(kind, VQConfig)]
        return [name for kind in reversed(kinds) for name in kind.__annotations__]

    def levels(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]

    def factor(self) -> int:
        """Pixels per side of one code's cell."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)


class SemanticVQConfig(VQConfig):
    """Sizes of a semantic tokenizer. `levels` and what follows from them describe the decoder.

    Attributes:
        encoder_layers: blocks of the frozen encoder that become codes, from 1, ascending; none: its
            own patch features alone.
        encoder_dim: hidden width d of the frozen encoder.
        encoder_sha256: of the encoder's files in the folder, so that others are noticed.
    """

    model_type = "arra_semantic_vq"

    encoder_layers: Sequence[int] = ()
    encoder_dim: int = 0
    encoder_sha256: str = ""


class PixelNorm(nn.Module):
    """Layer norm over the channels of each position of an (N, C, H, W) tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        normed_NHWC = F.layer_norm(x_NHWC, self.weight.shape, self.weight, self.bias, 1e-6)
        return normed_NHWC.permute(0, 3, 1, 2)


def _norm(channels: int, config: VQConfig) -> nn.Module:
    if config.norm == "pixel":
        return PixelNorm(channels)
    most = min(config.norm_groups, channels)
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, swish, convolution, twice; a 1x1 shortcut where the width changes."""

    def __init__(
        self, channels_in: int, channels_out: int, config: VQConfig, kernel: int = 3
    ) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in, config)
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
        self.norm2 = _norm(channels_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel, padding=kernel // 2)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h_NCHW = self.conv1(F.silu(self.norm1(x_NCHW)))
        h_NCHW = self.conv2(self.dropout(F.silu(self.norm2(h_NCHW))))
        return self.shortcut(x_NCHW) + h_NCHW


class Attention(nn.Module):
    """Single-head self-attention over all positions, residual."""

    def __init__(self, channels: int, config: VQConfig) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h_NCHW = self.norm(x_NCHW)
        q, k, v = (  # (N, 1 head, H W, C)
            layer(h_NCHW).flatten(2).transpose(1, 2).unsqueeze(1)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x_NCHW + self.out(mixed.squeeze(1).transpose(1, 2).reshape(x_NCHW.shape))


class Downsample(nn.Module):
    """Halves the side. One row and column of zeros is added at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_NCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one level, each followed by attention if asked, then a resize."""

    def __init__(self, widths: list[int], index: int, config: VQConfig, kernel: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(before, after, config, kernel) for before, after in itertools.pairwise(widths)
        )
        attended = index in config.attention_levels
        self.attention = nn.ModuleList(
            Attention(width, config) if attended else nn.Identity() for width in widths[1:]
        )
        self.resize: nn.Module = nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x_NCHW = attention(block(x_NCHW))
        return self.resize(x_NCHW)


def _middle(channels: int, config: VQConfig, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(channels, channels, config, kernel),
        Attention(channels, config) if config.middle_attention else nn.Identity(),
        ResBlock(channels, channels, config, kernel),
    )


class Encoder(nn.Module):
    """Pixels (N, 3, H, W) to latents (N, z, h, w)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, kernel = config.levels(), config.encoder_kernel
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, config.base_channels, 3, padding=1)
        self.levels = nn.ModuleList()
        before = config.base_channels
        for index, channels in enumerate(widths):
            level = Level([before] + [channels] * config.res_blocks, index, config, kernel)
            if index < len(widths) - 1:
                level.resize = Downsample(channels)
            self.levels.append(level)
            before = channels
        self.middle = _middle(before, config, kernel)
        self.norm_out = _norm(before, config)
        self.conv_out = nn.Conv2d(before, config.z_channels, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h_NCHW = self.conv_in(F.pixel_unshuffle(x_NCHW, self.patch_size))
        for level in self.levels:
            h_NCHW = level(h_NCHW)
        return self.conv_out(F.silu(self.norm_out(self.middle(h_NCHW))))


class Decoder(nn.Module):
    """Latents (N, z, h, w) to pixels (N, 3, H, W). `levels` starts with the coarsest."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.levels()
        blocks = config.decoder_res_blocks
        blocks = config.res_blocks + 1 if blocks is None else blocks
        before = widths[-1]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.z_channels, before, 3, padding=1)
        self.middle = _middle(before, config)
        self.levels = nn.ModuleList()
        for index, channels in reversed(list(enumerate(widths))):
            level = Level([before] + [channels] * blocks, index, config)
            if index > 0:
                level.resize = Upsample(channels)
            self.levels.append(level)
            before = channels
        self.norm_out = _norm(before, config)
        self.conv_out = nn.Conv2d(before, 3 * config.patch_size**2, 3, padding=1)

    def forward(self, z_NCHW: Tensor) -> Tensor:
        return self.paint(self.trunk(z_NCHW))

    def trunk(self, z_NCHW: Tensor) -> Tensor:
        """The part on the grid of codes, (N, C, h, w): where a teacher's features are compared."""
        return self.middle(self.conv_in(z_NCHW))

    def paint(self, h_NCHW: Tensor) -> Tensor:
        """From the trunk to pixels (N, 3, H, W)."""
        for level in self.levels:
            h_NCHW = level(h_NCHW)
        h_NCHW = self.conv_out(F.silu(self.norm_out(h_NCHW)))
        return F.pixel_shuffle(h_NCHW, self.patch_size)
