"""The network that a spec of `--extractor` names."""

from arra.encoders import load_encoder
from arra.evaluate.features import EncoderFeatures, Extractor
from arra.evaluate.inception import is_inception, open_inception
from arra.evaluate.resizing import Filter


def open_extractor(spec: str, device: str, *, resize: Filter) -> Extractor:
    """FID's network, `inception` or `inception:FILE`, to whose size `resize` brings pictures; or an
    encoder: its folder, hub id or builtin:NAME, with @POOLING if not its own.

    Raises ValueError for what cannot be opened.
    """
    if is_inception(spec):
        return open_inception(spec, device, resize)
    return EncoderFeatures(load_encoder(spec, device=device))
