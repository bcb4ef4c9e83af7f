"""Batches of sequences that are a prompt and one image, put together by whole arrays.

That is what nearly every row of a dataset becomes, and `Layout.sample` and `Layout.collate`, which
take any sequence, work token by token. What is made here is equal to theirs, tensor for tensor.
Where every token of a batch stands depends on the lengths of its prompts and on its grids only, so
it is kept: class-conditional batches differ in their ids alone.

Legend: B sequences, T tokens of a padded one, I tokens of the images of a batch, C codes of them,
P tokens of the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from arra.batch import IGNORE, Batch, Positions
from arra.layout import Layout

Grid = tuple[int, int]

_KEPT = 4
"""Arrangements that are remembered: of 64 sequences of 257 tokens one takes 1.5 MB."""


@dataclass(frozen=True)
class _Form:
    """The tokens of an image of one grid, the extra token of the ablation included."""

    forced: np.ndarray  # the id that the format dictates; -1 where a code stands
    code_at: np.ndarray  # where in the image each code stands


@dataclass(frozen=True)
class _Arrangement:
    """Where everything of a batch stands, as positions in its flattened B*T tokens."""

    length: int  # T
    prompt_P: np.ndarray
    image_I: np.ndarray
    forced_I: np.ndarray
    code_C: np.ndarray
    attention_BT: Tensor
    trained_N: Tensor
    positions: dict[str, Positions]


class OneImage:
    """Makes such batches in one format.

    Args:
        layout: the format.
        train_text: prompts are trained as well.
    """

    def __init__(self, layout: Layout, train_text: bool = False) -> None:
        self._layout, self._train_text = layout, train_text
        self._code_ids = np.array(layout.code_ids)
        self._form = lru_cache(maxsize=256)(self._formed)
        self._arrangement = lru_cache(maxsize=_KEPT)(self._arranged)

    def batch(
        self,
        prompts: Sequence[np.ndarray],
        codes_C: np.ndarray,
        grids: Sequence[Grid],
        passages: Sequence[np.ndarray] = (),
    ) -> Batch:
        """Sequences of a prompt and an image each, then those of plain text.

        Args:
            prompts: token ids before each image.
            codes_C: the images' codes, one image after the other.
            grids: their rows and columns of codes.
            passages: token ids of plain text, all of it trained.

        Raises:
            ValueError: a code is outside of the codebook.
        """
        texts = [*prompts, *passages]
        form = self._arrangement(tuple(grids), tuple(map(len, texts)))
        ids = np.full(len(texts) * form.length, self._layout.pad)
        ids[form.prompt_P] = np.concatenate(texts)
        ids[form.image_I] = form.forced_I
        ids[form.code_C] = self._tokens(codes_C)
        labels = np.full_like(ids, IGNORE)
        trained_N = form.trained_N.numpy()
        labels[trained_N] = ids[trained_N + 1]
        ids_BT, labels_BT = (torch.from_numpy(a).view(len(texts), -1) for a in (ids, labels))
        return Batch(
            ids_BT, form.attention_BT, labels_BT, form.trained_N, form.positions, len(grids)
        )

    def _tokens(self, codes_C: np.ndarray) -> np.ndarray:
        wrong = codes_C[(codes_C < 0) | (codes_C >= len(self._code_ids))]
        if wrong.size:
            self._layout.token_of(int(wrong[0]))  # says so
        return self._code_ids[codes_C]

    def _formed(self, grid: Grid) -> _Form:
        plan = self._layout.plan(*grid)
        return _Form(plan.forced_S.numpy(), np.flatnonzero(plan.cell_S.numpy() >= 0))

    def _arranged(self, grids: tuple[Grid, ...], lengths: tuple[int, ...]) -> _Arrangement:
        forms = [self._form(grid) for grid in grids]
        rows, images = len(lengths), len(grids)
        prompt_B = np.array(lengths)
        tokens_E = np.array([len(form.forced) for form in forms], dtype=np.int64)
        cells_E = np.array([len(form.code_at) for form in forms], dtype=np.int64)
        whole_B = prompt_B.copy()
        whole_B[:images] += tokens_E
        length = int(whole_B.max())
        first_B = np.arange(rows) * length
        start_E = (first_B + prompt_B)[:images]
        prompt_P = np.repeat(first_B, prompt_B) + _counted(prompt_B)
        within_I = _counted(tokens_E)
        image_I = np.repeat(start_E, tokens_E) + within_I
        code_C = np.repeat(start_E, cells_E) + np.concatenate([form.code_at for form in forms])
        assert all(n + form.code_at[0] > 0 for n, form in zip(lengths, forms, strict=False)), (
            "an image must have exactly h*w positions that predict a code: does text precede it?"
        )
        has_rep = self._layout.rep is not None
        trained = np.zeros(rows * length, bool)
        trained[image_I[within_I > 0] if has_rep else image_I] = True
        if self._train_text:
            trained[prompt_P] = True
        trained[prompt_P[int(prompt_B[:images].sum()) :]] = True  # passages
        trained[first_B] = False  # nothing predicts a first token
        number_E, of_C = np.arange(images), np.repeat(np.arange(images), cells_E)
        cell_C = _counted(cells_E)
        last_E = np.cumsum(cells_E) - 1
        nowhere = np.full(len(image_I), -1)
        none = np.zeros(0, np.int64)
        rep = (start_E, number_E, np.full(images, -1)) if has_rep else (none, none, none)
        sets = {
            "hybnext": (code_C - 1, of_C, cell_C),
            "holding": (code_C, of_C, cell_C),
            "rep": rep,
            "all": (image_I, np.repeat(number_E, tokens_E), nowhere),
            "last": (code_C[last_E], number_E, cells_E - 1),
        }
        return _Arrangement(
            length,
            prompt_P,
            image_I,
            np.concatenate([form.forced for form in forms]),
            code_C,
            torch.from_numpy(np.arange(length) < whole_B[:, None]),
            torch.from_numpy(np.flatnonzero(trained) - 1),
            {name: Positions(*map(torch.from_numpy, each)) for name, each in sets.items()},
        )


def _counted(counts: np.ndarray) -> np.ndarray:
    """0 .. n-1 for each n, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
