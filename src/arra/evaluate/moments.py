"""A reference that is kept as the moments of its features: ADM's .npz files, and our own.

FID needs no more of the real images than mean and covariance of their features, and published
tables were made with files of these. A file of ours also says how it was made; one of another
program says nothing, is taken for the Inception network's, and what cannot be known is told.

Legend: D feature width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arra.data.images import CROP
from arra.evaluate import adm
from arra.evaluate.collected import Collected, Gaussian
from arra.evaluate.features import FEATURES, Extractor
from arra.evaluate.inception import NAME
from arra.evaluate.inception_network import SPATIAL
from arra.evaluate.resizing import PUBLISHED
from arra.files import sha256_of

MEASURES = {"fd": FEATURES, "fd_infinity": FEATURES, "sfid": SPATIAL}
"""What can be computed from moments, and from those of which stream."""


@dataclass(frozen=True)
class KeptMoments:
    """Moments that were read.

    Attributes:
        path: the file.
        sha256: of the file.
        count: images behind it; None where it does not say.
        gaussians: by stream.
        about: how it was made: `extractor`, `set`, `size`, `crop`; empty in others' files.
    """

    path: Path
    sha256: str
    count: int | None
    gaussians: Mapping[str, Gaussian]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "KeptMoments":
        """Raises ValueError for a damaged file, or numbers that are no moments."""
        moments, about = adm.read_moments(path)
        gaussians = {
            stream: Gaussian.from_moments(each.mean_D, each.covariance_DD, each.count)
            for stream, each in moments.items()
        }
        return cls(path, sha256_of(path), moments[FEATURES].count, gaussians, about)

    def described(self) -> dict[str, Any]:
        """What a report says of them."""
        return {
            "file": str(self.path),
            "sha256": self.sha256,
            "n": self.count,
            "streams": sorted(self.gaussians),
            "about": dict(self.about),
        }

    def of(self, extractor: Extractor, size: int) -> Mapping[str, Gaussian]:
        """Those of an extractor's streams; none where they are another extractor's.

        Raises:
            ValueError: they were made by this extractor in another state, of images of another
                size, or by something of the same name.
        """
        made = self.about.get("extractor", {"name": NAME})
        if made["name"] != extractor.name:
            return {}
        for stream, gaussian in self.gaussians.items():
            if gaussian.dim != extractor.streams.get(stream):
                raise ValueError(
                    f"{self.path} has {stream} of {gaussian.dim} dimensions, {extractor.name} has "
                    f"{extractor.streams.get(stream)}: it was made by another network"
                )
        if self.about:
            self._refuse_others(extractor.described, made, size)
        return self.gaussians

    def doubts(self, resize: str) -> list[str]:
        """What a reader of FIDs from a file of another program must know."""
        if self.about or (resize == PUBLISHED and SPATIAL in self.gaussians):
            return []
        return [
            f"{self.path} does not say with which resize filter it was made; these images were "
            f"brought to size with {resize!r} (ADM's references are {PUBLISHED!r})"
        ]

    def _refuse_others(self, now: Mapping[str, Any], made: Mapping[str, Any], size: int) -> None:
        asked = {"size": size, "crop": CROP}
        changed = [key for key in asked if self.about.get(key) != asked[key]]
        changed += [
            key
            for key in ("fingerprint", "pooling", "resize", "dtype")
            if made.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was made with another {', '.join(changed)}: measure its images again "
                f"and keep their moments with --save-moments"
            )


def computed_from(
    kept: Sequence[Mapping[str, Gaussian]], extractors: Sequence[Extractor]
) -> set[str]:
    """The keys of measures that compare with moments that were kept, here by extractor."""
    return {
        f"{metric}@{extractor.name}"
        for moments, extractor in zip(kept, extractors, strict=True)
        for metric, stream in MEASURES.items()
        if stream in moments
    }


def keep_moments(
    path: Path,
    streams: Mapping[str, Collected],
    extractor: Mapping[str, Any],
    images: Mapping[str, Any],
    size: int,
) -> None:
    """Writes a file that KeptMoments reads, as does ADM's evaluator.

    Args:
        path: of the file.
        streams: of the features of the images, cropped to `size` pixels.
        extractor, images: as a report describes them.
        size: pixels per side.
    """
    moments = {}
    for stream, collected in streams.items():
        if collected.count < 2:
            raise ValueError(f"--save-moments {path}: one image has no covariance, give more")
        gaussian = collected.gaussian()
        moments[stream] = adm.Moments(gaussian.mean_D, gaussian.covariance(), gaussian.count)
    about = {"extractor": dict(extractor), "set": dict(images), "size": size, "crop": CROP}
    adm.write_moments(path, moments, about)
