"""A frozen vision encoder that teaches a tokenizer: its patch features on the grid of codes.

Two ways to be taught (docs/semantic-tokenizer.md). In a semantic tokenizer (semantic.py) the codes
are made of these features, as in VFMTok (arXiv 2507.08441). In an ordinary one they are only a
target while it is fitted: GigaTok's semantic regulariser (arXiv 2504.08736, section 3.2).

Legend: N images, H and W pixels, h and w cells of a grid, L tokens, d hidden width of the encoder,
C channels of the decoder.
"""

import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from arra.encoders import load_encoder, open_clip
from arra.files import atomic_dir, sha256_of
from arra.foreign import read_foreign
from arra.image_tokenizers.encoder_input import EncoderInput
from arra.resolve import resolve_folder

DEPTHS = (0.25, 0.5, 0.75, 1.0)
"""Layers that become codes unless they are named, as fractions of the encoder's depth: VFMTok takes
blocks 6, 12, 18 and 24 of DINOv2-L (pretrained_enc_arch.py of CVMI-Lab/VFMTok)."""

PREPROCESSING = ("preprocessor_config.json", "processor_config.json")


def split_layers(spec: str) -> tuple[str, tuple[int, ...]]:
    """`E@3,6,12` is the encoder E and its blocks, counted from 1; without an @ there are none.

    Raises:
        ValueError: what follows the @ is no list of blocks.
    """
    bare, at, suffix = spec.rpartition("@")
    if not at or "/" in suffix:  # an @ within a folder's path belongs to the path
        return spec, ()
    numbers = suffix.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(
            f"teacher {spec}: behind the @ stand blocks of the encoder, counted from 1, such as "
            f"{bare}@3,6,12; not {suffix!r}"
        )
    return bare, tuple(sorted({int(number) for number in numbers}))


class Teacher:
    """A frozen encoder as a map from floats -1..1 to grids of patch features.

    It is no module on purpose: its weights are nobody's parameters and in nobody's state, it stays
    in eval mode and float32, and it follows its input to whatever device that is on.

    Attributes:
        encoder: the frozen encoder with its own preprocessing.
        folder: where it was opened.
        layers: the blocks it shows, from 1, ascending; () = only the patch features that the
            encoder's family gives as its own (the pooling `patch`). Those are the last block's
            where there is a token for each patch.
    """

    def __init__(self, folder: Path, layers: tuple[int, ...] = ()) -> None:
        self.encoder = load_encoder(folder, "patch", grids=True)
        self.folder, self.layers = folder, layers
        self._pixels = EncoderInput(self.encoder)
        pixels_1CHW = self._pixels.black_and_white_2CHW[:1]
        with torch.no_grad():
            self._patches = self.encoder.pool(pixels_1CHW).shape[1]
            self.depth = self._depth(pixels_1CHW)
        self.dim = self.encoder.dim
        deepest = max(layers, default=0)
        if deepest > self.depth:
            raise ValueError(
                f"teacher {folder} has no block {deepest} with a token for each patch: "
                + (f"choose from 1 to {self.depth}" if self.depth else "leave out @ and the blocks")
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Itself: copies of a model share what is frozen."""
        return self

    def _depth(self, pixels_NCHW: Tensor) -> int:
        """Blocks that can be shown: 0 for encoders whose states are not one token a patch."""
        output = self.encoder.model(pixel_values=pixels_NCHW, output_hidden_states=True)
        states = output.hidden_states
        if output.last_hidden_state.ndim != 3 or any(state.ndim != 3 for state in states):
            return 0
        return len(states) - 1

    def spread(self) -> tuple[int, ...]:
        """The blocks at DEPTHS; () for an encoder that shows none."""
        return tuple(sorted({max(1, round(part * self.depth)) for part in DEPTHS if self.depth}))

    @torch.no_grad()
    def __call__(self, x_NCHW: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Floats -1..1 (N, 3, H, W) to features (N, d, h, w) of each layer, shallow to deep.

        The encoder sees the image at its own input size, which is a square; its grid of patches is
        resampled to `grid` = (h, w), bilinearly and with antialiasing.
        """
        model = self.encoder.model.to(x_NCHW.device)
        pixels_NCHW = self._pixels(x_NCHW)
        if not self.layers:
            found = [self.encoder.pool(pixels_NCHW)]
        else:
            output = model(pixel_values=pixels_NCHW, output_hidden_states=True)
            # the last block's patches are the encoder's own, behind its final norm if it has one
            states = [*output.hidden_states[:-1], output.last_hidden_state]
            found = [states[layer][:, -self._patches :] for layer in self.layers]
        return [self._on_grid(tokens_NLd, grid) for tokens_NLd in found]

    def _on_grid(self, tokens_NLd: Tensor, grid: tuple[int, int]) -> Tensor:
        n, patches, d = tokens_NLd.shape
        height, width = self._pixels.side
        rows = round(math.sqrt(patches * height / width))
        assert patches % rows == 0, f"{patches} patches in {rows} rows"
        grid_Ndhw = tokens_NLd.float().transpose(1, 2).reshape(n, d, rows, patches // rows)
        if grid_Ndhw.shape[2:] == grid:
            return grid_Ndhw
        return F.interpolate(grid_Ndhw, grid, mode="bilinear", antialias=True)


class TeacherLoss(nn.Module):
    """1 - cos between what a small head makes of decoder features and the teacher's features.

    The head is GigaTok's MLP of two hidden layers (blocks.py of SilentView/GigaTok, `distill_mlp`)
    at half its width. It belongs to the fit: no finished tokenizer has it. VFMTok gives its loss of
    the same form the weight 1 (vq_loss.py), GigaTok 0.5 (vq_loss.py, `proj_weight`).
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        width = 2 * channels
        self.head = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, dim, 1),
        )

    def forward(self, trunk_NChw: Tensor, taught_Ndhw: Tensor) -> Tensor:
        """The mean over cells and images."""
        found_Ndhw = self.head(trunk_NChw).float()
        return (1 - F.cosine_similarity(found_Ndhw, taught_Ndhw, dim=1)).mean()


def store_teacher(spec: str, folder: Path) -> None:
    """Writes the encoder `spec` into a new folder in its own format: what `load_encoder` opens.

    Of a model of images and text only the vision tower is written; weights are safetensors.

    Raises:
        ValueError: no such encoder, one without patches, or a user's own, which is no files.
    """
    model = load_encoder(spec, "patch", grids=True).model
    origin = resolve_folder(spec, "encoder")
    with atomic_dir(folder) as temporary:
        if open_clip.is_open_clip(origin):
            _store_open_clip(origin, temporary)
            return
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        model.save_pretrained(temporary)
        if bar:
            logging.enable_progress_bar()
        found = next(origin / name for name in PREPROCESSING if (origin / name).is_file())
        shutil.copyfile(found, temporary / found.name)


def _store_open_clip(origin: Path, folder: Path) -> None:
    tensors = read_foreign(open_clip.weights_of(origin)).tensors
    kept = {name: t.clone() for name, t in tensors.items() if name.startswith("visual.")}
    save_file(kept, folder / open_clip.PUBLISHED[0], metadata={"format": "pt"})
    shutil.copyfile(origin / open_clip.CONFIG, folder / open_clip.CONFIG)


def stored_sha256(folder: Path) -> str:
    """Of the files that `store_teacher` wrote: names and contents."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    described = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(described.encode()).hexdigest()
