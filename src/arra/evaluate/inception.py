"""Inception as an extractor: FID is `fd@inception`, KID is `kid@inception`.

torch-fidelity's module has the same numbers (tests/unit/evaluate/test_inception.py), but takes
nothing but its own resize filter, lacks sFID's features, reads a file that it is given as a pickle,
and cannot be imported without torchvision. So the network is written out in inception_network.py.

Legend: N pictures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from arra.evaluate.features import FEATURES
from arra.evaluate.inception_network import STREAMS, Inception
from arra.evaluate.resizing import RESIZES, Filter
from arra.files import sha256_of
from arra.foreign import read_foreign

NAME = "inception"
SHA256_HEAD = "6726825d"
"""Of the published file of weights: its name tells."""
FILES = (
    f"weights-inception-2015-12-05-{SHA256_HEAD}.pth",
    f"pt_inception-2015-12-05-{SHA256_HEAD}.pth",
)
"""What torch-fidelity and pytorch-fid call it in PyTorch's cache."""
UNPUBLISHED = (
    f"is not the published file of Inception's weights (its SHA-256 does not begin with "
    f"{SHA256_HEAD}): if its tensors are others, fd@{NAME} is not FID"
)
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[0]}"


class InceptionFeatures:
    """The network as an extractor: `fd@inception` is FID, `kid@inception` KID, and so on.

    Args:
        file: its weights; None = the published file in PyTorch's cache, fetched if it is not there.
        device: where it runs, in float32.
        resize: how pictures come to 299 pixels, of RESIZES.

    Raises:
        ValueError: no such file, or one that holds another network.
    """

    name = NAME
    streams: Mapping[str, int] = STREAMS

    def __init__(self, file: Path | None, device: str, resize: Filter) -> None:
        path = _published() if file is None else file
        # Channels last makes a CPU 1.4 times as fast (12 against 8.5 pictures/s on two cores).
        on_cpu = torch.device(device).type == "cpu"
        self._layout = torch.channels_last if on_cpu else torch.contiguous_format
        self._network = _loaded(path).to(device)
        self._network.to(memory_format=self._layout)  # type: ignore[call-overload]  # no such stub
        self._device, self._pixels = device, RESIZES[resize]
        fingerprint = sha256_of(path)
        self.described: dict[str, Any] = {
            "name": NAME,
            "spec": NAME if file is None else f"{NAME}:{file}",
            "family": "Inception v3 of 2015-12-05",
            "dim": STREAMS[FEATURES],
            "dtype": "float32",
            "fingerprint": fingerprint,
            "resize": resize,
        }
        published = fingerprint.startswith(SHA256_HEAD)
        self.doubts: Sequence[str] = () if published else (f"{path} {UNPUBLISHED}",)

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Float32 `features` (N, 2048), `spatial` (N, 2023) and `logits` (N, 1008, without bias) of
        RGB images of one size."""
        pixels_N3HW = self._pixels(images).to(self._device)
        pixels_N3HW = pixels_N3HW.contiguous(memory_format=self._layout)
        # TF32, PyTorch's default for convolutions on a GPU, keeps three digits only.
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
        ):
            streams = self._network(pixels_N3HW)
        return {name: rows.cpu().numpy() for name, rows in streams.items()}


def is_inception(spec: str) -> bool:
    """Whether a spec of `--extractor` means this network: `inception` or `inception:FILE`."""
    return spec == NAME or spec.startswith(f"{NAME}:")


def open_inception(spec: str, device: str, resize: Filter) -> InceptionFeatures:
    """The network of a spec; see InceptionFeatures."""
    file = spec.removeprefix(NAME).removeprefix(":")
    return InceptionFeatures(Path(file).expanduser() if file else None, device, resize)


def _published() -> Path:
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILES:
        if (cache / name).is_file():
            return cache / name
    path = cache / FILES[0]
    cache.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256_HEAD, progress=False)
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the weights of FID's Inception network cannot be had from {URL} ({reason}): fetch "
            f"the file elsewhere and place it in {cache}, or name it as {NAME}:FILE"
        ) from None
    return path


def _loaded(path: Path) -> Inception:
    tensors = read_foreign(path).tensors
    with torch.device("meta"):
        network = Inception()
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    found = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    if wanted != found:
        wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{path} does not hold FID's Inception network ({len(wrong)} tensors differ, such as "
            f"{wrong[0]}): the file is called {FILES[0]}, or {FILES[1]}"
        )
    network = Inception()
    network.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    return network.float().eval().requires_grad_(False)
