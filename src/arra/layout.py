"""The one sequence that holds text and images, and every position in it that matters.

This file is the only owner of positions. It turns text ids and image codes into ids, labels and the
position sets that the objective aligns, and it says which ids are legal at each step of painting.

Four formats (an image of h x w codes, raster order):

    grid        code ... code                                       LlamaGen, Janus
    chameleon   begin code ... code end                             Chameleon, Anole, grown LLMs
    lumina      begin size(h) size(w) [code x w, row_end] x h end   Lumina-mGPT, ARRA's release
    written     begin h * w grid_begin [code x w, row_end] x h grid_end end     Emu3

"written" spells the sides as text: its h and w are decimal digits.

Legend: S decode steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from arra.batch import NOWHERE, Batch, Place, Sample, collate

Style = Literal["grid", "chameleon", "lumina", "written"]

_PARTS: dict[str, tuple[str, ...]] = {
    "grid": (),
    "chameleon": ("begin", "end"),
    "lumina": ("begin", "first_size", "row_end", "end"),
    "written": ("begin", "digits", "times", "grid_begin", "row_end", "grid_end", "end"),
}
"""What an image has besides its codes: all that tells one format from another."""


@dataclass(frozen=True)
class Text:
    """A stretch of text ids (the family's own: prompt wrapping and begin-of-text included)."""

    ids: tuple[int, ...]
    ending: int = 0  # how many of the last ids close a prompt: they are never cut


@dataclass(frozen=True)
class Image:
    """An image's codes in raster order."""

    codes: tuple[int, ...]
    height: int
    width: int

    def __post_init__(self) -> None:
        if len(self.codes) != self.height * self.width:
            raise ValueError(
                f"an image of {self.height}x{self.width} codes cannot have {len(self.codes)} codes"
            )


@dataclass(frozen=True)
class DecodePlan:
    """What follows the prompt while an image is painted, step by step."""

    forced_S: Tensor  # the id that the format dictates; -1 where a code is sampled
    cell_S: Tensor  # the raster cell that a sampled code fills; -1 at forced steps


@dataclass(frozen=True)
class Layout:
    """A family's image format in its own token ids.

    Attributes:
        style: one of the formats above.
        code_ids: token id of each code; code k of the image tokenizer is token code_ids[k].
        pad: id that fills padding (never read: the model is causal and padding comes last).
        begin, end: the tokens around an image (all but "grid").
        row_end: the token after each row ("lumina", "written").
        first_size: a side of n codes is written as token first_size + n // size_unit ("lumina").
        num_sizes: how many size tokens there are.
        size_unit: codes per unit of the size tokens (2 in Lumina-mGPT: 32 pixels at f16).
        rep: the extra token before an image, if the ablation is on.
        digits: the ids of 0 to 9 in text, and `times` that of the sign between the sides
            ("written").
        grid_begin, grid_end: the tokens before the first row and after the last ("written").
        closing: the token that closes the turn behind an image, if the format trains one
            (Lumina-mGPT).
        wording: words that stand before every prompt; {width} and {height} are those of the image
            in pixels (Lumina-mGPT).
    """

    style: Style
    code_ids: tuple[int, ...] = field(repr=False)
    pad: int
    begin: int | None = None
    end: int | None = None
    row_end: int | None = None
    first_size: int | None = None
    num_sizes: int = 0
    size_unit: int = 1
    rep: int | None = None
    digits: tuple[int, ...] | None = None
    times: int | None = None
    grid_begin: int | None = None
    grid_end: int | None = None
    closing: int | None = None
    wording: str = ""

    def __post_init__(self) -> None:
        missing = [name for name in _PARTS[self.style] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"layout {self.style!r} needs the token ids {', '.join(missing)}")
        if len(set(self.code_ids)) != len(self.code_ids):
            raise ValueError("two image codes share a token id")

    # ---- one image ------------------------------------------------------------------------------

    def _tokens(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """(forced id or -1, raster cell or -1) of every token of an image, begin to end."""
        before, row_end, after = self._frame(height, width)
        row = [*([-1] * width), *row_end]
        forced = [*before, *(row * height), *after]
        numbers = iter(range(height * width))
        return forced, [next(numbers) if token < 0 else -1 for token in forced]

    def _frame(self, height: int, width: int) -> tuple[list[int], list[int], list[int]]:
        """The ids before an image's codes, after each of their rows, and after them all."""
        sides = [*self._side(height), *self._part("times"), *self._side(width)]
        before = [*self._part("begin"), *sides, *self._part("grid_begin")]
        after = [*self._part("grid_end"), *self._part("end")]
        after += [] if self.closing is None else [self.closing]
        return before, self._part("row_end"), after

    def _part(self, name: str) -> list[int]:
        """The token of that name, if this format has it."""
        return [getattr(self, name)] if name in _PARTS[self.style] else []

    def _side(self, side: int) -> list[int]:
        """A side of `side` codes as this format writes it."""
        if "digits" in _PARTS[self.style]:
            assert self.digits is not None
            return [self.digits[int(digit)] for digit in str(side)]
        if "first_size" not in _PARTS[self.style]:
            return []
        assert self.first_size is not None
        unit = self.size_unit
        if side % unit or side // unit >= self.num_sizes:
            raise ValueError(
                f"a side of {side} codes has no size token: this format writes multiples of {unit} "
                f"below {unit * self.num_sizes}"
            )
        return [self.first_size + side // unit]

    def image_length(self, height: int, width: int) -> int:
        """Tokens that an image occupies, separators and the rep token included."""
        before, row_end, after = self._frame(height, width)
        codes = height * (width + len(row_end))
        return (self.rep is not None) + len(before) + codes + len(after)

    def plan(self, height: int, width: int) -> DecodePlan:
        """What to emit after the prompt. Steps with forced_S == -1 may emit any of `code_ids`.

        The rep token, if any, belongs to the prompt here: it is the first forced step.
        """
        forced, cells = self._tokens(height, width)
        if self.rep is not None:
            forced, cells = [self.rep, *forced], [-1, *cells]
        return DecodePlan(torch.tensor(forced), torch.tensor(cells))

    def legal_ids(self, step: int, plan: DecodePlan) -> list[int]:
        """The ids that may be emitted at `step`: the forced one, or every code."""
        forced = int(plan.forced_S[step])
        return [forced] if forced >= 0 else list(self.code_ids)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Token ids back to codes; an id that is no code raises."""
        table = torch.full((max(self.code_ids) + 1,), -1)
        table[torch.tensor(self.code_ids)] = torch.arange(len(self.code_ids))
        ids = ids.cpu()
        codes = torch.where(ids < len(table), table[ids.clamp(max=len(table) - 1)], -1)
        if (codes < 0).any():
            raise ValueError("a token that is no image code stands where a code belongs")
        return codes

    def image_vocabulary(self) -> list[int]:
        """Every id that can occur inside an image, for a softmax restricted to images."""
        names = ("begin", "end", "row_end", "times", "grid_begin", "grid_end", "closing")
        separators = [getattr(self, name) for name in names]
        sizes = range(self.num_sizes) if self.first_size is not None else ()
        written = {(self.first_size or 0) + n for n in sizes} | {*(self.digits or ())}
        return sorted({*self.code_ids, *(t for t in separators if t is not None), *written})

    # ---- one sequence ---------------------------------------------------------------------------

    def sample(
        self,
        segments: Sequence[Text | Image],
        *,
        max_length: int | None = None,
        train_text: bool = False,
    ) -> Sample:
        """Lays text and images out as one sequence.

        Trained are all tokens of an image from begin to end, as in the released code's labels;
        text only with `train_text` (never the first token: nothing predicts it).
        Beyond `max_length` the end of the longest text is cut, never an image and never what closes
        a prompt.
        """
        ids: list[int] = []
        trained: list[bool] = []
        holding: list[Place] = []
        rep: list[Place] = []
        spanned: list[Place] = []
        num_images = 0
        for segment in self._truncate(segments, max_length):
            if isinstance(segment, Text):
                ids += segment.ids
                nowhere = [NOWHERE] * len(segment.ids)
                trained += [train_text] * len(nowhere)
                holding, rep, spanned = holding + nowhere, rep + nowhere, spanned + nowhere
                continue
            here = (num_images, -1)
            if self.rep is not None:
                ids.append(self.rep)
                trained.append(False)
                holding, rep, spanned = [*holding, NOWHERE], [*rep, here], [*spanned, here]
            tokens, cells = self._tokens(segment.height, segment.width)
            for token, cell in zip(tokens, cells, strict=True):
                ids.append(token if cell < 0 else self.token_of(segment.codes[cell]))
                holding.append(NOWHERE if cell < 0 else (num_images, cell))
            trained += [True] * len(tokens)
            rep += [NOWHERE] * len(tokens)
            spanned += [here] * len(tokens)
            num_images += 1
        if trained:
            trained[0] = False
        return Sample(ids, trained, _position_sets(holding, rep, spanned), num_images)

    def token_of(self, code: int) -> int:
        """The token id of an image code.

        Raises:
            ValueError: the codebook has no such code.
        """
        if not 0 <= code < len(self.code_ids):
            raise ValueError(
                f"image code {code} is outside the codebook of {len(self.code_ids)}: the data was "
                f"prepared with another image tokenizer"
            )
        return self.code_ids[code]

    def _truncate(
        self, segments: Sequence[Text | Image], max_length: int | None
    ) -> list[Text | Image]:
        kept = list(segments)
        if max_length is None:
            return kept
        fixed = sum(
            s.ending if isinstance(s, Text) else self.image_length(s.height, s.width) for s in kept
        )
        if fixed > max_length:
            raise ValueError(
                f"the images alone need {fixed} tokens but the model takes {max_length}: use a "
                f"smaller image size or a longer context"
            )
        lengths = [len(s.ids) - s.ending if isinstance(s, Text) else -1 for s in kept]
        excess = fixed + sum(n for n in lengths if n > 0) - max_length
        while excess > 0:
            longest = max(range(len(kept)), key=lengths.__getitem__)
            others = [n for i, n in enumerate(lengths) if i != longest]
            cut = min(excess, max(1, lengths[longest] - max([*others, 0])))
            lengths[longest] -= cut
            excess -= cut
        return [
            Text(s.ids[:n] + s.ids[len(s.ids) - s.ending :]) if isinstance(s, Text) else s
            for s, n in zip(kept, lengths, strict=True)
        ]

    # ---- many sequences -------------------------------------------------------------------------

    def collate(self, samples: Sequence[Sample], *, pad_to: int | None = None) -> Batch:
        """`batch.collate` with this family's padding."""
        return collate(samples, self.pad, pad_to=pad_to)

    # ---- storage --------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """JSON for pipeline.json: what this format has. Consecutive code ids are a range."""
        value = {
            part.name: getattr(self, part.name)
            for part in fields(self)
            if getattr(self, part.name) != part.default
        }
        first, count = self.code_ids[0], len(self.code_ids)
        consecutive = self.code_ids == tuple(range(first, first + count))
        value["code_ids"] = {"first": first, "count": count} if consecutive else list(self.code_ids)
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Layout":
        """The inverse of `to_json`."""
        parts, codes = dict(value), value["code_ids"]
        if isinstance(codes, Mapping):
            codes = range(codes["first"], codes["first"] + codes["count"])
        if value.get("digits") is not None:
            parts["digits"] = tuple(value["digits"])
        return Layout(**{**parts, "code_ids": tuple(codes)})


def _position_sets(
    holding: list[Place], rep: list[Place], spanned: list[Place]
) -> dict[str, list[Place]]:
    """From 'which image and cell does x_t hold' to the five position sets."""
    last = {image: cell for image, cell in holding if image >= 0}  # cells come in raster order
    hybnext = [*holding[1:], NOWHERE][: len(holding)]
    for image, cell in last.items():
        assert sum(image == i for i, _ in hybnext) == cell + 1, (
            "an image must have exactly h*w positions that predict a code: does text precede it?"
        )
    return {
        "hybnext": hybnext,
        "holding": holding,
        "rep": rep,
        "all": spanned,
        "last": [place if last.get(place[0]) == place[1] else NOWHERE for place in holding],
    }
