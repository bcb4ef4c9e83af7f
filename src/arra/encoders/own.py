"""A user's own encoder: `module:function`, a Python function that gives a model and its pixels.

The function takes nothing and gives two things: a torch.nn.Module that maps pixels (N, 3, H, W) to
features (N, D), and a function that maps one RGB PIL image to its pixels (3, H, W). Naming such an
encoder runs its module, as `import` does.

Legend: N images, D feature width, H and W pixels the encoder sees.
"""

import hashlib
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from arra.encoders.preprocessing import Pixels

POOLING = "own"
"""What such an encoder's pooling is called: the function decides it."""

_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_CLOSE = 1e-3
"""How far a feature may move, relative to the largest, when other images share its pass."""


@dataclass(frozen=True)
class OwnTower:
    """What a function gave, checked.

    Attributes:
        source: sha256 of the module's file; part of the fingerprint, as the pixels' code is in it.
    """

    model: nn.Module
    pixels: Pixels
    dim: int
    source: str


def is_own(spec: str) -> bool:
    """Whether a spec has the form `module:function` and names no folder."""
    bundled = spec.startswith("builtin:")
    return not bundled and _SPEC.fullmatch(spec) is not None and not Path(spec).is_dir()


def open_own(spec: str) -> OwnTower:
    """Imports the module, calls the function, and tries the encoder on two images.

    Raises:
        ValueError: no such module or function, or what it gives is no encoder; says which.
    """
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"encoder {spec}: Python finds no module {error.name!r}; install it, or put its folder "
            f"on PYTHONPATH (PYTHONPATH=. for the working folder)"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"encoder {spec}: {module.__file__} has no function {name!r}")
    given = function()
    if (
        not isinstance(given, tuple)
        or len(given) != 2
        or not isinstance(given[0], nn.Module)
        or not callable(given[1])
    ):
        raise ValueError(
            f"encoder {spec}: the function must give (torch.nn.Module, function of one PIL image), "
            f"not {_described(given)}"
        )
    model, pixels_of = given
    model.eval().requires_grad_(False)

    def pixels(images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([pixels_of(image) for image in images]).to(torch.float32)

    assert module.__file__ is not None
    source = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    return OwnTower(model, pixels, _tried(spec, model, pixels), source)


@torch.no_grad()
def _tried(spec: str, model: nn.Module, pixels: Pixels) -> int:
    """D, of an encoder that gives one finite vector an image, whatever images lie beside it."""
    tall, wide = Image.new("RGB", (40, 64), "navy"), Image.new("RGB", (64, 40), "orange")
    pixels_NCHW = pixels([tall, wide])
    features_ND = model(pixels_NCHW)
    if not isinstance(features_ND, Tensor) or features_ND.ndim != 2 or len(features_ND) != 2:
        raise ValueError(
            f"encoder {spec}: of pixels {tuple(pixels_NCHW.shape)} its model must give features "
            f"(2, D), not {_described(features_ND)}"
        )
    if not features_ND.is_floating_point() or not features_ND.isfinite().all():
        raise ValueError(f"encoder {spec}: its features are not all finite floating-point values")
    alone_D = model(pixels([wide]))[0]
    limit = _CLOSE * float(features_ND.abs().max())
    if float((alone_D - features_ND[1]).abs().max()) > limit:
        raise ValueError(
            f"encoder {spec}: the features of an image change with the images beside it, or from "
            f"call to call; they must depend on that image alone"
        )
    return int(features_ND.shape[1])


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"
