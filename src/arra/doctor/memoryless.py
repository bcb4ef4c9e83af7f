"""Tensors that have a shape and a type, but no memory."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import masking_utils


@contextmanager
def without_memory(fake: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """Tensors made here have a shape and a type, but no memory.

    Two functions must not do what they do with values. transformers asks position ids whether rows
    are packed, and assumes so where there are no values; ours never are. And PyTorch moves modules
    by swapping tensors, which it cannot with these.
    """
    fake = fake or FakeTensorMode(allow_non_fake_inputs=True)
    asks, moves = masking_utils.find_packed_sequence_indices, nn.Module._apply
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    nn.Module._apply = _applied  # type: ignore[method-assign]
    try:
        with fake, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # A copied tensor looks at its address.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield fake
    finally:
        masking_utils.find_packed_sequence_indices = asks
        nn.Module._apply = moves  # type: ignore[method-assign]


@torch.no_grad()
def _applied(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` in place."""
    for part in module.modules() if recurse else [module]:
        for parameter in part.parameters(recurse=False):
            parameter.data = fn(parameter.data)
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, fn(buffer))
    return module


def faker(fake: FakeTensorMode) -> Any:
    """A function that turns a tensor with values into one without."""

    def change(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else fake.from_tensor(tensor)

    return change
