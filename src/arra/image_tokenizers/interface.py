"""What the package needs of an image tokenizer, whatever it is inside.

Legend: N images, H and W pixels, h and w cells, K codes, D code width.
"""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class ImageTokenizer(Protocol):
    """Images to grids of codes and back; frozen."""

    @property
    def codebook(self) -> Tensor:
        """(K, D): the vectors that are decoded."""
        ...

    @property
    def codebook_size(self) -> int:
        """K."""
        ...

    @property
    def factor(self) -> int:
        """Pixels per side of one code's cell."""
        ...

    @property
    def image_size(self) -> int:
        """Pixels per side of the images it was fitted on."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides codes and pixels."""
        ...

    def encode(self, pixels_NCHW: Tensor, /) -> Tensor:
        """uint8 (N, 3, H, W) to codes, int64 (N, h, w)."""
        ...

    def decode(self, codes_NHW: Tensor, /) -> Tensor:
        """Codes (N, h, w) to uint8 (N, 3, H, W)."""
        ...

    def save_pretrained(self, save_directory: Path, /) -> Any:
        """Writes a folder that `load_image_tokenizer` opens."""
        ...
