"""A frozen encoder E_F with its own preprocessing and the pooling that gives f_GF.

Pooling, with what it means in the families (which has which: families.py, docs/encoders.md):

- `class` (the default where there is one): the class token. The paper (section 3.2) takes it from
  CLIP and BioMedCLIP. In CLIP it is taken after the post layer norm, `pooler_output`; in DINO, MAE
  and ViT it is the first token after the final layer norm.
- `projected`: the image embedding in the space shared with text: CLIP's and BioMedCLIP's class
  token after the projection, SigLIP's attention-pooled vector. The released code of the paper
  aligns to this one, although the text names the class token.
- `mean` (the default where there is no class token): the mean over patch tokens of
  `last_hidden_state` (as the paper does for encoders without a class token).
- `both`: `class` and `mean`, concatenated.
- `patch`: the patch tokens themselves, h*w a picture in raster order. The encoder then sees the
  whole picture, squeezed to its input size: patch and code of one place belong together.

Legend: N images, D feature width, H and W pixels the encoder sees, P patches.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from arra.encoders import open_clip, own
from arra.encoders.families import SHAPING_KEYS, Family, Read, Tokens, family_of
from arra.encoders.preprocessing import Pixels, open_preprocessing, whole_pictures
from arra.resolve import resolve_folder

POOLINGS = ("class", "projected", "mean", "both", "patch")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_SUFFIX = re.compile(rf"({'|'.join(POOLINGS)})(?::([1-9]\d*))?")


@dataclass(frozen=True)
class _Opened:
    """An encoder before it has a name and a device.

    Attributes:
        family: name of the architecture.
        pooling: as in Encoder.
        model: with every weight loaded.
        pixels: the preprocessing.
        features: (model, pixels (N, 3, H, W)) -> (N, D) or (N, P, D).
        dim: D.
        described: all that changes features without being a weight.
    """

    family: str
    pooling: str
    model: nn.Module
    pixels: Pixels
    features: Callable[[Any, Tensor], Tensor]
    dim: int
    described: dict[str, Any]


class Encoder:
    """Maps a list of RGB images to features (N, D) float32, on the encoder's device.

    With the pooling `patch` features are (N, P, D), P = h*w patches in raster order.

    Attributes:
        name: the last part of what was asked for, such as `clip-vit-large-patch14`.
        spec: what was asked for, without the pooling.
        pooling: one of POOLINGS, with `:PIXELS` where an input size was asked for; `own` for a
            user's own encoder. `load_encoder(spec, pooling)` gives the same encoder again.
        dim: D.
        family: name of the architecture.
        dtype: float32 or bfloat16, what it computes in.
        fingerprint: sha256 over weights, shape-free config values, preprocessing, pooling, family,
            and the dtype where it is not float32.
        model: the frozen model, in eval mode; transformers' own, or the user's.
    """

    def __init__(self, spec: str, opened: _Opened, device: torch.device | str, dtype: str) -> None:
        self.spec, self.pooling, self.family = spec, opened.pooling, opened.family
        self.name = _short_name(spec)
        self.dim, self.dtype = opened.dim, dtype
        self.device = torch.device(device)
        self.pixels = opened.pixels
        self.fingerprint = _fingerprint(opened, dtype)
        self._features = opened.features
        opened.model.to(device=self.device, dtype=_DTYPES[dtype])
        self.model: Any = opened.model.eval().requires_grad_(False)

    @property
    def gives_grids(self) -> bool:
        """Whether features are (N, P, D), one vector a patch."""
        return self.pooling.partition(":")[0] == "patch"

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches; costs one picture's pass the first time."""
        assert self.gives_grids, "only @patch has a grid"
        pixels_NCHW = self.preprocess([Image.new("RGB", (64, 64))])
        with torch.no_grad():
            patches = self.pool(pixels_NCHW).shape[1]
        height, width = pixels_NCHW.shape[2:]
        rows = round((patches * height / width) ** 0.5)
        assert rows * (patches // rows) == patches, "patches that fill no grid"
        return rows, patches // rows

    pixels: Pixels
    """What `preprocess` gives, still in main memory; may be called from several threads."""

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (N, D) float32 of RGB images of any sizes."""
        return self.pool(self.preprocess(images))

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixels (N, 3, H, W) float32 as the encoder's own preprocessing says."""
        return self.pixels(images).to(self.device)

    def pool(self, pixels_NCHW: Tensor) -> Tensor:
        """Features (N, D) float32 of preprocessed pixels. Differentiable with respect to those."""
        return self._features(self.model, pixels_NCHW.to(_DTYPES[self.dtype])).to(torch.float32)


def load_encoder(
    spec: str | Path,
    pooling: str | None = None,
    device: torch.device | str = "cpu",
    *,
    grids: bool = False,
    dtype: str = "float32",
) -> Encoder:
    """Loads a frozen encoder.

    Args:
        spec: a folder, hub id or `builtin:NAME`, with an optional
            `@class|projected|mean|both|patch[:PIXELS]`; or `module:function` (own.py). PIXELS is
            a smaller input size, for SAM.
        pooling: the same choice as an argument; the family's default where neither is given.
        device: where it computes.
        grids: that the caller can take the features (N, P, D) of `patch`.
        dtype: what it computes in, float32 or bfloat16; features are float32 either way.

    Raises:
        FileNotFoundError: no config.json or preprocessor_config.json in the folder.
        ValueError: nothing there, an unknown architecture, a pooling or size the family does not
            have, or `patch` for a caller that takes one vector a picture.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"encoders compute in {' or '.join(_DTYPES)}, not in {dtype!r}")
    if pooling in (None, own.POOLING) and own.is_own(str(spec)):
        if dtype != "float32":
            raise ValueError(f"encoder {spec} is a function of yours and computes in float32 only")
        return Encoder(str(spec), _open_own(str(spec)), device, dtype)
    bare, suffix = split_spec(str(spec))
    if own.is_own(bare):
        raise ValueError(f"encoder {bare} pools by itself: leave out {suffix or pooling!r}")
    if pooling is not None and suffix is not None and pooling != suffix:
        raise ValueError(f"encoder {spec} says @{suffix}, but pooling {pooling!r} is asked for")
    asked = pooling or suffix
    matched = _SUFFIX.fullmatch(asked) if asked is not None else None
    if asked is not None and matched is None:
        raise ValueError(f"unknown pooling {asked!r}; there is {', '.join(POOLINGS)}")
    chosen = matched[1] if matched else None
    size = int(matched[2]) if matched and matched[2] else None
    if chosen == "patch" and not grids:
        raise ValueError(
            f"encoder {bare}@patch gives a grid of vectors a picture, but one vector is needed "
            f"here: use @class or @mean"
        )
    folder = resolve_folder(bare, "encoder")
    if open_clip.is_open_clip(folder):
        folder = resolve_folder(bare, "encoder", also=open_clip.PUBLISHED)
        return Encoder(bare, _open_clip(bare, folder, chosen, size), device, dtype)
    return Encoder(bare, _open_family(bare, folder, chosen, size), device, dtype)


def split_spec(spec: str) -> tuple[str, str | None]:
    """Splits `E@POOLING[:PIXELS]` into E and what follows the @ (None where there is no @).

    Raises:
        ValueError: something else than a pooling behind the @.
    """
    bare, at, suffix = spec.rpartition("@")
    if not at or "/" in suffix:  # an @ within a folder's path belongs to the path
        return spec, None
    if _SUFFIX.fullmatch(suffix) is None:
        raise ValueError(f"encoder {spec}: @{suffix} is no pooling; there is {', '.join(POOLINGS)}")
    return bare, suffix


# ---- kinds of encoders ---------------------------------------------------------------------------


def _open_family(spec: str, folder: Path, asked: str | None, size: int | None) -> _Opened:
    family = family_of(folder)
    pooling = _chosen(spec, family.name, family.poolings, asked)
    if size is not None and family.shrink is None:
        raise _no_size(spec, family.name, size)
    model = family.load(folder, pooling)
    whole = pooling == "patch"
    preprocessing = open_preprocessing(folder, family.processor, size, whole=whole)
    if size is not None:
        assert family.shrink is not None
        family.shrink(model, size)
    written = pooling if size is None else f"{pooling}:{size}"
    described = {
        "family": family.name,
        "pooling": written,
        "config": _shaping(model, family),
        "processor": preprocessing.described,
    }
    return _Opened(
        family.name,
        written,
        model,
        preprocessing.pixels,
        _pooled(family.read, pooling),
        family.width(model, pooling) * (2 if pooling == "both" else 1),
        described,
    )


def _open_clip(spec: str, folder: Path, asked: str | None, size: int | None) -> _Opened:
    tower = open_clip.open_tower(folder)
    if size is not None:
        raise _no_size(spec, tower.name, size)
    pooling = _chosen(spec, tower.name, open_clip.POOLINGS, asked)
    config = tower.model.config.to_dict()
    described = {
        "family": tower.name,
        "pooling": pooling,
        "config": {key: config[key] for key in SHAPING_KEYS if key in config},
        "processor": tower.preprocessing.described,
    }
    width = tower.projected if pooling == "projected" else config["hidden_size"]
    seen = tower.preprocessing
    return _Opened(
        tower.name,
        pooling,
        tower.model,
        (whole_pictures(seen) if pooling == "patch" else seen).pixels,
        _pooled(tower.read, pooling),
        int(width) * (2 if pooling == "both" else 1),
        described,
    )


def _open_own(spec: str) -> _Opened:
    tower = own.open_own(spec)

    def features(model: Any, pixels_NCHW: Tensor) -> Tensor:
        features_ND = model(pixels_NCHW).to(torch.float32)
        if features_ND.shape != (len(pixels_NCHW), tower.dim):
            raise ValueError(
                f"encoder {spec}: its model gave features {tuple(features_ND.shape)} for "
                f"{len(pixels_NCHW)} images, not ({len(pixels_NCHW)}, {tower.dim})"
            )
        return features_ND

    described = {"family": own.POOLING, "function": spec, "source": tower.source}
    return _Opened(
        own.POOLING, own.POOLING, tower.model, tower.pixels, features, tower.dim, described
    )


def _chosen(spec: str, family: str, poolings: tuple[str, ...], asked: str | None) -> str:
    """What was asked for, or the family's default, which is its first."""
    if asked is None:
        return poolings[0]
    if asked not in poolings:
        what = {"projected": "projection", "patch": "patch grid", "mean": "patches"}
        instead = " or ".join(f"@{name}" for name in poolings if name != "patch")
        raise ValueError(
            f"encoder {spec} ({family}) has no {what.get(asked, 'class token')}, so no @{asked}: "
            f"use {instead}"
        )
    return asked


def _no_size(spec: str, family: str, size: int) -> ValueError:
    return ValueError(
        f"encoder {spec} ({family}) has one input size, which its preprocessing says: leave out "
        f":{size} (only SAM can be asked for a smaller one)"
    )


def _pooled(read: Read, pooling: str) -> Callable[[Any, Tensor], Tensor]:
    def features(model: Any, pixels_NCHW: Tensor) -> Tensor:
        return pool(read(model, pixels_NCHW), pooling)

    return features


def pool(tokens: Tokens, pooling: str) -> Tensor:
    """Features (N, D) of N images' tokens, or (N, P, D) for `patch`."""
    if pooling == "patch":
        return tokens.patches_NPd
    if pooling == "mean":
        return tokens.patches_NPd.mean(dim=1)
    if pooling == "projected":
        assert tokens.projected_ND is not None
        return tokens.projected_ND
    assert tokens.class_Nd is not None
    if pooling == "class":
        return tokens.class_Nd
    return torch.cat([tokens.class_Nd, tokens.patches_NPd.mean(dim=1)], dim=-1)


# ---- names ---------------------------------------------------------------------------------------


def _short_name(spec: str) -> str:
    if spec.startswith("builtin:"):
        return spec.removeprefix("builtin:")
    if own.is_own(spec):
        return spec.replace(":", "-")
    return Path(spec).expanduser().resolve().name if Path(spec).is_dir() else spec.split("/")[-1]


def _shaping(model: Any, family: Family) -> dict[str, Any]:
    config = model.config.to_dict()
    found = {key: config[key] for key in SHAPING_KEYS if key in config}
    for path in family.shaping:
        outer, _, inner = path.rpartition(".")
        place = config[outer] if outer else config
        if inner in place:
            found[path] = place[inner]
    return found


def _fingerprint(opened: _Opened, dtype: str) -> str:
    described = opened.described | ({} if dtype == "float32" else {"dtype": dtype})
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(opened.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
