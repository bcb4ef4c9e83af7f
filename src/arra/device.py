"""Which device a command computes on, and what it can do there."""

import torch


def pick_device(name: str) -> str:
    """A device that is there: `auto` = cuda if there is one, else cpu.

    Raises:
        ValueError: no such device, or none of its kind on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"--device {name} is no device: use auto, cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here, use cpu or auto")
    return name


def cpu_has_bfloat16() -> bool:
    """Whether bf16 products are native (AVX-512 BF16 or AMX) rather than emulated."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
