"""Chameleon's vocabulary: which BPE ids are image codes, separators and sizes.

Image code k of Meta's VQGAN is the token IMGIMG + k's digits as letters (A = 0 ... J = 9) + Z:
code 102 is IMGIMGBACZ (facebookresearch/chameleon, chameleon/inference/vocab.py; transformers keeps
the same map in config.json). The ids are a permutation: code order is not id order.

Lumina-mGPT gives meaning to tokens that Chameleon reserved (Alpha-VLLM/Lumina-mGPT,
lumina_mgpt/data/item_processor.py): a row's end, and a side of n units of 32 pixels, 2 codes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from arra.layout import Layout

BOS, PAD, BEGIN, END = "<s>", "<pad>", "<racm3:break>", "<eoss>"
TURN = "<reserved08706>"
"""Ends a turn: transformers' separator, Lumina-mGPT's `sep_token`, id 8710."""
ROW_END = "<reserved08799>"
SIZE = "<reserved{:05d}>"
FIRST_SIZE = 8800
LARGEST_SIZE = 128
"""Units: 4096 pixels. The largest published side is 64 units (1024 x 1024 pixels at 4 to 1)."""
CODES_PER_UNIT = 2

_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokens that a sequence with images is made of."""

    code_ids: tuple[int, ...] = field(repr=False)  # of image codes 0, 1, ...
    bos: int
    pad: int
    begin: int
    end: int
    turn: int
    row_end: int | None
    first_size: int | None
    num_sizes: int

    @staticmethod
    def of(names: Mapping[str, int], source: str) -> "Vocabulary":
        """Reads the map from token to id that config.json calls `vocabulary_map`.

        Raises:
            ValueError: a token that images need is missing; `source` is named.
        """
        missing = [name for name in (BOS, PAD, BEGIN, END, TURN) if name not in names]
        if missing:
            raise ValueError(f"{source}: the vocabulary map has no token {missing[0]}")
        first = names.get(SIZE.format(FIRST_SIZE))
        return Vocabulary(
            _code_ids(names, source),
            bos=names[BOS],
            pad=names[PAD],
            begin=names[BEGIN],
            end=names[END],
            turn=names[TURN],
            row_end=names.get(ROW_END),
            first_size=first,
            num_sizes=0 if first is None else _count_sizes(names, first),
        )

    @property
    def has_sizes(self) -> bool:
        """Whether the format with sizes and row ends can be written."""
        return self.row_end is not None and self.num_sizes > 1

    def plain(self) -> Layout:
        """Chameleon's and Anole's format: begin, codes, end."""
        return Layout("chameleon", self.code_ids, self.pad, begin=self.begin, end=self.end)

    def sized(self, wording: str) -> Layout:
        """Lumina-mGPT's format; its labels go on to the token that ends the turn."""
        return Layout(
            "lumina",
            self.code_ids,
            self.pad,
            begin=self.begin,
            end=self.end,
            row_end=self.row_end,
            first_size=self.first_size,
            num_sizes=self.num_sizes,
            size_unit=CODES_PER_UNIT,
            closing=self.turn,
            wording=wording,
        )


def _code_ids(names: Mapping[str, int], source: str) -> tuple[int, ...]:
    id_of: dict[int, int] = {}
    for name, token in names.items():
        if not name.startswith("IMGIMG"):
            continue
        match = _CODE.fullmatch(name)
        if match is None:
            raise ValueError(f"{source}: the vocabulary map has the unknown image token {name}")
        id_of[int(match[1].translate(_DIGITS))] = token
    if not id_of:
        raise ValueError(f"{source}: the vocabulary map has no image tokens (IMGIMG...)")
    if set(id_of) != set(range(len(id_of))):
        lost = next(code for code in range(len(id_of)) if code not in id_of)
        raise ValueError(f"{source}: the vocabulary map has no token for image code {lost}")
    return tuple(id_of[code] for code in range(len(id_of)))


def _count_sizes(names: Mapping[str, int], first: int) -> int:
    """How many consecutive ids are size tokens, that of 0 units included."""
    for units in range(LARGEST_SIZE + 1):
        if names.get(SIZE.format(FIRST_SIZE + units)) != first + units:
            return units
    return LARGEST_SIZE + 1
