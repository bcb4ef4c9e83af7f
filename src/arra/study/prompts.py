"""Which captions of a prepared dataset a study paints."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from arra.data.sequences import PLACEHOLDER
from arra.data.shards import open_dataset
from arra.data.views import rows_by_sample

TRAIN = "train"


@dataclass(frozen=True)
class Prompts:
    """Captions of one split, one for each of its samples, up to where the image stands.

    Attributes:
        texts: the captions.
        rows: the dataset's row of each: its real image.
        ids: that row's id.
    """

    texts: list[str]
    rows: list[int]
    ids: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def without(self, captions: Collection[str]) -> "Prompts":
        """Those whose caption is none of `captions`."""
        return self._only([i for i, text in enumerate(self.texts) if text not in captions])

    def once_each(self) -> "Prompts":
        """The first of equal captions."""
        first = {text: i for i, text in reversed(list(enumerate(self.texts)))}
        return self._only(sorted(first.values()))

    def part(self, start: int | None, stop: int | None) -> "Prompts":
        """As a slice."""
        return self._only(list(range(len(self)))[start:stop])

    def _only(self, chosen: list[int]) -> "Prompts":
        return Prompts(
            [self.texts[i] for i in chosen],
            [self.rows[i] for i in chosen],
            [self.ids[i] for i in chosen],
        )


def prompts_of(data: Path, split: str) -> Prompts:
    """The captions of a split's first images, in the dataset's order."""
    dataset = open_dataset(data, split, features=())
    rows = [rows[0] for rows in rows_by_sample(dataset.samples, dataset.view_of)]
    texts = [dataset.texts[row].partition(PLACEHOLDER)[0].strip() for row in rows]
    return Prompts(texts, rows, [dataset.ids[row] for row in rows])
