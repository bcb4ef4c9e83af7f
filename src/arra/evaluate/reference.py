"""What pictures are compared with: real images, or moments that were kept of their features.

Several evaluations may share it: real images are seen once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arra.device import pick_device
from arra.evaluate.adm import has_images, has_moments
from arra.evaluate.collected import Gaussian
from arra.evaluate.entries import open_entries
from arra.evaluate.extractors import open_extractor
from arra.evaluate.features import FEATURES, Extractor
from arra.evaluate.image_set import StoredSet
from arra.evaluate.inception import NAME
from arra.evaluate.inception_network import LOGITS, SPATIAL
from arra.evaluate.measures import rows_needed
from arra.evaluate.moments import MEASURES, KeptMoments, keep_moments
from arra.evaluate.passes import FeaturePass, go_through
from arra.evaluate.settings import EvaluateConfig


class Reference:
    """What generated images are compared with.

    Args:
        config: of every evaluation that shares this; only what is judged may differ.

    Attributes:
        real: the set, where one is given.
        moments: those of an .npz file that has some, alone or beside images (as ADM's has).
        extractors: opened.
        keep: streams and rows of them that the metrics need.

    Raises:
        ValueError: images or extractors that cannot be used.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self.extractors = _extractors(config)  # first: it is soon told what cannot be opened
        self.real, self.moments = _opened(config)
        self.keep = rows_needed(config.metric_names, config.paired_images)
        self._passes: dict[int, list[FeaturePass]] = {}

    def features(self, size: int) -> list[FeaturePass]:
        """Of the real images, cropped to `size` pixels, under each extractor.

        Streams of which moments were kept are not computed again, but for measures of their rows.
        """
        assert self.real is not None
        if size not in self._passes:
            passes = [FeaturePass(each, self._wanted(each, size)) for each in self.extractors]
            if any(each.streams for each in passes):
                go_through(self.real, passes, size, self._config.batch_size)
            self._passes[size] = passes
        return self._passes[size]

    @property
    def kept_count(self) -> int | None:
        """Images behind the moments; None where that is not known."""
        return None if self.moments is None else self.moments.count

    def doubts(self) -> list[str]:
        """Sentences that a report must warn with."""
        found = [text for each in self.extractors for text in each.doubts]
        if self.moments is not None and any(each.name == NAME for each in self.extractors):
            found += self.moments.doubts(self._config.resize)
        return found

    def save_moments(self, path: Path, size: int) -> None:
        """Keeps the moments of the real images, for another run's --real."""
        assert self.real is not None
        (of_real,) = self.features(size)
        described = of_real.extractor.described
        keep_moments(path, of_real.streams, described, self.real.described(), size)

    def kept(self, extractor: Extractor, size: int) -> Mapping[str, Gaussian]:
        """Moments that were kept of an extractor's streams, by stream."""
        return {} if self.moments is None else self.moments.of(extractor, size)

    def described(self) -> dict[str, Any] | None:
        """What a report says of it; None where there is no reference."""
        if self.moments is None:
            return None if self.real is None else self.real.described()
        moments = self.moments.described()
        if self.real is not None:
            return {**self.real.described(), "moments": moments}
        alone = {"source": self._config.real, "n": moments["n"], "sha256": moments["sha256"]}
        return {**alone, "moments": moments}

    def _wanted(self, extractor: Extractor, size: int) -> dict[str, int]:
        known = self.kept(extractor, size)
        left = [name for name in self._config.metric_names if MEASURES.get(name) not in known]
        wanted = rows_needed(left, self._config.paired_images)
        wanted.pop(LOGITS, None)
        if self._config.save_moments is not None:
            wanted = {FEATURES: 0, SPATIAL: 0} | wanted
        return wanted


def _opened(config: EvaluateConfig) -> tuple[StoredSet | None, KeptMoments | None]:
    if config.real is None:
        return None, None
    path = Path(config.real).expanduser()
    moments = KeptMoments.read(path) if has_moments(path) else None
    if moments is not None and not has_images(path):
        if config.save_moments is not None:
            raise ValueError(f"{path} holds moments already, and no images to take others of")
        return None, moments
    return stored_set(config, config.real, config.split), moments


def stored_set(config: EvaluateConfig, spec: str, split: str | None) -> StoredSet:
    """A set of images that lie in files, read as the config says."""
    entries = open_entries(
        spec,
        split=split,
        limit=config.limit,
        text_column=config.text_column,
        image_column=config.image_column,
    )
    return StoredSet(spec, entries, config.workers)


def _extractors(config: EvaluateConfig) -> list[Extractor]:
    device = pick_device(config.device)
    extractors = [open_extractor(spec, device, resize=config.resize) for spec in config.extractor]
    if len({each.name for each in extractors}) < len(extractors):
        raise ValueError("two of --extractor have one name: measures are named after them")
    return extractors
