"""What a backbone offers the objective, the loop and the painter. One file per family beside this.

Ids: a family numbers everything that can stand in a sequence, and `head` gives one logit for each
of the first V ids. Where a model has a table of its own for image codes (LlamaGen, Janus), the
codes are ids 0..K-1 and V = K; text or classes follow.

Legend: B sequences, T tokens, D model width, V logits.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arra.config import ModelConfig
from arra.foreign import Foreign
from arra.layout import Layout
from arra.models.row_cache import RowCache
from arra.text_features import TextFeatures

Grid = tuple[int, int]
"""(height, width) of an image in codes."""

DEFAULT_SAMPLING = {"cfg": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class Backbone(ABC):
    """A model that paints, seen through the one protocol that the rest of the package knows.

    Attributes:
        model: the ordinary Hugging Face model; saving it is the export.
        layout: the family's image format in its own token ids.
        text_tokenizer: the family's text tokenizer, image tokens included; None where prompts are
            classes or features.
        head: module, hidden (N, D) -> logits (N, V): all that the model does after its last norm.
        sampling: the settings that the family's authors paint with (their source at the constant).
        text_slots: positions that a caption's features fill (0: prompts are ids).
        text_width: of a caption's features, where prompts are such.
        text_encoder: what makes them for the family's published checkpoints, as a hub id.
        default_grid: of the images that the family's published checkpoints paint, if they agree.
        formats: name -> what it is, where the published checkpoints of a family differ in how they
            write images and prompts; to be said where a folder does not tell (`in_format`).
    """

    model: PreTrainedModel
    layout: Layout
    text_tokenizer: PreTrainedTokenizerBase | None
    head: nn.Module
    sampling: Mapping[str, float] = DEFAULT_SAMPLING
    text_slots: int = 0
    text_width: int = 0
    text_encoder: str | None = None
    default_grid: Grid | None = None
    formats: ClassVar[Mapping[str, str]] = {}

    # ---- opening one ----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def open_model(cls, folder: Path) -> PreTrainedModel:
        """The model in a standard folder, with its weights."""

    @classmethod
    @abstractmethod
    def empty_model(cls, folder: Path) -> PreTrainedModel:
        """The architecture that a folder's config.json describes, with fresh weights."""

    @classmethod
    @abstractmethod
    def assemble(
        cls, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase | None, layout: Layout
    ) -> Self:
        """The backbone of a model whose image format is known."""

    @classmethod
    @abstractmethod
    def as_published(cls, folder: Path) -> Self:
        """The backbone of a checkpoint that paints in its family's own format, as its authors
        publish it.

        Raises:
            ValueError: it only writes, a file is missing, or its format cannot be told.
        """

    @classmethod
    def in_format(cls, folder: Path, name: str) -> "Backbone":
        """`as_published`, in the format that the user names (one of `formats`).

        Raises:
            ValueError: there is no such format, or the folder contradicts it.
        """
        raise ValueError(f"{folder} can only be read in one format: leave out {name!r}")

    @classmethod
    def from_foreign(cls, foreign: Foreign) -> "Backbone | None":
        """The backbone in a checkpoint file of the family's own layout; None: another family's.

        Raises:
            ValueError: it is this family's, but tensors are missing or of other shapes.
        """
        return None

    @classmethod
    def fresh(
        cls,
        config: ModelConfig,
        codebook_size: int,
        grid: Grid,
        class_names: Sequence[str],
        text_width: int,
        text_slots: int,
    ) -> "Backbone":
        """A backbone with random weights.

        Args:
            codebook_size: K of the image tokenizer.
            grid: of the images that it will paint.
            class_names: of the dataset, if it has any.
            text_width: of the dataset's features of captions, 0 = it has none.
            text_slots: the most tokens that they have.

        Raises:
            ValueError: the family cannot be started from nothing, or needs what is not there.
        """
        raise ValueError(
            f"--model.architecture {config.architecture} cannot start from random weights: name a "
            f"checkpoint of it with --model"
        )

    def name_classes(self, names: Sequence[str]) -> None:  # noqa: B027  most paint no classes
        """Takes a dataset's class names over, where the model paints classes without names."""

    # ---- what it is -----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Backbone":
        """Moves the model in place."""
        nn.Module.to(self.model, device)
        return self

    @property
    @abstractmethod
    def hidden_size(self) -> int: ...

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The longest sequence the model takes, in tokens."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V: how many ids `head` gives a logit for."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks in order; block i's output is layer i + 1."""

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @abstractmethod
    def last_hidden(self, ids_BT: Tensor, text: TextFeatures | None = None) -> Tensor:
        """Final hidden states (B, T, D), after the final norm, of right-padded sequences.

        No attention mask: the model is causal and padding comes last, so no real token sees it.
        """

    def reference(self, ids_BT: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The model's own logits (B, T, V) and hidden states, for the probes at load."""
        output = self.model(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
        return output.logits, output.hidden_states

    @property
    def output_table(self) -> nn.Module:
        """The linear layer that `head` begins with."""
        return self.model.get_output_embeddings()  # type: ignore[return-value]

    def cannot_paint(self) -> str | None:
        """Why these weights cannot paint, if they show that they were never taught to."""
        return None

    def reset_image_head(self, codebook_KC: Tensor | None, seed: int) -> None:
        """Starts the output rows of the codes anew, in place.

        Args:
            codebook_KC: the image tokenizer's, to start them from; None: like the text rows.

        Raises:
            ValueError: the family cannot.
        """
        raise ValueError(
            f"--model.reset-image-head: {type(self.model).__name__} has no image rows to reset"
        )

    # ---- what trains beside an adapter ----------------------------------------------------------

    def image_rows(self) -> list[int]:
        """Ids of the tokens that exist for images: their rows of the input and output tables train
        beside an adapter. Empty where images have tables of their own."""
        layout = self.layout
        names = ("begin", "end", "row_end", "grid_begin", "grid_end", "rep")
        separators = {getattr(layout, name) for name in names} - {None}
        first = layout.first_size
        sizes = range(first, first + layout.num_sizes) if first is not None else ()
        return sorted({*layout.code_ids, *separators, *sizes})

    def image_tables(self) -> Sequence[nn.Module]:
        """Modules that exist for images alone (a table of codes, a head of their own): they train
        whole beside an adapter."""
        return ()

    # ---- prompts --------------------------------------------------------------------------------

    @abstractmethod
    def opening(self) -> list[int]:
        """The ids that open any sequence."""

    @abstractmethod
    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without the ids that open a sequence."""

    def wrapping(self, grid: Grid) -> tuple[list[int], list[int]]:
        """The ids before and after a prompt's text; some formats say the image's size in words."""
        return self.opening(), []

    def null_condition(self, grid: Grid) -> list[int]:
        """Ids of the empty prompt."""
        before, after = self.wrapping(grid)
        return [*before, *after]

    def without_prompt(self, condition: Sequence[int], grid: Grid) -> list[int]:
        """What stands in place of `condition` where its prompt is dropped: the empty prompt.

        A family that keeps the prompt's length (Janus) overrides this.
        """
        return self.null_condition(grid)

    def condition(self, text: str, grid: Grid) -> list[int]:
        """Ids that stand before the image of `text`; the end of a text that is too long is cut."""
        if not text:
            return self.null_condition(grid)
        before, after = self.wrapping(grid)
        room = self.room(grid) - len(before) - len(after)
        return [*before, *self.text_ids(text)[:room], *after]

    def room(self, grid: Grid) -> int:
        """How many ids may stand before an image of `grid`.

        Raises:
            ValueError: not even the empty prompt fits.
        """
        image = self.layout.image_length(*grid)
        before, after = self.wrapping(grid)
        if self.max_length - image < len(before) + len(after):
            raise ValueError(
                f"an image of {grid[0]}x{grid[1]} codes needs {image} tokens besides the prompt, "
                f"but the model takes {self.max_length} in all"
            )
        return self.max_length - image

    # ---- painting -------------------------------------------------------------------------------

    @property
    def has_cache(self) -> bool:
        """Whether the model keeps keys and values; one that does not is refused."""
        return True

    def new_cache(self, rows: int, columns: int) -> RowCache:
        """A key/value cache of fixed size: this many rows of up to so many tokens."""
        return RowCache(self.num_layers, rows, columns)

    @abstractmethod
    def prefill(
        self, ids_BT: Tensor, cache: RowCache, rows_B: Tensor, text: TextFeatures | None = None
    ) -> Tensor:
        """Begins rows of `cache`: their first T tokens; returns final hidden states (B, T, D).

        Args:
            ids_BT: padded on the right; what padding leaves in the cache is never seen.
            rows_B: which rows; `cache.nobody` for those that nobody wants.
            text: of the rows, where prompts are features.
        """

    @abstractmethod
    def step(self, ids_BT: Tensor, positions_BT: Tensor, cache: RowCache) -> Tensor:
        """Goes on with all rows of `cache`: T tokens each, at positions of their own, which may be
        behind, at or before what the row holds; returns final hidden states (B, T, D)."""

    def set_attention(self, name: str) -> None:
        """Chooses transformers' attention: "sdpa", "eager", or "auto" = as the model was opened.

        Raises:
            ValueError: the model has no such attention.
        """
        if name == "auto":
            return
        try:
            self._set_attention(name)
        except ValueError:
            raise ValueError(
                f"{type(self.model).__name__} has no attention {name!r} in transformers: leave out "
                f"--model.attention"
            ) from None

    def _set_attention(self, name: str) -> None:
        self.model.set_attn_implementation(name)

    def decoding(self) -> AbstractContextManager[None]:
        """Around steps of a few tokens a row: a family may set what makes them fast.

        It may change rounding, and nothing else; it may be entered again and again, and what it
        prepares goes with it.
        """
        return nullcontext()

    @contextmanager
    def tap(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collects the output of the given blocks (1 = the first) during a forward pass."""
        for layer in layers:
            if not 1 <= layer <= self.num_layers:
                raise ValueError(
                    f"align.layer {layer} does not exist: the model has blocks 1 to "
                    f"{self.num_layers}"
                )
        taps: dict[int, Tensor] = {}

        def hook_of(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                taps[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.blocks[layer - 1].register_forward_hook(hook_of(layer)) for layer in layers]
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()

    def save(self, folder: Path) -> None:
        """Writes `model/` and `tokenizer/` as standard Hugging Face folders (safetensors)."""
        self.model.save_pretrained(folder / "model")
        if self.text_tokenizer is not None:
            self.text_tokenizer.save_pretrained(folder / "tokenizer")
