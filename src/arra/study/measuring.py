"""From an arm's answers to numbers with intervals, and from two arms to paired differences.

Legend: N prompts or images, D feature width.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from arra.encoders import Encoder
from arra.evaluate.distances import frechet, kernel_distance, rank_deficient
from arra.evaluate.features import image_features
from arra.evaluate.intervals import bootstrap_mean
from arra.evaluate.paired import paired_difference
from arra.evaluate.scenes import FIELDS, scene_verdicts
from arra.study.results import ARMS, in_order
from arra.study.statistics import paired_resampling

KID_SUBSETS = 20
KID_SUBSET = 200  # images; the smaller set's size where that is less


@dataclass(frozen=True)
class Judge:
    """What painted images are held against.

    Attributes:
        scenes: whether captions can be parsed and pictures read back.
        encoder: of the distances; None leaves them out.
        real_ND: its features of real held-out images.
        distances: which of fd and kid.
    """

    scenes: bool
    encoder: Encoder | None
    real_ND: np.ndarray
    distances: tuple[str, ...] = ("fd",)

    def distance(self, kind: str, rows_ND: np.ndarray) -> float:
        """fd or kid of painted features to the real ones; the name is `kind@encoder`."""
        if kind == "fd":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # said by `caution` instead
                return frechet(self.real_ND, rows_ND)
        subset = min(KID_SUBSET, len(self.real_ND), len(rows_ND))
        found = kernel_distance(
            self.real_ND, rows_ND, subsets=KID_SUBSETS, subset_size=subset, seed=0
        )
        return found.mean

    def caution(self, painted: int) -> dict[str, str]:
        """{measure: why its value must be read with care} for so many painted images."""
        real, dim = self.real_ND.shape
        if self.encoder is None or not rank_deficient(real, painted, dim):
            return {}
        name = f"fd@{self.encoder.name}"
        reason = (
            f"{name} of {painted} painted and {real} real images in {dim} dimensions is rank "
            f"deficient: compare it only at equal numbers of images"
        )
        return {name: reason}


@dataclass(frozen=True)
class Answers:
    """What was found in one set of painted images: per image, before any averaging."""

    verdicts: dict[str, np.ndarray]  # (N,) each; empty without scenes
    features_ND: np.ndarray | None

    def first(self, count: int) -> "Answers":
        features = None if self.features_ND is None else self.features_ND[:count]
        return Answers({k: v[:count] for k, v in self.verdicts.items()}, features)


def examine(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
    """Reads and encodes every image."""
    verdicts = scene_verdicts(images, prompts) if judge.scenes else {}
    features = None if judge.encoder is None else image_features(images, judge.encoder)
    return Answers(verdicts, features)


def score(judge: Judge, answers: Answers) -> float:
    """One number, higher is better, for choosing the guidance: mean accuracy, else minus fd."""
    if judge.scenes:
        asked = [answers.verdicts[name] for name in FIELDS]
        return float(np.mean([np.nanmean(v) for v in asked if not np.isnan(v).all()]))
    assert answers.features_ND is not None
    return -judge.distance("fd", answers.features_ND)


def summary(judge: Judge, answers: Answers) -> dict[str, Any]:
    """{measure: {mean, low, high, n}}; distances without an interval (see `compare`)."""
    found: dict[str, Any] = {}
    for name, values_N in answers.verdicts.items():
        interval = bootstrap_mean(values_N, proportion=name in FIELDS)
        if interval is not None:
            found[name] = interval.to_json()
    if answers.features_ND is not None and judge.encoder is not None:
        for kind in judge.distances:
            value = judge.distance(kind, answers.features_ND)
            found[f"{kind}@{judge.encoder.name}"] = point(value, len(answers.features_ND))
    return found


def point(value: float, n: int) -> dict[str, Any]:
    """A value without an interval."""
    return {"mean": value, "low": None, "high": None, "n": n}


def compare(
    judge: Judge, plain: Answers, aligned: Answers
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """({arm: {measure: interval}}, {measure: paired difference}) for the same prompts."""
    metrics = {"plain": summary(judge, plain), "aligned": summary(judge, aligned)}
    differences: dict[str, Any] = {}
    for name in in_order(n for n in metrics["plain"] if n in metrics["aligned"]):
        if name in plain.verdicts:
            found = paired_difference(plain.verdicts[name], aligned.verdicts[name])
            if found is not None:  # None: no prompt on which both arms can be judged
                differences[name] = found.to_json()
            continue
        assert plain.features_ND is not None
        assert aligned.features_ND is not None
        kind = name.partition("@")[0]
        values = paired_resampling(
            lambda rows_ND, kind=kind: judge.distance(kind, rows_ND),  # type: ignore[misc]
            plain.features_ND,
            aligned.features_ND,
        ).to_json()
        for arm in ARMS:
            metrics[arm][name] = values[arm]
        differences[name] = {**values["difference"], "p": None}
    return metrics, differences


def compare_losses(
    plain_N: Sequence[float], aligned_N: Sequence[float]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The same for the losses of the same held-out images."""
    found = paired_difference(np.array(plain_N), np.array(aligned_N))
    assert found is not None, "a validation split has at least one image"
    metrics = {}
    for arm, values in (("plain", plain_N), ("aligned", aligned_N)):
        interval = bootstrap_mean(np.array(values))
        assert interval is not None
        metrics[arm] = {"val_loss_ar": interval.to_json()}
    return metrics, {"val_loss_ar": found.to_json()}


def note(verdicts: Mapping[str, np.ndarray], index: int) -> str:
    """What the judge says of one picture: '✓ all right' or '✗ colour, size'."""
    if not verdicts:
        return ""
    wrong = [
        name
        for name in FIELDS
        if name != "all_right" and verdicts[name][index] == 0  # NaN: not asked for
    ]
    pieces = int(verdicts["fragments"][index])
    if pieces:
        wrong.append(f"{pieces} stray piece{'s' if pieces > 1 else ''}")
    return f"✗ {', '.join(wrong)}" if wrong else "✓ all right"
