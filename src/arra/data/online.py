"""Targets that are computed while training, from the pictures that the dataset was prepared from.

Training otherwise imports no encoder. A grid of CLIP-L costs 0.5 MB an image when it is stored;
here it costs a pass of the encoder in every step instead. Order and values are functions of the
rows alone, so a run resumes exactly; what is known of an encoder (fingerprint, means) is computed
once, from images spread over train, and kept in the run.

Legend: E images of a batch, D feature width, n vectors of one image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from arra.data.feature_statistics import Means, evenly, means_over_images
from arra.data.grid_column import resampled
from arra.data.manifest import FeatureInfo
from arra.data.originals import Originals
from arra.data.shards import Dataset
from arra.data.targets import TargetValues, filled_up
from arra.encoders import Encoder, load_encoder
from arra.files import read_json, write_json

SAMPLE = 256
"""Images from which the means are computed."""

_PASS = 32
"""Images of one pass through the encoder."""


class OnlineTarget:
    """What one encoder sees in the rows of one split."""

    def __init__(self, encoder: Encoder, originals: Originals, dataset: Dataset) -> None:
        self._encoder, self._originals, self._dataset = encoder, originals, dataset
        self.known: FeatureInfo | None = None

    @property
    def info(self) -> FeatureInfo:
        """The encoder, D, and the means."""
        assert self.known is not None
        return self.known

    @property
    def kind(self) -> Literal["global", "patch"]:
        """One vector an image, or one a code."""
        return "patch" if self._encoder.gives_grids else "global"

    def of(self, rows: Sequence[int]) -> Tensor:
        """Float32 (E, D) or (E, n, D), on the encoder's device."""
        vectors = list(self.vectors(rows))
        return filled_up(vectors) if self.kind == "patch" else torch.cat(vectors)

    def vectors(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """(1, D) of each image, or (n, D) with one for each of its codes.

        Raises:
            ValueError: a picture is gone, or the encoder gives NaN or infinity for it.
        """
        frames = self._originals.frames(rows)  # once for all encoders
        for start in range(0, len(rows), _PASS):
            part = rows[start : start + _PASS]
            found = self._encoder(frames[start : start + _PASS])
            good_E = torch.isfinite(found).flatten(1).all(dim=1)
            if not good_E.all():
                id_ = self._dataset.ids[part[int(good_E.int().argmin())]]
                raise ValueError(
                    f"--align.online {self._encoder.spec}: features of the picture {id_!r} are NaN "
                    f"or infinite: leave it out when preparing the data"
                )
            for row, value in zip(part, found.split(1), strict=True):
                yield self._at_codes(row, value) if self.kind == "patch" else value

    def _at_codes(self, row: int, patches_1PD: Tensor) -> Tensor:
        height, width = (int(side) for side in self._dataset.grids[row])
        return resampled(patches_1PD, self._encoder.grid, (height, width))[0]


def open_online(
    specs: Mapping[str, str],
    dataset: Dataset,
    held_out: Dataset | None,
    device: torch.device,
    file: Path,
) -> tuple[dict[str, TargetValues], dict[str, TargetValues]]:
    """The targets of train and of val.

    Args:
        specs: name -> encoder.
        dataset, held_out: train and val.
        device: where the encoders compute, in float32.
        file: of the run; what is known of the encoders is read from there, or written.

    Raises:
        ValueError: the source of the dataset is gone or has changed, or an encoder is another than
            the one that the run was begun with.
    """
    try:
        pictures = Originals(dataset)
        others = None if held_out is None else Originals(held_out)
    except ValueError as error:
        raise ValueError(
            f"--align.online needs the pictures of {dataset.folder}: {error}"
        ) from None
    encoders = {name: load_encoder(spec, device=device, grids=True) for name, spec in specs.items()}
    train = {name: OnlineTarget(e, pictures, dataset) for name, e in encoders.items()}
    infos = _known(train, encoders, len(dataset), file)
    val = {}
    if held_out is not None and others is not None:
        val = {name: OnlineTarget(e, others, held_out) for name, e in encoders.items()}
    for name, info in infos.items():
        for target in (train, val):
            if name in target:
                target[name].known = info
    return dict(train), dict(val)


def _known(
    targets: Mapping[str, OnlineTarget], encoders: Mapping[str, Encoder], rows: int, file: Path
) -> dict[str, FeatureInfo]:
    if file.is_file():
        infos = {name: FeatureInfo(**info) for name, info in read_json(file).items()}
        for name, encoder in encoders.items():
            if name not in infos or infos[name].encoder != encoder.fingerprint:
                raise ValueError(
                    f"--align.online {name}: {encoder.spec} is another encoder than the one that "
                    f"{file.parent} was begun with"
                )
        return infos
    infos = {}
    chosen = list(evenly(rows, SAMPLE))
    for name, target in targets.items():
        encoder = encoders[name]
        means = _means(target, chosen)
        spec, pooling = encoder.spec, encoder.pooling
        infos[name] = FeatureInfo(
            encoder.dim, encoder.fingerprint, spec, pooling, *means, dtype=encoder.dtype
        )
    write_json(file, {name: asdict(info) for name, info in infos.items()})
    return infos


def _means(target: OnlineTarget, rows: Sequence[int]) -> Means:
    seen = [value_nD.half().cpu().numpy() for value_nD in target.vectors(rows)]
    return means_over_images(lambda: seen)
