"""Image tokenizers: images to grids of discrete codes and back (the VQ family)."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arra.image_tokenizers.vq import VQModel


def load_image_tokenizer(spec: str | Path, device: str = "cpu") -> "VQModel":
    """A frozen image tokenizer from a folder, a hub id or `builtin:scenes`.

    Weights are computed with in float32, whatever they are stored in.

    Raises:
        ValueError: nothing is there, it is something else, or its files are damaged.
    """
    from arra.image_tokenizers.loading import load_folder
    from arra.resolve import resolve_folder

    return load_folder(resolve_folder(spec, "image tokenizer"), device)
