"""LlamaGen: images from a class, or from the features of a caption (arXiv 2406.06525).

The id space: codes 0..K-1; then the classes with "no class" last, or the slots of a caption. An
image is nothing but its codes. Caption features come beside the ids (`TextFeatures`): the slots say
where each of them stands, and a dropped caption keeps the mask of its row.

Legend: B sequences, T tokens, D model width, K codes.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arra.config import ModelConfig
from arra.foreign import Foreign
from arra.layout import Layout
from arra.models.base import Backbone, Grid
from arra.models.decoding import Decoding, Packed
from arra.models.folders import empty_as, open_as
from arra.models.llamagen_convert import from_original, recognise
from arra.models.llamagen_decode import DecodeStep, NativeStep, decode_step
from arra.models.llamagen_layers import LlamaGenConfig
from arra.models.llamagen_model import LlamaGenForImageGeneration
from arra.models.quantized import SmallLinear
from arra.models.row_cache import RowCache
from arra.text_features import TextFeatures

CLASS_SAMPLING = {"cfg": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0}
"""FoundationVision/LlamaGen ce98ec4, autoregressive/sample/sample_c2i.py: for looking at. FID is
measured there with all codes (sample_c2i_ddp.py) and less guidance: 2.0 (B, L), 1.75 (XL, XXL),
1.65 (3B), GETTING_STARTED.md."""

TEXT_SAMPLING = {"cfg": 7.5, "temperature": 1.0, "top_k": 1000, "top_p": 1.0}
"""autoregressive/sample/sample_t2i.py and sample_t2i_ddp.py alike."""


class LlamaGen(Backbone):
    """LlamaGen's transformer, class- or text-conditional as its config says."""

    model: LlamaGenForImageGeneration
    text_tokenizer: None

    # ---- opening one ----------------------------------------------------------------------------

    @classmethod
    def open_model(cls, folder: Path) -> PreTrainedModel:
        return open_as(LlamaGenForImageGeneration, folder)

    @classmethod
    def empty_model(cls, folder: Path) -> PreTrainedModel:
        return empty_as(LlamaGenForImageGeneration, folder)

    @classmethod
    def assemble(
        cls, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase | None, layout: Layout
    ) -> Self:
        assert isinstance(model, LlamaGenForImageGeneration)
        return cls(model, layout)

    @classmethod
    def as_published(cls, folder: Path) -> Self:
        return cls._of(cls.open_model(folder))

    @classmethod
    def from_foreign(cls, foreign: Foreign) -> Backbone | None:
        if not recognise(foreign.tensors):
            return None
        return cls._of(from_original(foreign.tensors, foreign.beside, foreign.path.name))

    @classmethod
    def fresh(
        cls,
        config: ModelConfig,
        codebook_size: int,
        grid: Grid,
        class_names: Sequence[str],
        text_width: int,
        text_slots: int = 120,
    ) -> Backbone:
        """Text-conditional where the dataset has features of captions, else for its classes."""
        if not class_names and not text_width:
            raise ValueError(
                "a fresh LlamaGen is prompted by classes or by features of captions, and the "
                "dataset has neither: prepare class folders, or captions with --text-encoder, or "
                "use --model.architecture llama, which reads captions"
            )
        sizes = LlamaGenConfig(
            vocab_size=codebook_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            grid_height=grid[0],
            grid_width=grid[1],
            token_dropout=config.dropout,
            residual_dropout=config.dropout,
            mlp_dropout=config.dropout,
        )
        if text_width:
            sizes.condition, sizes.text_slots, sizes.caption_dim = "text", text_slots, text_width
        else:
            sizes.num_classes, sizes.id2label = len(class_names), dict(enumerate(class_names))
        return cls._of(LlamaGenForImageGeneration(sizes))

    @classmethod
    def _of(cls, model: PreTrainedModel) -> Self:
        """With the one format that the family has."""
        codes = model.config.vocab_size
        return cls.assemble(model, None, Layout("grid", tuple(range(codes)), pad=0))

    def __init__(self, model: LlamaGenForImageGeneration, layout: Layout) -> None:
        self.model, self.text_tokenizer, self.layout = model, None, layout
        self.head = model.output
        self._decode_step: NativeStep | DecodeStep | None = None
        config = model.config
        self._by_class = config.condition == "class"
        self.sampling = CLASS_SAMPLING if self._by_class else TEXT_SAMPLING
        self.text_slots = 0 if self._by_class else config.text_slots
        self.text_width = 0 if self._by_class else config.caption_dim
        self.text_encoder = None if self._by_class else "google/flan-t5-xl"  # language/README.md
        self.default_grid = (config.grid_height, config.grid_width)
        self._index_names()

    def _index_names(self) -> None:
        names = (self.model.config.id2label or {}) if self._by_class else {}
        self._class_of = {str(name): int(i) for i, name in names.items()}
        counts = Counter(map(_folded, self._class_of))
        self._class_of_folded = {
            _folded(name): i for name, i in self._class_of.items() if counts[_folded(name)] == 1
        }

    def name_classes(self, names: Sequence[str]) -> None:
        """Published checkpoints number their classes; the order of ImageNet's folders is theirs.

        Folders that are numbers already name classes of the model, and are left alone.
        """
        unnamed = all(name == str(i) for name, i in self._class_of.items())
        numbers = all(name.isdecimal() for name in names)
        if unnamed and not numbers and len(names) == len(self._class_of):
            self.model.config.id2label = dict(enumerate(names))
            self._index_names()

    # ---- what it is -----------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        config = self.model.config
        return config.prefix() + config.grid_height * config.grid_width

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def last_hidden(self, ids_BT: Tensor, text: TextFeatures | None = None) -> Tensor:
        return self.model.hidden(ids_BT, text=text)

    def reference(self, ids_BT: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        output = self.model(ids_BT, output_hidden_states=True)
        return output.logits, output.hidden_states

    def image_rows(self) -> list[int]:
        return []

    def image_tables(self) -> Sequence[nn.Module]:
        return (self.model.tok_embeddings, self.model.cls_embedding, self.model.output)

    # ---- prompts --------------------------------------------------------------------------------

    def opening(self) -> list[int]:
        return []

    def text_ids(self, text: str) -> list[int]:
        raise ValueError(
            f"LlamaGen reads no text but its condition, got {text[:40]!r}: leave out --data.text, "
            f"and text behind an image"
        )

    def null_condition(self, grid: Grid) -> list[int]:
        self._check_grid(grid)
        config = self.model.config
        if self._by_class:
            return [config.vocab_size + config.num_classes]
        return self._slots()

    def condition(self, text: str, grid: Grid) -> list[int]:
        """A class's id; for captions their slots, as the words come as features.

        Args:
            text: a class by its name, or by its number; "" = no class.

        Raises:
            ValueError: there is no such class, or the model paints another grid.
        """
        if not text or not self._by_class:
            return self.null_condition(grid)
        self._check_grid(grid)
        return [self.model.config.vocab_size + self._class(text)]

    def room(self, grid: Grid) -> int:
        self._check_grid(grid)
        return self.model.config.prefix()

    def _slots(self) -> list[int]:
        codes = self.model.config.vocab_size
        return list(range(codes, codes + self.text_slots))

    def _check_grid(self, grid: Grid) -> None:
        height, width = self.model.config.grid_height, self.model.config.grid_width
        if tuple(grid) != (height, width):
            raise ValueError(
                f"this LlamaGen paints {height}x{width} codes, and its positions fit no other "
                f"image, but {grid[0]}x{grid[1]} were asked for: prepare images of its size"
            )

    def _class(self, text: str) -> int:
        """Names come before numbers: folders of digits are named 0 to 9, perhaps not in order."""
        text = text.strip()
        if text in self._class_of:
            return self._class_of[text]
        if _folded(text) in self._class_of_folded:
            return self._class_of_folded[_folded(text)]
        count = self.model.config.num_classes
        if text.isdecimal() and int(text) < count:
            return int(text)
        near = difflib.get_close_matches(text, self._class_of, n=3, cutoff=0.5)
        near += [name for name in list(self._class_of)[:3] if name not in near][: 3 - len(near)]
        raise ValueError(
            f"there is no class {text[:60]!r}: this model paints {count} classes, by number (0 to "
            f"{count - 1}) or by name ({', '.join(map(repr, near))}, ...)"
        )

    # ---- painting -------------------------------------------------------------------------------

    def prefill(
        self, ids_BT: Tensor, cache: RowCache, rows_B: Tensor, text: TextFeatures | None = None
    ) -> Tensor:
        cache.begin(rows_B, ids_BT.shape[1])
        padding_BT = self.model.padding(ids_BT, text)
        if padding_BT is not None:
            cache.hide(rows_B, padding_BT)
        return self.model.hidden(ids_BT, text=text, cache=cache)

    def step(self, ids_BT: Tensor, positions_BT: Tensor, cache: RowCache) -> Tensor:
        branched = cache.seen_TT is not None  # the steps made for CPUs know rows of tokens alone
        if self._decode_step is not None and not branched and not torch.compiler.is_compiling():
            return self._decode_step(ids_BT, positions_BT, cache)
        cache.go_on(positions_BT)
        seen_B1TC = cache.seen(positions_BT)[:, None]
        return self.model.hidden(ids_BT, positions_BT, cache=cache, mask_B1TC=seen_B1TC)

    def decoding(self) -> Decoding:
        return _LlamaGenDecoding(self)


class _LlamaGenDecoding(Decoding):
    """With a step made of packed layers."""

    backbone: LlamaGen

    def packed(self, layers: Sequence[Packed]) -> None:
        by_layer: dict[nn.Module, Packed | SmallLinear]
        by_layer = {each.layer: each for each in layers}
        if layers:  # the head, where the blocks are smaller
            small = [m for m in self.backbone.blocks.modules() if isinstance(m, SmallLinear)]
            by_layer |= {each: each for each in small}
        self.backbone._decode_step = decode_step(self.backbone.model, by_layer)


def _folded(name: str) -> str:
    """As `arra prepare` writes a class folder's name as a text: without its underscores."""
    return " ".join(name.replace("_", " ").split()).casefold()


FAMILY = LlamaGen
