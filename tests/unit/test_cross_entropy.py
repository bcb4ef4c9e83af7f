"""The chunked cross entropy against PyTorch's own, whatever the head; and which kernel runs."""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arra import cross_entropy
from arra.cross_entropy import chunked_cross_entropy, kernel_for

N, D, V = 19, 12, 40


class CappedHead(nn.Module):
    """Scale, bias and soft-cap, as some language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(D, V, dtype=torch.float64)
        self.frozen = nn.Linear(V, V, dtype=torch.float64).requires_grad_(False)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return 5 * torch.tanh(self.frozen(self.table(hidden_ND)) * 0.7 / 5)


def material(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randint(0, V, (N,))


@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("cached", [1, 100, 2**20])
def test_any_head_and_any_piece(with_z: bool, cached: int, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CACHED", cached)
    hidden_ND, labels_N = material()
    head = CappedHead()
    ce, z = chunked_cross_entropy(hidden_ND, labels_N, head, with_z=with_z, chunk=8)
    logits_NV = head(hidden_ND)
    expected = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    expected_z = logits_NV.logsumexp(-1).square().sum()
    torch.testing.assert_close(ce, expected, rtol=1e-12, atol=0)
    inputs = [hidden_ND, *head.table.parameters()]
    found = torch.autograd.grad(0.3 * ce + 0.1 * z, inputs)
    total = 0.3 * expected + (0.1 * expected_z if with_z else 0)
    for a, b in zip(found, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        quiet, quiet_z = chunked_cross_entropy(hidden_ND, labels_N, head, with_z=with_z, chunk=8)
    torch.testing.assert_close(quiet, expected, rtol=1e-12, atol=0)
    if with_z:
        torch.testing.assert_close(z, expected_z, rtol=1e-12, atol=0)
        torch.testing.assert_close(quiet_z, expected_z, rtol=1e-12, atol=0)


def test_autocast_rounds_products_only() -> None:
    """In bfloat16 the loss is that of the rounded logits, with no rounding of its own."""
    hidden_ND, labels_N = material(torch.float32)
    head = nn.Linear(D, V)
    with torch.autocast("cpu", torch.bfloat16):
        ce, _ = chunked_cross_entropy(hidden_ND, labels_N, head)
        logits_NV = head(hidden_ND)
    expected = F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
    torch.testing.assert_close(ce, expected, rtol=1e-6, atol=0)
    found = torch.autograd.grad(ce, [hidden_ND, head.weight])
    for a, b in zip(found, torch.autograd.grad(expected, [hidden_ND, head.weight]), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(b.abs().max()))


def test_no_tensor_is_as_large_as_all_logits() -> None:
    hidden_ND, labels_N = torch.randn(64, 4, requires_grad=True), torch.zeros(64, dtype=torch.long)
    head = nn.Linear(4, 1000, bias=False)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                seen.append(result.numel())
            return result

    with Watch():
        ce, _ = chunked_cross_entropy(hidden_ND, labels_N, head, chunk=8)
        ce.backward()
    assert max(seen) == 8 * 1000


def test_a_frozen_head_and_no_positions() -> None:
    hidden_ND, labels_N = material(torch.float32)
    frozen = nn.Linear(D, V).requires_grad_(False)
    ce, _ = chunked_cross_entropy(hidden_ND, labels_N, frozen, chunk=8)
    ce.backward()
    assert hidden_ND.grad is not None
    assert frozen.weight.grad is None
    head = nn.Linear(D, V)
    none, _ = chunked_cross_entropy(hidden_ND[:0], labels_N[:0], head)
    none.backward()
    assert none == 0
    assert head.weight.grad.eq(0).all()


def test_which_kernel_runs(monkeypatch) -> None:
    gpu, cpu, plain = torch.device("cuda"), torch.device("cpu"), nn.Linear(2, 3)
    free = {"restricted": False, "with_z": False}
    monkeypatch.setattr(cross_entropy, "find_spec", lambda name: object())
    assert kernel_for("auto", plain, gpu, **free) == "liger"
    assert kernel_for("ours", plain, gpu, **free) == "ours"
    assert kernel_for("auto", plain, cpu, **free) == "ours"
    assert kernel_for("auto", nn.Sequential(plain), gpu, **free) == "ours"
    for name in free:
        assert kernel_for("auto", plain, gpu, **(free | {name: True})) == "ours"
    with pytest.raises(ValueError, match="the device is no GPU"):
        kernel_for("liger", plain, cpu, **free)
    with pytest.raises(ValueError, match=r"--loss\.z"):
        kernel_for("liger", plain, gpu, restricted=False, with_z=True)
    monkeypatch.setattr(cross_entropy, "find_spec", lambda name: None)
    assert kernel_for("auto", plain, gpu, **free) == "ours"
    with pytest.raises(ValueError, match="not installed"):
        kernel_for("liger", plain, gpu, **free)


LIGER = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def compare_kernels(device: str, count: int, bias: bool) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(count, 64, device=device, requires_grad=True)
    labels_N = torch.randint(0, 1000, (count,), device=device)
    head = nn.Linear(64, 1000, bias=bias, device=device)
    inputs = [hidden_ND, *head.parameters()]
    for half, tolerance in ((False, 1e-4), (True, 2e-2)):
        found = []
        for kernel in ("ours", "liger"):
            with torch.autocast(device, torch.bfloat16, enabled=half):
                ce, _ = chunked_cross_entropy(hidden_ND, labels_N, head, kernel=kernel)
            found.append([ce, *torch.autograd.grad(ce / count, inputs)])
        for ours, ligers in zip(*found, strict=True):
            scale = float(ours.detach().abs().max())
            torch.testing.assert_close(ours, ligers, rtol=0, atol=tolerance * scale)


@LIGER
@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_liger_equals_ours(bias: bool) -> None:
    compare_kernels("cuda", 700, bias)


@LIGER
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, set before Python starts")
@pytest.mark.parametrize("bias", [False, True])
def test_liger_equals_ours_as_triton_interprets_it(bias: bool) -> None:
    compare_kernels("cpu", 37, bias)
