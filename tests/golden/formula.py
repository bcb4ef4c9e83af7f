"""Weights and inputs by formula, so that golden numbers need no files of weights.

Whoever recorded numbers from an original implementation filled its parameters with `fill`; the test
fills the same names again. The values depend on the name and the shape only.
"""

import hashlib
import math

import torch


def fill(name: str, shape: tuple[int, ...], scale: float = 0.1) -> torch.Tensor:
    """float32 values of about N(0, scale**2), the same on every machine.

    A counter goes through a 32-bit mixing function (integers only), then through Box-Muller in
    float64; norm weights (`*norm*.weight`, one axis) are 1 + that, as norms are in real models.
    """
    count = math.prod(shape)
    key = int.from_bytes(hashlib.sha256(f"{name}{tuple(shape)}".encode()).digest()[:4], "little")
    uniforms_2C = _mixed(torch.arange(2 * count, dtype=torch.int64) + key * 7919).view(2, count)
    radius = (-2.0 * uniforms_2C[0].log()).sqrt()
    normal = radius * (2.0 * math.pi * uniforms_2C[1]).cos()
    values = (scale * normal).float().view(shape)
    is_norm = len(shape) == 1 and "norm" in name and name.endswith("weight")
    return 1.0 + values if is_norm else values


def fill_all(module: torch.nn.Module, scale: float = 0.1) -> None:
    """Fills every floating tensor of a module's state dict in place."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(fill(name, tuple(tensor.shape), scale))


def ints(name: str, shape: tuple[int, ...], below: int) -> torch.Tensor:
    """int64 values in 0..below-1."""
    key = int.from_bytes(hashlib.sha256(f"{name}{tuple(shape)}".encode()).digest()[:4], "little")
    uniform = _mixed(torch.arange(math.prod(shape), dtype=torch.int64) + key * 7919)
    return (uniform * below).long().clamp(max=below - 1).view(shape)


def _mixed(counter: torch.Tensor) -> torch.Tensor:
    """Uniform float64 in (0, 1) from int64 counters: murmur3's 32-bit finalizer."""
    mask = 0xFFFFFFFF
    h = counter & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    h = h ^ (h >> 16)
    return (h.double() + 0.5) / 2.0**32
