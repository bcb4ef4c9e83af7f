"""The AUROC of a classifier of pathologies as a judge of `arra evaluate`.

Legend: N pictures, C classes that the classifier was trained for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from arra.data.sources import Scalar
from arra.evaluate.finding import Finding
from arra.evaluate.image_set import ImageSet, Picture, hash_of_texts
from arra.evaluate.passes import go_through
from arra.evaluate.pathology import (
    Scores,
    Unmentioned,
    labels_by_caption,
    labels_of,
    pathology_auroc,
)
from arra.evaluate.xrv import LOGITS, XrvFeatures


@dataclass
class _Classified:
    """Pictures as the classifier saw them. It scores by logits: sigmoids of large ones are equal,
    and an AUROC depends on their order alone."""

    network: XrvFeatures
    keys: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    extras: list[Mapping[str, Scalar]] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)

    def see(self, pictures: Sequence[Picture]) -> None:
        wanted = list(self.network.classes.values())
        self.parts.append(self.network([p.image for p in pictures])[LOGITS][:, wanted])
        self.keys += [picture.key for picture in pictures]
        self.captions += [picture.caption or "" for picture in pictures]
        self.extras += [picture.extra for picture in pictures]

    def labels_sha256(self, labels_NC: np.ndarray) -> str:
        """Of what is known of the pictures: they are a part of the reference."""
        rows = (f"{key} {row.tolist()}" for key, row in zip(self.keys, labels_NC, strict=True))
        return hash_of_texts(list(rows))

    def scores(self, labels_NC: np.ndarray) -> Scores:
        """In the order of keys, which resampling depends on."""
        order_N = np.argsort(np.array(self.keys, np.uint64), kind="stable")
        return Scores(np.concatenate(self.parts)[order_N], labels_NC[order_N])


class PathologyPass:
    """Compares the classifier's AUROC on generated pictures with that on real ones.

    Args:
        network: the classifier.
        real: with columns that say what its pictures show.
        generated: with such columns too, or with captions of the real ones.
        size: pixels that real pictures are cropped to, as generated ones are.
        batch_size: real pictures at a time.
        column, unmentioned: see labels_of.
        seed: of the bootstrap.

    Raises:
        ValueError: a classifier that does not say what it was trained for, or pictures without
            columns and captions.
    """

    def __init__(
        self,
        network: XrvFeatures,
        real: ImageSet,
        generated: ImageSet,
        size: int,
        batch_size: int,
        column: str | None,
        unmentioned: Unmentioned,
        seed: int,
    ) -> None:
        if not network.classes:
            raise ValueError(
                f"{network.described['spec']} lacks op_threshs, which say what its outputs were "
                f"trained for: save the state_dict of a model that torchxrayvision opened by name"
            )
        self._real, self._generated = real, generated
        self._size, self._batch_size = size, batch_size
        self._column, self._unmentioned, self._seed = column, unmentioned, seed
        self._network, self._seen = network, _Classified(network)
        self.described: dict[str, dict[str, Any]] = {
            f"auroc@{network.name}": network.described
            | {"labels": column or "columns of the classes", "unmentioned": unmentioned}
        }

    def see(self, pictures: Sequence[Picture]) -> None:
        """Classifies them."""
        self._seen.see(pictures)

    def findings(self) -> dict[str, Finding]:
        """`auroc_real@NAME`, `auroc_generated@NAME` and `auroc_difference@NAME`."""
        of_real = _Classified(self._network)
        go_through(self._real, [of_real], self._size, self._batch_size)
        real_NC = self._labels(of_real)
        if any(self._seen.extras):
            labels_NC = self._labels(self._seen)
        elif self._real.captions is not None and self._generated.captions is not None:
            labels_NC = labels_by_caption(self._seen.captions, of_real.captions, real_NC)
        else:
            raise ValueError(
                f"{self._generated.source} has neither columns that say what its pictures show, "
                f"nor captions of {self._real.source}, whose labels would hold for them"
            )
        found = pathology_auroc(
            of_real.scores(real_NC),
            self._seen.scores(labels_NC),
            list(self._network.classes),
            seed=self._seed,
        )
        labels = {"labels_sha256": of_real.labels_sha256(real_NC)}
        return {
            f"{key}@{self._network.name}": replace(finding, details={**finding.details, **labels})
            for key, finding in found.items()
        }

    def scores(self) -> dict[str, np.ndarray]:
        """None: what a picture shows is not better or worse."""
        return {}

    def _labels(self, seen: _Classified) -> np.ndarray:
        return labels_of(
            seen.extras,
            list(self._network.classes),
            column=self._column,
            unmentioned=self._unmentioned,
        )
