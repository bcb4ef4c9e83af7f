"""Features as the pairwise measures need them: checked, in float64.

Legend: N rows (one image each), D feature width.
"""

import numpy as np


def checked_rows(features_ND: np.ndarray, measure: str) -> np.ndarray:
    """The (N, D) features in float64.

    Raises ValueError, which names the measure, for another shape or values that are not finite.
    """
    rows_ND = np.asarray(features_ND, dtype=np.float64)
    if rows_ND.ndim != 2 or rows_ND.shape[1] == 0:
        raise ValueError(f"{measure} needs (rows, D) features; got shape {rows_ND.shape}.")
    if not np.isfinite(rows_ND).all():
        raise ValueError(
            f"{measure}: features hold NaN or infinity; recompute them in float32 and check them."
        )
    return rows_ND


def checked_pair(
    real_ND: np.ndarray, generated_MD: np.ndarray, measure: str
) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features of one extractor; ValueError where their widths differ."""
    real_ND, generated_MD = checked_rows(real_ND, measure), checked_rows(generated_MD, measure)
    if real_ND.shape[1] != generated_MD.shape[1]:
        raise ValueError(
            f"{measure} needs features of one extractor; got widths {real_ND.shape[1]} and "
            f"{generated_MD.shape[1]}."
        )
    return real_ND, generated_MD


def unit_rows(rows_ND: np.ndarray, measure: str) -> np.ndarray:
    """Rows of length 1; ValueError for a row of zeros, which has no direction."""
    norms_N = np.linalg.norm(rows_ND, axis=1)
    if not norms_N.all():
        raise ValueError(
            f"{measure} compares directions, and row {int(np.argmin(norms_N))} of the features is "
            "all zeros; check the image or the extractor."
        )
    return rows_ND / norms_N[:, None]
