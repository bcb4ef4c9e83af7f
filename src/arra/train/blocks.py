"""Decoder blocks that are computed again in the backward pass, and compiled.

Both change a block's `forward` alone: names of parameters, hooks (the taps, FSDP2's) and whatever
the family does around its blocks stay. Without gradients nothing is computed again; `eagerly` is
for what needs no compiled blocks: painting and validation, whose shapes are others.
"""

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from arra.config import EngineConfig
from arra.models.base import Backbone

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""What selective checkpointing keeps: what costs most to compute again. All else is elementwise."""
VARIANTS = 64
"""Of a compiled block, at most: batches of one row, a first block whose input has no gradient, ...
Each is compiled once; torch's limit, from which on it would compile no more, is 8."""


def engage(backbone: Backbone, config: EngineConfig) -> None:
    """Makes each block's forward as the config says, in place.

    A block that the compiler cannot take whole is an error at the first step, not a slower run.
    """
    again: Any = functools.partial(checkpoint, use_reentrant=False)
    if config.activation_checkpointing == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        again = functools.partial(again, context_fn=contexts)
    if config.compile:
        _forget_collectors(backbone.model)
        torch._dynamo.config.recompile_limit = VARIANTS
    for block in backbone.blocks:
        forward = block.forward
        if config.activation_checkpointing != "none":
            forward = functools.partial(again, forward)
        if config.compile:
            forward = torch.compile(forward, fullgraph=True)
        block.forward = forward


def eagerly() -> AbstractContextManager[Any]:
    """Around forward passes for which no block is to be compiled anew."""
    return torch.compiler.set_stance("force_eager")


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _forget_collectors(model: PreTrainedModel) -> None:
    """Takes back the hooks that transformers leaves in a model that was asked for hidden states (by
    the probes at load): they read a ContextVar, which no compiler traces. They come back when a
    model is asked again."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook.__module__ == output_capturing.__name__:
                del module._forward_hooks[key]
        if isinstance(module, PreTrainedModel):
            vars(module)["_output_capturing_hooks_installed"] = False
