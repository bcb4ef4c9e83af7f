"""Which way a measure is better, by its key."""

from typing import Literal

LOWER = (
    *("fd", "fid", "sfid", "fd_infinity", "fid_infinity", "kid", "cmmd", "ms_ssim_diversity"),
    *("scenes/fragments", "perplexity", "bits_per_byte", "copies", "exact_copies"),
)
HIGHER = (
    *("precision", "recall", "density", "coverage", "vendi", "is"),
    *("ms_ssim_paired", "scenes", "clip_score", "auroc_generated"),
)


def better(key: str) -> Literal["lower", "higher"] | None:
    """Of `fd@dinov2`, `scenes/colour`, ...; None where neither is, or it is not known."""
    measure = key.split("@")[0]
    for name in (measure, measure.split("/")[0]):
        if name in LOWER:
            return "lower"
        if name in HIGHER:
            return "higher"
    return None
