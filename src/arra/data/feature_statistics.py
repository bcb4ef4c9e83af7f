"""Means of a dataset's features, which say how well a constant answer would be aligned.

Legend: N rows, D feature width, n vectors of one image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arra.data.grid_column import GridColumn, GridFormat
from arra.data.manifest import FeatureInfo, GridInfo, ShardInfo
from arra.data.parquet_files import parquet_file
from arra.data.shards import read_features
from arra.encoders import Encoder

GRID_IMAGES = 4096
"""Images whose grids are looked at: those of a whole dataset can be hundreds of gigabytes."""


class Means(NamedTuple):
    """As `FeatureInfo` has them."""

    mean: list[float]
    unit_mean: list[float]
    centred_unit_mean: list[float]


def feature_infos(
    shards: Sequence[Path], encoders: Mapping[str, Encoder]
) -> dict[str, FeatureInfo]:
    """The manifest's entry for each feature, from the shards of one split.

    Sums are in float64 over the stored float16 values, shard by shard: two passes, since the mean
    must be known before features can be centred by it.
    """
    names = list(encoders)
    total = {name: np.zeros(encoder.dim) for name, encoder in encoders.items()}
    unit = {name: np.zeros(encoder.dim) for name, encoder in encoders.items()}
    centred = {name: np.zeros(encoder.dim) for name, encoder in encoders.items()}
    rows = 0
    for path in shards if names else ():
        for name, value_ND in read_features(path, names).items():
            total[name] += value_ND.astype(np.float64).sum(axis=0)
            unit[name] += _unit(value_ND.astype(np.float64)).sum(axis=0)
        rows += len(value_ND)
    mean = {name: value / rows for name, value in total.items()}
    for path in shards if names else ():
        for name, value_ND in read_features(path, names).items():
            centred[name] += _unit(value_ND.astype(np.float64) - mean[name]).sum(axis=0)
    return {
        name: FeatureInfo(
            dim=encoder.dim,
            encoder=encoder.fingerprint,
            spec=encoder.spec,
            pooling=encoder.pooling,
            mean=mean[name].tolist(),
            unit_mean=(unit[name] / rows).tolist(),
            centred_unit_mean=(centred[name] / rows).tolist(),
            dtype=encoder.dtype,
        )
        for name, encoder in encoders.items()
    }


def grid_infos(
    folder: Path,
    shards: Sequence[ShardInfo],
    encoders: Mapping[str, Encoder],
    formats: Mapping[str, GridFormat],
) -> dict[str, GridInfo]:
    """The manifest's entry for each grid, from at most GRID_IMAGES images of one split, as
    training sees them."""
    infos = {}
    for name, form in formats.items():
        column = GridColumn(folder, shards, name, form, _code_grids(folder, shards))
        means = means_over_images(partial(_some, column))
        infos[name] = GridInfo(
            dim=form.dim,
            encoder=encoders[name].fingerprint,
            spec=encoders[name].spec,
            pooling=encoders[name].pooling,
            **means._asdict(),
            dtype=encoders[name].dtype,
            grid=list(form.grid),
            stored=form.dtype,
        )
    return infos


def _some(column: GridColumn) -> Iterator[np.ndarray]:
    for row in evenly(len(column), GRID_IMAGES):
        yield column[row].numpy()


def evenly(rows: int, most: int) -> range:
    """At most `most` of `rows` rows, evenly spread, the first one among them."""
    return range(0, rows, max(1, -(-rows // most)))


def means_over_images(images: Callable[[], Iterable[np.ndarray]]) -> Means:
    """Means over images of the means over their vectors (n, D), as the loss weighs them.

    Args:
        images: gives the same images each of the two times that it is called.
    """
    count, total, unit = 0, 0.0, 0.0
    for value_nD in images():
        exact_nD = value_nD.astype(np.float64)
        total = total + exact_nD.mean(axis=0)
        unit = unit + _unit(exact_nD).mean(axis=0)
        count += 1
    mean_D, centred = np.asarray(total / count), 0.0
    for value_nD in images():
        centred = centred + _unit(value_nD.astype(np.float64) - mean_D).mean(axis=0)
    means = (mean_D, np.asarray(unit / count), np.asarray(centred / count))
    return Means(*(value_D.tolist() for value_D in means))


def _code_grids(folder: Path, shards: Sequence[ShardInfo]) -> np.ndarray:
    """(N, 2): code rows and columns of each image."""
    sides = ["grid_height", "grid_width"]
    tables = [parquet_file(folder / shard.file).read(columns=sides) for shard in shards]
    return np.concatenate([np.stack([t.column(s).to_numpy() for s in sides], 1) for t in tables])


def _unit(value_ND: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros (a feature that is the mean itself) stays zero."""
    length_N1 = np.linalg.norm(value_ND, axis=1, keepdims=True)
    return np.divide(value_ND, length_N1, out=np.zeros_like(value_ND), where=length_N1 > 0)
