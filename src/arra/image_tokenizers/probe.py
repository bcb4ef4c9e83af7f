"""How much of an encoder's global feature a linear map can read from the codes of an image.

A painter that is aligned learns to tell the encoder's feature of the whole picture from its hidden
states. Where the codes themselves already say it, there is less to add. Two readings of an image's
codes, both without positions: the mean of their vectors (what a decoder is given), and how often
each code occurs (what a painter can learn from a table of its own, one vector a code).

Legend: N images, F values of a reading, E values of the feature, K codes, D code width.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LEAST = 40
"""Images below which no share is reported."""
HELD_OUT = 4
"""One image of so many is predicted and not fitted on."""
PENALTIES = 10.0 ** np.arange(-6, 3)
"""Ridge penalties tried, relative to the mean squared singular value of the standardised input."""


def code_readings(codes_NHW: Tensor, codebook_KD: Tensor) -> dict[str, np.ndarray]:
    """The two readings of images' codes: `vectors` (N, D) and `counts` (N, K), shares of 1."""
    codes_NP = codes_NHW.flatten(1).cpu()
    vectors_NPD = F.embedding(codes_NP, codebook_KD.cpu().float())
    counts_NK = torch.zeros(len(codes_NP), len(codebook_KD))
    counts_NK.scatter_add_(1, codes_NP, torch.ones(codes_NP.shape))
    counts_NK /= codes_NP.shape[1]
    return {"vectors": vectors_NPD.mean(dim=1).numpy(), "counts": counts_NK.numpy()}


def explained(reading_NF: np.ndarray, feature_NE: np.ndarray) -> float | None:
    """R^2 of a ridge regression on held-out images: 1 = all is read, 0 = no better than the mean.

    Every fourth image is held out. The penalty is the one with the least leave-one-out error on the
    others (Allen's PRESS, closed form). Errors are summed over the feature's values, so that those
    that vary most count most.

    Returns:
        None with fewer than LEAST images, or a feature that does not vary.
    """
    held_N = np.arange(len(reading_NF)) % HELD_OUT == HELD_OUT - 1
    if len(reading_NF) < LEAST:
        return None
    x, y = reading_NF.astype(np.float64), feature_NE.astype(np.float64)
    mean_F, mean_E = x[~held_N].mean(axis=0), y[~held_N].mean(axis=0)
    spread_F = x[~held_N].std(axis=0)
    kept_F = spread_F > 1e-9  # codes that the fitted images lack say nothing about the others
    x = (x[:, kept_F] - mean_F[kept_F]) / spread_F[kept_F]
    y = y - mean_E
    total = float(((y[held_N] - y[held_N].mean(axis=0)) ** 2).sum())
    if total == 0:
        return None
    wrong_NE = y[held_N] - x[held_N] @ _ridge(x[~held_N], y[~held_N])
    return 1 - float((wrong_NE**2).sum()) / total


def _ridge(x_NF: np.ndarray, y_NE: np.ndarray) -> np.ndarray:
    """The weights (F, E) at the penalty with the least leave-one-out error."""
    u_NR, s_R, v_RF = np.linalg.svd(x_NF, full_matrices=False)
    turned_RE = u_NR.T @ y_NE
    best, weights_FE = np.inf, np.zeros((x_NF.shape[1], y_NE.shape[1]))
    for penalty in PENALTIES * np.square(s_R).sum() / max(1, len(s_R)):
        shrunk_R = s_R**2 / (s_R**2 + penalty)
        # 1/N: the mean was fitted as well
        leverage_N = (u_NR**2) @ shrunk_R + 1 / len(x_NF)
        left_NE = (y_NE - (u_NR * shrunk_R) @ turned_RE) / (1 - leverage_N).clip(1e-6)[:, None]
        error = float((left_NE**2).sum())
        if error < best:
            best = error
            weights_FE = v_RF.T @ ((s_R / (s_R**2 + penalty))[:, None] * turned_RE)
    return weights_FE
