"""How different two images look to a frozen encoder: the feature loss of a tokenizer.

As LPIPS (Zhang et al. 2018, arXiv 1801.03924, eq. 1) without its learned weights: token features of
several layers, each scaled to unit length, compared by squared distance. Every family that
encoders/families.py and open_clip.py know shows its layers, with the width last: (N, L, d), or
(N, h, w, d) in SAM's, where d may differ between layers.

Legend: N images, H and W pixels, L tokens, h and w patches, d hidden width of the encoder.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arra.encoders import load_encoder, own
from arra.image_tokenizers.encoder_input import EncoderInput

DEPTHS = (0.25, 0.5, 0.75, 1.0)
"""Layers that are compared, as fractions of the encoder's depth."""


class FeatureLoss(nn.Module):
    """Mean squared distance between unit features, summed over width, averaged over layers.

    The encoder sees the whole square, resized to its input size, whatever its own preprocessing
    would cut off.

    Args:
        spec: a folder, a hub id or `builtin:NAME`, as `load_encoder` takes it.
        device: where it computes.

    Raises:
        ValueError: no such encoder, or a user's own function, which shows no layers.
    """

    def __init__(self, spec: str, device: torch.device) -> None:
        super().__init__()
        encoder = load_encoder(spec, device=device)
        if encoder.family == own.POOLING:
            raise ValueError(
                f"--feature-encoder {spec}: a function's own encoder gives one vector an image, "
                f"but the feature loss compares layers; name a folder or a hub id instead"
            )
        self.fingerprint = encoder.fingerprint
        self.model = encoder.model
        self.pixels = EncoderInput(encoder)

    def forward(self, x_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
        """The loss between two batches of floats -1..1; gradients flow into the first."""
        with torch.no_grad():
            wanted = self._features(target_NCHW)
        found = self._features(x_NCHW)
        losses = [
            (a_NLd - b_NLd).square().sum(dim=-1).mean()
            for a_NLd, b_NLd in zip(found, wanted, strict=True)
        ]
        return torch.stack(losses).mean()

    def _features(self, x_NCHW: Tensor) -> list[Tensor]:
        output = self.model(pixel_values=self.pixels(x_NCHW), output_hidden_states=True)
        states = output.hidden_states
        last = len(states) - 1
        layers = sorted({max(1, round(depth * last)) for depth in DEPTHS})
        # as (N, tokens, d), so that a layer counts the same whatever its shape
        return [F.normalize(states[layer].float().flatten(1, -2), dim=-1) for layer in layers]
