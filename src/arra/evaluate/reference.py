"""The real images and the extractors. Several evaluations may share them: they are seen once."""

from arra.device import pick_device
from arra.evaluate.entries import open_entries
from arra.evaluate.extractors import open_extractor
from arra.evaluate.features import Extractor
from arra.evaluate.image_set import StoredSet
from arra.evaluate.inception_network import LOGITS
from arra.evaluate.measures import rows_needed
from arra.evaluate.passes import FeaturePass, go_through
from arra.evaluate.settings import EvaluateConfig


class Reference:
    """What generated images are compared with.

    Args:
        config: of every evaluation that shares this; only what is judged may differ.

    Attributes:
        real: the set, where one is given.
        extractors: opened.
        keep: streams and rows of them that the metrics need.

    Raises:
        ValueError: images or extractors that cannot be used.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.real = None if config.real is None else stored_set(config, config.real, config.split)
        self.extractors = _extractors(config)
        self.keep = rows_needed(config.metric_names)
        self._of_real = {stream: rows for stream, rows in self.keep.items() if stream != LOGITS}
        self._batch_size = config.batch_size
        self._passes: dict[int, list[FeaturePass]] = {}

    def features(self, size: int) -> list[FeaturePass]:
        """Of the real images, cropped to `size` pixels, under each extractor."""
        assert self.real is not None
        if size not in self._passes:
            passes = [FeaturePass(each, self._of_real) for each in self.extractors]
            go_through(self.real, passes, size, self._batch_size)
            self._passes[size] = passes
        return self._passes[size]


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
