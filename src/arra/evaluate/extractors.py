"""The network that a spec of `--extractor` names."""

from arra.encoders import load_encoder
from arra.evaluate.features import EncoderFeatures, Extractor


def open_extractor(spec: str, device: str) -> Extractor:
    """An encoder: its folder, hub id or builtin:NAME, with @POOLING if not its own.

    Raises ValueError for what cannot be opened.
    """
    return EncoderFeatures(load_encoder(spec, device=device))
