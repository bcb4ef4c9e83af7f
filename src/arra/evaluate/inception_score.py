"""Inception Score: how sure a classifier is of each picture, and how many classes it sees in all.

Salimans et al. 2016, arXiv 1606.03498, section 4: exp of the mean over pictures of
KL(p(class | picture) || p(class)), the second p being the mean of the first over a split of the
pictures; the score is the mean over splits. It looks at no real picture, and it means something
only for pictures of the classifier's own classes.

Legend: N pictures, C classes, S splits, B pictures of a batch.
"""

from dataclasses import dataclass

import numpy as np

from arra.evaluate.finding import Finding

SPLITS = 10
# Rows of a split in ADM's evaluator (50,000 pictures in ten) and in the paper's own protocol.
PUBLISHED_SPLIT = 5000


def inception_score(
    logits_NC: np.ndarray, *, splits: int = SPLITS, split_size: int | None = None
) -> Finding:
    """The score of (N, C) logits, whose rows come in the order of their pictures' keys.

    Consecutive rows make a split: `splits` of them, the first ones a row longer where N does not
    divide, or splits of `split_size` rows with a shorter last one (5000 in ADM's evaluator). For
    probabilities give their logarithm; minus infinity is a probability of 0.

    The interval is normal, from the standard deviation over splits (N - 1 divisor, as torchmetrics;
    `details["std"]`) over the root of their number. It covers the draw of the pictures, not the
    bias: the score of n pictures cannot exceed n and is too low by what their number hides of the
    classes. `reason` says so below 5000 pictures a split.
    Null with fewer pictures than splits.

    Raises ValueError for another shape, NaN or plus infinity, or a row without any finite logit.
    """
    if splits < 1 or (split_size is not None and split_size < 1):
        raise ValueError("The inception score needs at least 1 split of at least 1 picture.")
    logits_NC = _checked(logits_NC)
    count = len(logits_NC)
    if count == 0 or (split_size is None and count < splits):
        return Finding(None, count, reason=f"{splits} splits need as many images, got {count}")
    if split_size is None:
        parts = np.array_split(logits_NC, splits)
    else:
        parts = [logits_NC[start : start + split_size] for start in range(0, count, split_size)]
    return _finding([_Split.of(part_BC) for part_BC in parts])


class StreamedInceptionScore:
    """The same score without keeping logits: S rows of sums, whatever the number of pictures.

    A picture's split is its key modulo the number of splits, so neither the order of pictures nor
    the batches matter; splits differ in size by some root of their size.
    """

    def __init__(self, classes: int, splits: int = SPLITS) -> None:
        if splits < 1:
            raise ValueError("The inception score needs at least 1 split.")
        self.splits = [_Split(0, np.zeros(classes), 0.0) for _ in range(splits)]

    def add(self, logits_BC: np.ndarray, keys_B: np.ndarray) -> None:
        """Takes (B, C) logits and the uint64 keys of their pictures."""
        logits_BC = _checked(logits_BC)
        split_of_B = np.asarray(keys_B, dtype=np.uint64) % np.uint64(len(self.splits))
        for index in np.unique(split_of_B):
            self.splits[index] += _Split.of(logits_BC[split_of_B == index])

    def finding(self) -> Finding:
        """The score so far; null while a split has no picture."""
        count = sum(split.count for split in self.splits)
        if not all(split.count for split in self.splits):
            reason = f"{count} images leave some of {len(self.splits)} splits empty"
            return Finding(None, count, reason=reason)
        return _finding(self.splits)


@dataclass(frozen=True)
class _Split:
    """Sums over a split's pictures: how many, p(class) as (C,), and sum of p log p."""

    count: int
    probability_C: np.ndarray
    negative_entropy: float

    @staticmethod
    def of(logits_BC: np.ndarray) -> "_Split":
        shifted_BC = logits_BC - logits_BC.max(axis=1, keepdims=True)
        exponential_BC = np.exp(shifted_BC)
        total_B = exponential_BC.sum(axis=1)
        probability_BC = exponential_BC / total_B[:, None]
        # log p is the shifted logit - log total; where p is 0 the product is, whatever the log.
        finite_BC = np.where(probability_BC > 0, shifted_BC, 0.0)
        negative_entropy = (probability_BC * finite_BC).sum() - np.log(total_B).sum()
        return _Split(len(logits_BC), probability_BC.sum(axis=0), float(negative_entropy))

    def __add__(self, other: "_Split") -> "_Split":
        return _Split(
            self.count + other.count,
            self.probability_C + other.probability_C,
            self.negative_entropy + other.negative_entropy,
        )

    @property
    def score(self) -> float:
        """exp of H(mean p) - mean H(p), which is the mean KL divergence from the mean p."""
        mean_C = self.probability_C / self.count
        seen_C = mean_C[mean_C > 0]
        return float(np.exp(self.negative_entropy / self.count - (seen_C * np.log(seen_C)).sum()))


def _finding(splits: list[_Split]) -> Finding:
    scores_S = np.array([split.score for split in splits])
    smallest = min(split.count for split in splits)
    count = sum(split.count for split in splits)
    value = float(scores_S.mean())
    low = high = method = reason = None
    details: dict[str, float] = {"splits": len(splits), "smallest_split": smallest}
    if len(splits) > 1:
        details["std"] = float(scores_S.std(ddof=1))
        reach = 1.96 * details["std"] / len(splits) ** 0.5
        low, high = value - reach, value + reach
        method = f"standard deviation over {len(splits)} splits, normal limits"
    if smallest < PUBLISHED_SPLIT:
        reason = (
            f"splits of {smallest} images: biased low against the usual {PUBLISHED_SPLIT}, "
            "so compare only at equal numbers"
        )
    return Finding(value, count, low, high, method, reason, details)


def _checked(logits_NC: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits_NC, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"The inception score needs (N, classes) logits; got {logits.shape}.")
    if np.isnan(logits).any() or not np.isfinite(logits.max(axis=1, initial=-np.inf)).all():
        raise ValueError(
            "The inception score needs logits without NaN or infinity, of which minus infinity "
            "alone may stand for a probability of 0; check the classifier's outputs."
        )
    return logits
