"""CLIP-score: does a picture show what its caption says, in the eyes of a CLIP?

The value is the plain mean cosine of picture and caption, as in the tables of the ARRA paper (which
uses BioMedCLIP for X-rays). Two other conventions are in the details: torchmetrics' CLIPScore is
max(100 * mean, 0), and CLIPScore of Hessel et al. 2021 (arXiv 2104.08718) 2.5 * mean(max(cos, 0)).

Legend: N pictures, n of a batch, D width of the space shared by pictures and texts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from arra.encoders import load_encoder, split_spec
from arra.encoders.clip_text import load_clip_text
from arra.evaluate.features import describe_encoder, finite
from arra.evaluate.finding import Finding
from arra.evaluate.image_set import Picture
from arra.evaluate.intervals import bootstrap_mean


class ClipJudge:
    """A CLIP: its projected image embeddings and its text tower.

    Attributes:
        name: values are called `clip_score@NAME`.
        described: what a report must say of it.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu") -> None:
        """Raises ValueError for an encoder that is no CLIP, or a spec with another pooling."""
        bare, pooling = split_spec(spec)
        if pooling not in (None, "projected"):
            raise ValueError(
                f"a CLIP-score compares in the space shared with text: leave out @{pooling} of "
                f"{spec}"
            )
        self._encoder = load_encoder(bare, "projected", device)
        self.text = load_clip_text(bare, device)
        self.name = self._encoder.name
        self.described: dict[str, Any] = describe_encoder(self._encoder) | {
            "text_tower": self.text.name,
            "text_length": self.text.length,
        }

    def images(self, images: Sequence[Image]) -> np.ndarray:
        """(n, D) float32 of length 1."""
        return _unit(self._encoder(images))

    def captions(self, captions: Sequence[str]) -> np.ndarray:
        """(n, D) float32 of length 1."""
        return _unit(self.text(captions))


class ClipPass:
    """A CLIP as a judge; memory is one number a picture and two vectors."""

    def __init__(self, judge: ClipJudge) -> None:
        self.judge, self._key = judge, f"clip_score@{judge.name}"
        self.described = {self._key: judge.described}
        self._found: list[tuple[int, int, float, bool]] = []
        self._image_sum_D = self._text_sum_D = np.zeros(1)

    def see(self, pictures: Sequence[Picture]) -> None:
        """Compares each picture, which has a caption, with it."""
        texts = [picture.caption or "" for picture in pictures]
        names = [picture.name for picture in pictures]
        image_nD = finite(
            self.judge.images([picture.image for picture in pictures]), names, self.judge.name
        )
        text_nD = finite(
            self.judge.captions(texts),
            [f"the caption of {name}" for name in names],
            self.judge.name,
        )
        cosine_n = (image_nD.astype(np.float64) * text_nD).sum(axis=1)
        cut_n = self.judge.text.too_long(texts)
        for picture, cosine, cut in zip(pictures, cosine_n, cut_n, strict=True):
            self._found.append((picture.key, picture.index, float(cosine), cut))
        self._image_sum_D = self._image_sum_D + image_nD.sum(axis=0, dtype=np.float64)
        self._text_sum_D = self._text_sum_D + text_nD.sum(axis=0, dtype=np.float64)

    def scores(self) -> dict[str, np.ndarray]:
        """Cosine (N,) of each picture and its caption, by index."""
        by_index = sorted(self._found, key=lambda found: found[1])
        return {self._key: np.array([cosine for _, _, cosine, _ in by_index])}

    def findings(self) -> dict[str, Finding]:
        """The mean, with its interval; `details["chance"]` is what other captions would get."""
        rows = sorted(self._found)
        cosine_N = np.array([row[2] for row in rows])
        pairs = len(rows) * (len(rows) - 1)
        others = float(self._image_sum_D @ self._text_sum_D) - float(cosine_N.sum())
        chance = others / pairs if pairs else None
        cut = sum(row[3] for row in rows)
        return {self._key: clip_score(cosine_N, cut, self.judge.text.length, chance)}


def clip_score(
    cosine_N: np.ndarray, cut: int = 0, length: int | None = None, chance: float | None = None
) -> Finding:
    """Mean cosine with its bootstrap interval over pictures.

    Args:
        cosine_N: of each picture and its caption; the interval depends on their order, so give
            them in the order of keys.
        cut: captions that were longer than the judge reads.
        length: tokens that the judge reads.
        chance: mean cosine of pictures with other pictures' captions.
    """
    interval = bootstrap_mean(cosine_N)
    assert interval is not None, "no picture was judged"
    reason = None
    if cut:
        reason = f"{cut} of {len(cosine_N)} captions are longer than {length} tokens and were cut"
    details: dict[str, Any] = {
        "torchmetrics": max(100.0 * interval.mean, 0.0),
        "hessel": 2.5 * float(np.maximum(cosine_N, 0).mean()),
        "cut_captions": cut,
        "text_length": length,
        "chance": chance,
    }
    method = "bootstrap over images"
    return Finding(interval.mean, interval.n, interval.low, interval.high, method, reason, details)


def _unit(features_nD: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features_nD.float(), dim=1).cpu().numpy()
