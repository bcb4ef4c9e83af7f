"""torchxrayvision's DenseNet-121 of chest X-rays as an extractor: `fd@xrv`, and its 18 pathologies.

torchxrayvision itself is not used: it cannot be imported without torchvision, and reads its weights
as a pickle of a whole module, which is a program. So the network (Huang et al. 2017,
arXiv 1608.06993, one input channel) and its preprocessing are written out here, with the tensors'
published names; tests/unit/evaluate/test_xrv.py holds them to torchxrayvision 1.5.7. The file of
weights is one of tensors, which `CONVERT` makes of the published one.

Legend: N pictures, C channels, H, W rows and columns, S pixels a side of a picture, P pathologies.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from arra.evaluate.features import FEATURES
from arra.files import sha256_of
from arra.foreign import read_foreign

NAME = "xrv"
SIDE = 224
"""Pixels that the network sees."""
LOGITS = "pathologies"
PATHOLOGIES = (
    *("Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema"),
    *("Fibrosis", "Effusion", "Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass"),
    *("Hernia", "Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"),
)
"""The outputs of all of its DenseNets (mlmed/torchxrayvision, datasets.py, default_pathologies)."""
CONVERT = (
    "where torchxrayvision is installed, run: import torch, torchxrayvision as xrv; "
    "torch.save(xrv.models.DenseNet(weights='densenet121-res224-all').state_dict(), 'xrv.pt')"
)
_STEM, _GROWTH, _BOTTLENECK, _BLOCKS = 64, 32, 4, (6, 12, 24, 16)
_THRESHOLDS = "op_threshs"
"""Operating points; NaN for an output that was never trained."""


class _DenseLayer(nn.Sequential):
    def __init__(self, width: int) -> None:
        inner = _BOTTLENECK * _GROWTH
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(),
                conv1=nn.Conv2d(width, inner, 1, bias=False),
                norm2=nn.BatchNorm2d(inner),
                relu2=nn.ReLU(),
                conv2=nn.Conv2d(inner, _GROWTH, 3, padding=1, bias=False),
            )
        )

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return torch.cat([maps_NCHW, super().forward(maps_NCHW)], dim=1)


class DenseNet(nn.Module):
    """The layers; see the top of the file."""

    def __init__(self) -> None:
        super().__init__()
        width = _STEM
        layers: dict[str, nn.Module] = {
            "conv0": nn.Conv2d(1, width, 7, stride=2, padding=3, bias=False),
            "norm0": nn.BatchNorm2d(width),
            "relu0": nn.ReLU(),
            "pool0": nn.MaxPool2d(3, stride=2, padding=1),
        }
        for block, depth in enumerate(_BLOCKS, start=1):
            names = [f"denselayer{layer}" for layer in range(1, depth + 1)]
            grown = [_DenseLayer(width + layer * _GROWTH) for layer in range(depth)]
            layers[f"denseblock{block}"] = nn.Sequential(
                OrderedDict(zip(names, grown, strict=True))
            )
            width += depth * _GROWTH
            if block < len(_BLOCKS):
                halved = OrderedDict(
                    norm=nn.BatchNorm2d(width),
                    relu=nn.ReLU(),
                    conv=nn.Conv2d(width, width // 2, 1, bias=False),
                    pool=nn.AvgPool2d(2),
                )
                layers[f"transition{block}"] = nn.Sequential(halved)
                width //= 2
        layers["norm5"] = nn.BatchNorm2d(width)
        self.features = nn.Sequential(OrderedDict(layers))
        self.classifier = nn.Linear(width, len(PATHOLOGIES))

    def forward(self, pixels_N1HW: Tensor) -> dict[str, Tensor]:
        """`features` (N, 1024), after the last ReLU, and the `pathologies`' logits (N, P)."""
        features_ND = self.features(pixels_N1HW).relu().mean(dim=(2, 3))
        return {FEATURES: features_ND, LOGITS: self.classifier(features_ND)}


class XrvFeatures:
    """The network as an extractor.

    Attributes:
        classes: names of the outputs that were trained, with their numbers; empty where the file
            does not say.

    Raises:
        ValueError: no such file, or one that holds something else.
    """

    name = NAME
    streams: Mapping[str, int] = {FEATURES: 1024, LOGITS: len(PATHOLOGIES)}
    doubts: Sequence[str] = ()

    def __init__(self, file: Path, device: str) -> None:
        network, thresholds_P = _loaded(file)
        self._network, self._device = network.to(device), device
        self._last: tuple[list[Image.Image], dict[str, np.ndarray]] = [], {}
        trained_P = torch.zeros(0) if thresholds_P is None else ~thresholds_P.isnan()
        self.classes = {PATHOLOGIES[p]: p for p in trained_P.nonzero().flatten().tolist()}
        self.described: dict[str, Any] = {
            "name": NAME,
            "spec": f"{NAME}:{file}",
            "family": "torchxrayvision DenseNet-121",
            "dim": self.streams[FEATURES],
            "dtype": "float32",
            "fingerprint": sha256_of(file),
            "resize": "grey, skimage's antialiased bilinear to 224, -1024 to 1024",
            "classes": list(self.classes),
        }

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Float32 `features` (N, 1024) and logits `pathologies` (N, P) of RGB images."""
        seen, streams = self._last
        # A distance and the AUROC ask for the same pictures one after the other.
        if len(seen) == len(images) and all(a is b for a, b in zip(seen, images, strict=True)):
            return streams
        pixels_N1HW = torch.from_numpy(np.stack([pixels(image) for image in images])[:, None])
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
        ):
            found = self._network(pixels_N1HW.to(self._device))
        self._last = list(images), {name: rows.cpu().numpy() for name, rows in found.items()}
        return self._last[1]


def is_xrv(spec: str) -> bool:
    """Whether a spec of `--extractor` means this network: `xrv:FILE`."""
    return spec == NAME or spec.startswith(f"{NAME}:")


def open_xrv(spec: str, device: str) -> XrvFeatures:
    """The network of a spec; see XrvFeatures."""
    file = spec.removeprefix(NAME).removeprefix(":")
    if not file:
        raise ValueError(f"--extractor {NAME} needs its file of weights, {NAME}:FILE; {CONVERT}")
    return XrvFeatures(Path(file).expanduser(), device)


# ---- preprocessing -------------------------------------------------------------------------------


def pixels(image: Image.Image) -> np.ndarray:
    """What the network sees of an RGB image (224, 224) float32: the mean of its channels, scaled to
    -1024..1024, the middle square of it, resized as XRayResizer does."""
    grey_HW = np.asarray(image, dtype=np.float32).mean(axis=2)
    grey_HW = (2 * (grey_HW / np.float32(255)) - 1) * 1024
    height, width = grey_HW.shape
    side = min(height, width)
    top, left = height // 2 - side // 2, width // 2 - side // 2
    square_SS = grey_HW[top : top + side, left : left + side].astype(np.float64)
    if side == SIDE:
        return square_SS.astype(np.float32)
    resize = _resize(side)
    resized = resize @ square_SS @ resize.T
    return np.clip(resized, square_SS.min(), square_SS.max()).astype(np.float32)


@cache
def _resize(side: int) -> np.ndarray:
    """(224, S): skimage.transform.resize along one axis, with zeros outside as XRayResizer asks.

    A Gaussian of sigma (S / 224 - 1) / 2, cut at four sigmas, then linear interpolation between
    centres of pixels.
    """
    factor = side / SIDE
    sigma = max(0.0, (factor - 1) / 2)
    apart_SS = np.subtract.outer(np.arange(side), np.arange(side))
    blur_SS = np.eye(side)
    if sigma > 0:
        reach = int(4 * sigma + 0.5)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        kernel /= kernel.sum()
        at = np.clip(apart_SS + reach, 0, 2 * reach)
        blur_SS = np.where(np.abs(apart_SS) <= reach, kernel[at], 0.0)
    centres = (np.arange(SIDE) + 0.5) * factor - 0.5
    weights = 1 - np.abs(np.subtract.outer(centres, np.arange(side)))
    return np.clip(weights, 0, None) @ blur_SS


# ---- weights -------------------------------------------------------------------------------------


def _loaded(file: Path) -> tuple[DenseNet, Tensor | None]:
    """The network, and the operating points (P,) where the file has them."""
    try:
        tensors = dict(read_foreign(file).tensors)
    except ValueError as error:
        raise ValueError(
            f"{error}. The published file is a whole pickled module; {CONVERT}"
        ) from None
    thresholds_P = tensors.pop(_THRESHOLDS, None)
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in DenseNet().state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{file} does not hold torchxrayvision's DenseNet-121 ({len(wrong)} tensors differ, "
            f"such as {wrong[0]}); {CONVERT}"
        )
    network = DenseNet()
    network.load_state_dict(tensors)
    return network.float().eval().requires_grad_(False), thresholds_P
