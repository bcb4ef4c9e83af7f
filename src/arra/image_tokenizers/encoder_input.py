"""From a tokenizer's floats to what a frozen encoder takes, with gradients.

Legend: N images, C = 3 channels, H and W pixels.
"""

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from arra.encoders import Encoder


class EncoderInput:
    """An encoder's own preprocessing as a differentiable map of whole images.

    The encoder sees the whole image at its input size, whatever its own preprocessing would cut
    off. Follows its input to whatever device that is on.

    Attributes:
        black_and_white_2CHW: the encoder's pixels of a black and a white image.
        side: (H, W) of the encoder's input.
    """

    def __init__(self, encoder: Encoder) -> None:
        # Preprocessing is affine in the pixels: two images show which affine map it is.
        images = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")]
        self.black_and_white_2CHW = encoder.preprocess(images)
        self.side = (self.black_and_white_2CHW.shape[2], self.black_and_white_2CHW.shape[3])
        self._black_C11, white_C11 = self.black_and_white_2CHW[:, :, :1, :1]
        self._range_C11 = white_C11 - self._black_C11

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Floats -1..1 to the encoder's pixels (N, 3, *side)."""
        share_NCHW = ((x_NCHW.float() + 1) / 2).clamp(0, 1)
        if share_NCHW.shape[2:] != self.side:
            share_NCHW = F.interpolate(share_NCHW, self.side, mode="bicubic", antialias=True)
            share_NCHW = share_NCHW.clamp(0, 1)  # as bytes are, which bicubic overshoots
        black_C11, range_C11 = (t.to(x_NCHW.device) for t in (self._black_C11, self._range_C11))
        return black_C11 + share_NCHW * range_C11
