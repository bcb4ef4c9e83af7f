"""Rows of a dataset as the token sequences of one model.

A row whose image follows its text is a prompt and one image: batches of such are put together by
whole arrays (one_image.py). Samples of several images, and text behind an image, go through
`Layout.sample`, token by token.

Legend: E images of a batch.
"""

from collections.abc import Sequence

import numpy as np

from arra.batch import Batch, Sample
from arra.data.one_image import OneImage
from arra.data.split import Split
from arra.layout import Image, Text
from arra.models.base import Backbone, Grid

PLACEHOLDER = "<image>"
"""Where an image stands within its row's text; without it the image follows the text."""

PROMPT_BYTES = 2**28
"""Tokenized prompts that are kept: about 400,000 captions of 100 tokens; a class counts once."""

_ENTRY_BYTES = 250
"""What a kept prompt takes besides its letters and its ids."""


class Sequences:
    """Makes the batches of one split for one backbone.

    Args:
        dataset: whose rows are meant by their numbers.
        backbone: what writes prompts and images in its own way.
        train_text: prompts are trained as well.
    """

    def __init__(self, dataset: Split, backbone: Backbone, train_text: bool) -> None:
        self._dataset, self._backbone, self._train_text = dataset, backbone, train_text
        self._whole_caption = backbone.text_slots > 0  # in its features, wherever the image stands
        self._max_length = backbone.max_length
        self._fast = OneImage(backbone.layout, train_text)
        self._prompts: dict[tuple[str, Grid], np.ndarray | None] = {}
        self._bytes = 0
        self._ending: dict[Grid, int] = {}

    def batch(
        self,
        samples: Sequence[Sequence[int]],
        dropped: Sequence[bool],
        passages: Sequence[str],
        prompts_of: Sequence[int] | None = None,
    ) -> Batch:
        """Samples of the dataset, then plain text.

        Args:
            samples: the rows of each.
            dropped: for each, whether the empty prompt takes the place of its own.
            passages: texts without an image.
            prompts_of: for each image the row whose text is its prompt; None = its own.
        """
        rows = [row for sample in samples for row in sample]
        prompts_of = rows if prompts_of is None else prompts_of
        if len(rows) == len(samples) > 0:
            grids = self._dataset.grids_of(rows)
            texts = self._dataset.texts_of(prompts_of)
            prompts = [self._prompt(*asked) for asked in zip(texts, grids, strict=True)]
            known = [prompt for prompt in prompts if prompt is not None]
            if len(known) == len(rows):
                for row in np.flatnonzero(dropped):
                    known[row] = self._without(known[row], grids[row])
                texts_only = [np.array(self._passage_ids(text)) for text in passages]
                codes = self._dataset.codes(rows)
                return self._fast.batch(known, codes, grids, texts_only)
        return self.one_by_one(samples, dropped, passages, prompts_of)

    def one_by_one(
        self,
        samples: Sequence[Sequence[int]],
        dropped: Sequence[bool],
        passages: Sequence[str],
        prompts_of: Sequence[int] | None = None,
    ) -> Batch:
        """The same for samples of any kind."""
        rows = [row for sample in samples for row in sample]
        texts = iter(self._dataset.texts_of(rows if prompts_of is None else prompts_of))
        laid = [
            self._lay_out(sample, [next(texts) for _ in sample], bool(empty))
            for sample, empty in zip(samples, dropped, strict=True)
        ]
        layout = self._backbone.layout
        for text in passages:
            ids = Text(tuple(self._passage_ids(text)))
            laid.append(layout.sample([ids], train_text=True))
        return layout.collate(laid)

    # ---- a prompt and one image -----------------------------------------------------------------

    def _prompt(self, text: str, grid: Grid) -> np.ndarray | None:
        """Ids before the image of a text; None where the sequence has more than these and it."""
        key = (text, grid)
        try:
            return self._prompts[key]
        except KeyError:
            pass
        ids = self._prompt_ids(text, grid)
        taken = _ENTRY_BYTES + len(text) + (0 if ids is None else ids.nbytes)
        if self._bytes + taken <= PROMPT_BYTES:
            self._prompts[key] = ids
            self._bytes += taken
        return ids

    def _prompt_ids(self, text: str, grid: Grid) -> np.ndarray | None:
        before, _, after = text.partition(PLACEHOLDER)
        if after and not self._whole_caption:
            return None
        condition = self._backbone.condition(before, grid)
        length = len(condition) + self._backbone.layout.image_length(*grid)
        if length > self._max_length:
            return None  # to be cut
        return np.array(condition, dtype=np.int32)

    def _without(self, prompt: np.ndarray, grid: Grid) -> np.ndarray:
        """The empty prompt in place of another."""
        if not prompt.size:
            return prompt
        return np.array(self._backbone.without_prompt(prompt.tolist(), grid), dtype=np.int32)

    def _passage_ids(self, text: str) -> list[int]:
        ids = [*self._backbone.opening(), *self._backbone.text_ids(text)]
        return ids[: self._max_length]

    # ---- any sequence ---------------------------------------------------------------------------

    def _lay_out(self, rows: Sequence[int], texts: Sequence[str], dropped: bool) -> Sample:
        segments: list[Text | Image] = []
        grids = self._dataset.grids_of(rows)
        for row, text, grid in zip(rows, texts, grids, strict=True):
            image = Image(tuple(self._dataset.codes([row]).tolist()), *grid)
            before, _, after = text.partition(PLACEHOLDER)
            after = after if not self._whole_caption else ""
            condition = [] if segments else self._backbone.condition(before, grid)
            if dropped:
                condition = condition and self._backbone.without_prompt(condition, grid)
                before = after = ""
            ending = min(len(condition), self.ending(grid))
            prompt = self._text(before) if segments else Text(tuple(condition), ending)
            segments += [prompt, image, self._text(after)]
        return self._backbone.layout.sample(
            [s for s in segments if isinstance(s, Image) or s.ids],
            max_length=self._max_length,
            train_text=self._train_text,
        )

    def _text(self, text: str) -> Text:
        return Text(tuple(self._backbone.text_ids(text)) if text else ())

    def ending(self, grid: Grid) -> int:
        """How many ids close a prompt before an image of `grid`."""
        if grid not in self._ending:
            self._ending[grid] = len(self._backbone.wrapping(grid)[1])
        return self._ending[grid]
