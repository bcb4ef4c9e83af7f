"""The network that a spec of `--extractor` names."""

from arra.encoders import load_encoder
from arra.evaluate.features import EncoderFeatures, Extractor
from arra.evaluate.inception import is_inception, open_inception
from arra.evaluate.resizing import Filter
from arra.evaluate.xrv import is_xrv, open_xrv


def open_extractor(spec: str, device: str, *, resize: Filter) -> Extractor:
    """FID's network, `inception` or `inception:FILE`, to whose size `resize` brings pictures;
    torchxrayvision's DenseNet, `xrv:FILE`; or an encoder: its folder, hub id or builtin:NAME, with
    @POOLING if not its own.

    Raises ValueError for what cannot be opened.
    """
    if is_inception(spec):
        return open_inception(spec, device, resize)
    if is_xrv(spec):
        return open_xrv(spec, device)
    return EncoderFeatures(load_encoder(spec, device=device))
