"""What every model must pass at load, whatever its family: head, tap and cache agree with it.

Legend: B sequences, T tokens.
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
    """False where there is no memory behind tensors: for a model that is only planned with
    (models/outline.py), or that gets its weights later."""
    some = next(model.parameters())
    return not isinstance(some, FakeTensor) and not some.is_meta


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
        cache = backbone.new_cache(rows, length)
        numbers = torch.arange(rows, device=ids.device)
        backbone.prefill(ids, cache, numbers)
        # Each row goes back to a place of its own, and on from there.
        at = torch.tensor([length - 1, length - 3], device=ids.device)
        first = backbone.step(ids[numbers, at][:, None], at[:, None], cache)
        then = torch.stack([at, at + 1], 1).clamp(max=length - 1)
        later = backbone.step(ids.gather(1, then), then, cache)
    except (TypeError, AttributeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{refused} ({type(error).__name__}: {error})") from None
    expected = backbone.last_hidden(ids)
    complaint = f"{refused} (cached decoding differs)"
    _same(first[:, 0], expected[numbers, at], complaint)
    _same(later[1], expected[1, then[1]], complaint)


def _same(found: Tensor, expected: Tensor, complaint: str) -> None:
    scale = expected.float().abs().max().clamp(min=1e-6)
    off = float((found.float() - expected.float()).abs().max() / scale)
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    if not off <= tolerance:
        raise ValueError(
            f"{complaint} (relative difference {off:.2g}): this model is not supported"
        )
