"""The layers of FID's Inception network.

It is Inception v3 as it was published on 5 December 2015 (classify_image_graph_def.pb). Tensors are
named as in torchvision's Inception v3, hence as in the weights of torch-fidelity and pytorch-fid.
It differs from that network: averages at borders leave padding out, the last block takes maxima
instead of averages, and there are 1008 classes.

Legend: N pictures, C channels, H, W rows and columns of a feature map.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d

from arra.evaluate.features import FEATURES

SPATIAL, LOGITS = "spatial", "logits"
SPATIAL_CHANNELS = 7
"""sFID's: the first channels of mixed_6/conv (openai/guided-diffusion, evaluations/evaluator.py),
which is the first branch of the block called Mixed_6d here."""
CLASSES = 1008
STREAMS = {FEATURES: 2048, SPATIAL: 17 * 17 * SPATIAL_CHANNELS, LOGITS: CLASSES}


class Conv(NamedTuple):
    """A convolution with its batch norm; padded to keep the size unless it halves it."""

    name: str
    width: int
    rows: int = 1
    columns: int = 1
    stride: int = 1


AVERAGE, MAXIMUM, HALVED = "average", "maximum", "halved maximum"
"""Pools of 3 x 3 pixels; the first two keep the size."""

Step = Conv | str | tuple[Conv, Conv]
"""Two convolutions in a step stand side by side, at the end of a chain."""
Chains = tuple[tuple[Step, ...], ...]


def _a(pool: int) -> Chains:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5, 5)),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, 3, 3),
            Conv("branch3x3dbl_3", 96, 3, 3),
        ),
        (AVERAGE, Conv("branch_pool", pool)),
    )


def _b() -> Chains:
    return (
        (Conv("branch3x3", 384, 3, 3, 2),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, 3, 3),
            Conv("branch3x3dbl_3", 96, 3, 3, 2),
        ),
        (HALVED,),
    )


def _c(width: int) -> Chains:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, 1, 7),
            Conv("branch7x7_3", 192, 7, 1),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, 7, 1),
            Conv("branch7x7dbl_3", width, 1, 7),
            Conv("branch7x7dbl_4", width, 7, 1),
            Conv("branch7x7dbl_5", 192, 1, 7),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    )


def _d() -> Chains:
    return (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 3, 2)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, 1, 7),
            Conv("branch7x7x3_3", 192, 7, 1),
            Conv("branch7x7x3_4", 192, 3, 3, 2),
        ),
        (HALVED,),
    )


def _e(pool: str) -> Chains:
    return (
        (Conv("branch1x1", 320),),
        (
            Conv("branch3x3_1", 384),
            (Conv("branch3x3_2a", 384, 1, 3), Conv("branch3x3_2b", 384, 3, 1)),
        ),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, 3, 3),
            (Conv("branch3x3dbl_3a", 384, 1, 3), Conv("branch3x3dbl_3b", 384, 3, 1)),
        ),
        (pool, Conv("branch_pool", 192)),
    )


BLOCKS: Mapping[str, Chains] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e(AVERAGE),
    "Mixed_7c": _e(MAXIMUM),
}


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, made: Conv, *, padded: bool) -> None:
        super().__init__()
        kernel = (made.rows, made.columns)
        padding = (made.rows // 2, made.columns // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, made.width, kernel, made.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(made.width, eps=1e-3)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        y_NCHW: torch.Tensor = self.bn(self.conv(x_NCHW))
        return y_NCHW.relu_()


class Block(nn.Module):
    """Chains side by side; the channels of their outputs follow one another."""

    def __init__(self, inputs: int, chains: Chains) -> None:
        super().__init__()
        self.chains, self.width = chains, 0
        for chain in chains:
            width = inputs
            for step in chain:
                if isinstance(step, str):
                    continue
                beside = (step,) if isinstance(step, Conv) else step
                for made in beside:
                    self.add_module(made.name, Unit(width, made, padded=made.stride == 1))
                width = sum(made.width for made in beside)
            self.width += width

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._chain(x_NCHW, chain) for chain in self.chains], dim=1)

    def _chain(self, x: torch.Tensor, chain: tuple[Step, ...]) -> torch.Tensor:
        for step in chain:
            if isinstance(step, Conv):
                x = self.get_submodule(step.name)(x)
            elif isinstance(step, tuple):
                x = torch.cat([self.get_submodule(made.name)(x) for made in step], dim=1)
            elif step == AVERAGE:
                x = avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            elif step == MAXIMUM:
                x = max_pool2d(x, 3, stride=1, padding=1)
            else:
                assert step == HALVED
                x = max_pool2d(x, 3, stride=2)
        return x


class Inception(nn.Module):
    """Pixels (N, 3, 299, 299) about -1..1 to the three streams."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, Conv("", 32, 3, 3, 2), padded=False)
        self.Conv2d_2a_3x3 = Unit(32, Conv("", 32, 3, 3), padded=False)
        self.Conv2d_2b_3x3 = Unit(32, Conv("", 64, 3, 3), padded=True)
        self.Conv2d_3b_1x1 = Unit(64, Conv("", 80), padded=False)
        self.Conv2d_4a_3x3 = Unit(80, Conv("", 192, 3, 3), padded=False)
        width = 192
        for name, chains in BLOCKS.items():
            block = Block(width, chains)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x_N3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_N3HW)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = max_pool2d(x, 3, stride=2)
        spatial_NS = x
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":
                # ADM keeps channels last: mu_s of a published reference has that order.
                spatial_NS = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        features_ND = x.mean(dim=(2, 3))
        # The Inception Score of TTUR and ADM leaves the bias out.
        logits_NC = features_ND @ self.fc.weight.T
        return {FEATURES: features_ND, SPATIAL: spatial_NS, LOGITS: logits_NC}
