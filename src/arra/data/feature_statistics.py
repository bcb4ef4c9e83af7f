"""Means of a dataset's features, which say how well a constant answer would be aligned.

Legend: N rows, D feature width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from arra.data.shards import FeatureInfo, read_features
from arra.encoders import Encoder


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
        )
        for name, encoder in encoders.items()
    }


def _unit(value_ND: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros (a feature that is the mean itself) stays zero."""
    length_N1 = np.linalg.norm(value_ND, axis=1, keepdims=True)
    return np.divide(value_ND, length_N1, out=np.zeros_like(value_ND), where=length_N1 > 0)
