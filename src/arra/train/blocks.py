"""Decoder blocks that are computed again in the backward pass, and compiled.

Both change a block's `forward` alone: names of parameters, hooks (the taps, FSDP2's) and whatever
the family does around its blocks stay. Without gradients, as in painting, a block is as it was.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from arra.config import EngineConfig

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


def engage(blocks: Iterable[nn.Module], config: EngineConfig) -> None:
    """Makes each block's forward as the config says, in place."""
    if config.activation_checkpointing == "none" and not config.compile:
        return
    for block in blocks:
        block.forward = _training_forward(block.forward, config)


def _training_forward(plain: Callable[..., Any], config: EngineConfig) -> Callable[..., Any]:
    training = plain
    if config.activation_checkpointing == "full":
        training = functools.partial(checkpoint, plain, use_reentrant=False)
    elif config.activation_checkpointing == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        training = functools.partial(checkpoint, plain, use_reentrant=False, context_fn=contexts)
    if config.compile:
        training = torch.compile(training)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return training(*args, **kwargs) if torch.is_grad_enabled() else plain(*args, **kwargs)

    return forward


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
