"""What an audit shows: originals beside what their codes decode to, and closest pairs."""

from PIL import Image

from arra.doctor.samples import Shown
from arra.pages.sheet import Cell


def sample_cell(shown: Shown) -> Cell:
    """Original and decoded."""
    heads = ["decoded"]
    if shown.psnr is not None:
        heads.append(f"{shown.psnr:.1f} dB")
    if shown.agreement is not None and shown.agreement < 1:
        heads.append(f"{shown.agreement:.1%} of codes agree")
    caption = f"{shown.id}: {shown.caption}"
    return Cell((shown.original, shown.decoded), ("original", ", ".join(heads)), caption)


def pair_cell(one: Shown, other: Shown, cosine: float) -> Cell:
    """Two rows: their originals, or what their codes decode to."""
    heads = (_named(one), _named(other))
    same = one.caption == other.caption
    caption = one.caption if same else f"{one.caption}  |  {other.caption}"
    return Cell((_best(one), _best(other)), heads, f"cosine {cosine:.4f}: {caption}")


def _named(shown: Shown) -> str:
    return f"{shown.id} (decoded)" if shown.original is None and shown.decoded else shown.id


def _best(shown: Shown) -> Image.Image | None:
    return shown.original if shown.original is not None else shown.decoded
