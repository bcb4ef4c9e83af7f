"""What every model must pass at load, whatever its family: head, tap and cache agree with it.

Legend: B sequences, T tokens, C cache columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from arra.models.base import Backbone


@torch.no_grad()
def check(backbone: Backbone) -> None:
    """Probes head, tap and cache on a few random tokens; refuses by name what would train wrongly.

    Raises:
        ValueError: `head(hidden)` differs from the model's logits, a tap differs from
            `hidden_states`, or decoding with the cache differs from the full forward pass.
    """
    model = backbone.model
    if not has_values(model):
        return
    name = type(model).__name__
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, backbone.vocab_size, (2, 6), generator=generator).to(backbone.device)
    try:
        _check_cache(backbone, ids, name)
        # hidden_states[L] comes after the final norm, so block L is not compared.
        layers = range(1, backbone.num_layers)
        with _amplified_head_input(backbone) as seen, backbone.tap(layers) as taps:
            logits, hidden_states = backbone.reference(ids)
        _same(backbone.head(seen[-1]), logits, f"{name}: head(hidden) is not its logits")
        for layer in layers:
            complaint = f"{name}: the tap of block {layer} is not hidden_states[{layer}]"
            _same(taps[layer], hidden_states[layer], complaint)
    finally:
        model.train(was_training)


def has_values(model: nn.Module) -> bool:
    """False for a model that is only planned with (models/outline.py): no memory behind tensors."""
    return not isinstance(next(model.parameters()), FakeTensor)


@contextmanager
def _amplified_head_input(backbone: Backbone) -> Iterator[list[Tensor]]:
    """During a forward, scales what enters the output table so that logits reach about +-30.

    A soft-cap or a bias hides at the small logits of a fresh model and shows at large ones.
    """
    seen: list[Tensor] = []

    def amplify(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        largest = module.forward(args[0]).abs().amax().clamp(min=1e-6)
        seen.append(args[0] * (30.0 / largest))
        return (seen[-1], *args[1:])

    handle = backbone.output_table.register_forward_pre_hook(amplify)
    try:
        yield seen
    finally:
        handle.remove()


def _check_cache(backbone: Backbone, ids: Tensor, name: str) -> None:
    rows, length = ids.shape
    refused = f"{name} has no key/value cache that this package can use, so it could not paint"
    if not backbone.has_cache:
        raise ValueError(refused)
    try:
        cache = backbone.new_cache(length)
        mask = torch.ones(rows, length, dtype=torch.bool, device=ids.device)
        mask[:, -1] = False
        positions = torch.arange(length, device=ids.device).expand(rows, -1)
        backbone.step(ids[:, :-1], positions[:, :-1], mask, cache)
        mask[:, -1] = True
        last = backbone.step(ids[:, -1:], positions[:, -1:], mask, cache)
    except (TypeError, AttributeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{refused} ({type(error).__name__}: {error})") from None
    _same(last[:, 0], backbone.last_hidden(ids)[:, -1], f"{refused} (cached decoding differs)")


def _same(found: Tensor, expected: Tensor, complaint: str) -> None:
    scale = expected.float().abs().max().clamp(min=1e-6)
    off = float((found.float() - expected.float()).abs().max() / scale)
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    if not off <= tolerance:
        raise ValueError(
            f"{complaint} (relative difference {off:.2g}): this model is not supported"
        )
