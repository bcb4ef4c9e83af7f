"""Image tokenizers: images to grids of discrete codes and back (the VQ family)."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arra.image_tokenizers.interface import ImageTokenizer


def load_image_tokenizer(spec: str | Path, device: str = "cpu") -> "ImageTokenizer":
    """A frozen image tokenizer, whatever its format: it is recognised by content.

    Weights are computed with in float32, whatever they are stored in.

    Args:
        spec: a folder, a hub id or `builtin:scenes`; or a published checkpoint: a file in
            LlamaGen's layout (vq_ds16_c2i.pt and its like), Chameleon's vqgan.ckpt or the folder
            that holds it with vqgan.yaml, a Janus or Emu3 folder of transformers.
        device: where to compute.

    Raises:
        ValueError: nothing is there, it is something else, or its files are damaged.
    """
    from arra.foreign import SUFFIXES
    from arra.image_tokenizers.loading import load_file, load_folder
    from arra.resolve import resolve_folder

    path = Path(spec).expanduser()
    if path.is_file():
        return load_file(path, device)
    if path.suffix in SUFFIXES and not path.exists():
        raise ValueError(f"image tokenizer {spec} does not exist: there is no such file")
    return load_folder(resolve_folder(spec, "image tokenizer"), device)
