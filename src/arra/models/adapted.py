"""A backbone with a LoRA adapter around it: put on through peft, kept as a peft folder, merged.

The frozen base is an ordinary folder; a record in the run's pipeline.json says where it is and
whether it is used in 4 bits. peft is imported when an adapter is used, not before: it is an extra.

Legend: B sequences, T tokens, V logits.
"""

import copy
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from arra.layout import Layout
from arra.models.base import Backbone
from arra.models.folders import cast_weights
from arra.models.four_bits import Compute, round_weights
from arra.models.probes import check, has_values
from arra.resolve import resolve_folder

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OWN_BASE = "base"
"""Folder of a run that holds its frozen base, where that lies nowhere else."""


@dataclass(frozen=True)
class BaseRecord:
    """Where the frozen weights of an adapted run are.

    Attributes:
        base: `base` for the run's own folder, else an absolute path or a hub id.
        four_bits: the type that its 4-bit linear layers compute in; None = they are not quantised.
    """

    base: str
    four_bits: Compute | None = None

    def folder(self, run: Path) -> Path:
        """The standard folder of the base.

        Raises:
            ValueError: it is no longer there.
        """
        if self.base == OWN_BASE:
            return run / OWN_BASE
        try:
            return resolve_folder(self.base, "model")
        except ValueError as error:
            raise ValueError(f"the base of the adapter in {run} is gone: {error}") from None

    def name(self, run: Path) -> str:
        """What an adapter_config.json calls it."""
        return str((run / OWN_BASE).resolve()) if self.base == OWN_BASE else self.base


@dataclass
class Adapter:
    """What of an adapted model moves.

    Attributes:
        tensors: the trained parameters under the names that a peft folder gives them.
        wrapped: peft's view of the backbone's own model, which it has changed in place.
        config: peft's LoraConfig.
    """

    tensors: Mapping[str, Tensor]
    wrapped: Any
    config: Any

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], source: Path) -> None:
        """Copies saved tensors in.

        Raises:
            ValueError: they are of another adapter.
        """
        wrong = sorted(self.tensors.keys() ^ weights.keys())
        wrong = wrong or [n for n, t in self.tensors.items() if t.shape != weights[n].shape]
        if wrong:
            raise ValueError(f"{source} does not fit the adapter: {wrong[0]} is missing or differs")
        for name, tensor in self.tensors.items():
            tensor.copy_(weights[name])

    def save_config(self, folder: Path, base_name: str) -> None:
        """Writes adapter_config.json, which makes `folder` one that peft opens."""
        config = copy.copy(self.config)
        config.inference_mode, config.base_model_name_or_path = True, base_name
        if config.task_type is None:
            kind = type(self.wrapped.get_base_model())
            library = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            config.auto_mapping = library
        config.save_pretrained(str(folder))


def put_on(backbone: Backbone, config: Any, seed: int = 0) -> tuple[Backbone, Adapter]:
    """Wraps a backbone's linear layers and tables through peft, in place; all else is frozen.

    Returns the backbone assembled anew, so that its head and blocks hold the wrapped modules.

    Args:
        config: peft's LoraConfig, its names relative to the backbone's model.
        seed: of the adapter's initial weights, whose product is zero.

    Raises:
        ValueError: the wrapped model does not compute what the bare one does.
    """
    peft = import_peft()
    bare_BTV = _probe(backbone) if has_values(backbone.model) else None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers for an attribute that newer versions call something else.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        config.base_model_name_or_path = None  # peft warns of a folder that has moved
        wrapped = peft.get_peft_model(backbone.model, config)
    adapted = _assembled_like(backbone, backbone.model)
    if bare_BTV is not None:
        _agree(_probe(adapted), bare_BTV, backbone, "its output with a fresh adapter")
    _rows_reach_the_head(adapted)
    check(adapted)
    state = wrapped.state_dict(keep_vars=True)
    tensors = peft.get_peft_model_state_dict(wrapped, state, save_embedding_layers=False)
    for tensor in tensors.values():
        tensor.data = tensor.data.float()  # peft leaves rows in the type of a bfloat16 table
    trained = {id(p) for p in wrapped.parameters() if p.requires_grad}
    assert config.inference_mode or trained == {id(t) for t in tensors.values()}, "names are off"
    return adapted, Adapter(tensors, wrapped, config)


def load_merged(
    family: type[Backbone],
    run: Path,
    record: BaseRecord,
    weights: Mapping[str, Tensor],
    checkpoint: Path,
    text_tokenizer: PreTrainedTokenizerBase | None,
    layout: Layout,
) -> Backbone:
    """The plain painter that a run's base and one of its adapters make together.

    A base that was trained on in 4 bits is taken as the adapter knew it: rounded to them.
    """
    peft = import_peft()
    backbone = family.assemble(family.open_model(record.folder(run)), text_tokenizer, layout)
    cast_weights(backbone.model, torch.float32)  # bfloat16 would round most of the adapter away
    if record.four_bits is not None:
        round_weights(backbone, record.four_bits)
    config = peft.LoraConfig.from_pretrained(str(checkpoint))
    adapted, adapter = put_on(backbone, config)
    adapter.load(weights, checkpoint)
    adapted.model.eval()
    before_BTV = _probe(adapted)
    plain = _assembled_like(backbone, adapter.wrapped.merge_and_unload())
    _agree(_probe(plain), before_BTV, plain, "its output after the adapter was merged")
    return plain


def task_type(model: PreTrainedModel) -> str | None:
    """peft's name for what the model is; it has one for causal language models only."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    return "CAUSAL_LM" if known is type(model) else None


def import_peft() -> Any:
    """The library peft.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("adapters need the library peft: pip install 'arra[peft]'")
    import peft

    return peft


def _assembled_like(backbone: Backbone, model: PreTrainedModel) -> Backbone:
    fresh = type(backbone).assemble(model, backbone.text_tokenizer, backbone.layout)
    fresh.sampling, fresh.default_grid = backbone.sampling, backbone.default_grid
    return fresh


@torch.no_grad()
def _probe(backbone: Backbone) -> Tensor:
    """Logits (B, T, V) of a few tokens, those of images among them."""
    was_training = backbone.model.training
    backbone.model.eval()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, backbone.vocab_size, (2, 6), generator=generator)
    codes_T = torch.tensor(backbone.layout.code_ids[:6])
    ids_BT[1, : len(codes_T)] = codes_T
    logits_BTV = backbone.head(backbone.last_hidden(ids_BT.to(backbone.device)))
    backbone.model.train(was_training)
    return logits_BTV


def _agree(found: Tensor, expected: Tensor, backbone: Backbone, what: str) -> None:
    scale = expected.float().abs().max().clamp(min=1e-6)
    off = float((found.float() - expected.float()).abs().max() / scale)
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    if not off <= tolerance:
        raise ValueError(
            f"{type(backbone.model).__name__} cannot carry an adapter: {what} differs by {off:.2g} "
            f"(peft drops the bias of an output table, for one); train it whole, without --lora"
        )


def _rows_reach_the_head(backbone: Backbone) -> None:
    table: nn.Module = backbone.output_table
    names = [name for name, _ in table.named_parameters()]
    if backbone.image_rows() and not any("trainable_tokens" in name for name in names):
        raise ValueError(
            f"{type(backbone.model).__name__}: peft trains the image rows of the input table, but "
            f"not of the output table: train it whole, without --lora"
        )
