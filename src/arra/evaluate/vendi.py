"""Vendi score: the effective number of different pictures in a set, from its features alone.

Legend: N rows (one picture each), D feature width.
"""

import numpy as np

from arra.evaluate.finding import Finding
from arra.evaluate.rows import checked_rows, unit_rows


def vendi_score(features_ND: np.ndarray) -> Finding:
    """exp of the entropy of the eigenvalues of K / N, K the cosines of all pairs of rows.

    Friedman and Dieng 2022, arXiv 2210.02410, definition 3.1. From 1, all pictures point the same
    way, to N, all are orthogonal, and at most min(N, D). The eigenvalues that are not 0 are those
    of the (D, D) Gram matrix too, so the smaller of the two is taken.

    It rises with N: compare only values at the same number of pictures. There is no interval: a
    bootstrap repeats pictures, which this score is made to notice. Null for an empty set.

    Raises ValueError for values that are not finite or a row of zeros.
    """
    rows_ND = unit_rows(checked_rows(features_ND, "vendi"), "vendi")
    count, dim = rows_ND.shape
    if count == 0:
        return Finding(None, 0, reason="no images")
    gram = rows_ND @ rows_ND.T if count <= dim else rows_ND.T @ rows_ND
    eigenvalues = np.linalg.eigvalsh(gram / count)
    positive = eigenvalues[eigenvalues > 0]
    entropy = -(positive * np.log(positive)).sum()
    return Finding(float(np.exp(entropy)), count, details={"most_possible": min(count, dim)})
