"""Next-token cross entropy from hidden states, without the N x V logits.

The positions go through the model's head a chunk at a time. A chunk's logits become its loss and at
once its gradient (softmax minus one-hot, written by hand), which the head's own backward takes to
the hidden states and the head's weights; then they are forgotten. So the only large things that
outlive the forward pass are a gradient as large as the hidden states and one as large as the head.

Legend: N positions, D model width, V vocabulary, R rows of a chunk that are worked on at a time.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Kernel = Literal["ours", "liger"]

CACHED = 2**20
"""Logits that a CPU works on at a time, so that they stay in its caches: softmax and gradient of
1,024 x 16,384 took 21 ms in such pieces and 61 ms as a whole (one core of an AMD EPYC 9004)."""


def chunked_cross_entropy(
    hidden_ND: Tensor,
    labels_N: Tensor,
    head: nn.Module,
    *,
    vocabulary_V: Tensor | None = None,
    with_z: bool = False,
    chunk: int = 1024,
    kernel: Kernel = "ours",
) -> tuple[Tensor, Tensor]:
    """Sums of -log p(label) and of log(Z)^2 over N positions.

    Matrix products run in the type that autocast asks for, the softmax in at least float32.

    Args:
        head: any module from (N, D) to (N, V).
        vocabulary_V: restricts the softmax to those ids, in ascending order.
        chunk: positions whose logits exist at one time; Liger chooses its own.
        kernel: as `kernel_for` says.

    Returns:
        (cross entropy, z): scalars of at least float32; z is 0 and carries no gradient unless
        `with_z`.
    """
    if kernel == "liger":
        return _liger(hidden_ND, labels_N, head), _no_sums(hidden_ND)[1]
    if not torch.is_grad_enabled():
        sums = _no_sums(hidden_ND)
        for part in _parts(len(hidden_ND), chunk):
            logits_RV, labels_R = _logits(hidden_ND[part], labels_N[part], head, vocabulary_V)
            sums += _turn_into_gradients(logits_RV, labels_R, with_z, [])
        return sums[0], sums[1]
    parameters = [p for p in head.parameters() if p.requires_grad]
    return _ChunkedCrossEntropy.apply(
        hidden_ND, labels_N, head, vocabulary_V, with_z, chunk, *parameters
    )


def position_losses(
    hidden_ND: Tensor,
    labels_N: Tensor,
    head: nn.Module,
    *,
    vocabulary_V: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """(N,) of -log p(label), of at least float32, for losses that are no plain sum of them.

    What is to be multiplied with each position is known in the backward pass only, so a chunk's
    logits are forgotten after the forward pass and computed again: one more product with the head
    than `chunked_cross_entropy`.

    Args:
        head, vocabulary_V, chunk: as there.
    """
    parts = [
        checkpoint(
            *(_losses_of, hidden_ND[part], labels_N[part], head, vocabulary_V),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for part in _parts(len(hidden_ND), chunk)
    ]
    return torch.cat([hidden_ND.new_zeros(0, dtype=wide(hidden_ND)), *parts])


def kernel_for(
    wanted: Literal["auto", "ours", "liger"],
    head: nn.Module,
    device: torch.device,
    *,
    restricted: bool,
    with_z: bool,
) -> Kernel:
    """Which kernel computes the loss: with "auto" Liger's, where it is installed and can.

    It can on CUDA, if the head is a plain linear layer, the softmax runs over all of its outputs
    and there is no z-loss (Liger's has no sum, and so no weight, of its own).

    Raises:
        ValueError: "liger" where it cannot.
    """
    obstacles = {
        "the device is no GPU": device.type != "cuda",
        "liger-kernel is not installed (pip install liger-kernel)": not find_spec("liger_kernel"),
        f"the model's head is a {type(head).__name__}, no plain linear layer": (
            type(head) is not nn.Linear
        ),
        "--loss.vocab image restricts the softmax": restricted,
        "--loss.z needs log(Z) apart": with_z,
    }
    found = [why for why, stands in obstacles.items() if stands]
    if wanted == "liger" and found:
        raise ValueError(f"--engine.cross-entropy liger: {found[0]}; leave the option out")
    return "ours" if wanted == "ours" or found else "liger"


def _liger(hidden_ND: Tensor, labels_N: Tensor, head: nn.Module) -> Tensor:
    """Liger's fused kernel (arXiv 2410.10989), the sum over positions; it reads the device twice a
    call."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    assert isinstance(head, nn.Linear)
    weights, ignored, z, smoothing, softcap, return_z = None, -100, 0.0, 0.0, None, False
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        *(hidden_ND, head.weight, labels_N, head.bias, weights, ignored, z, smoothing, "sum"),
        *(softcap, return_z, torch.float32),  # the last: in which weight gradients add up
    )
    return loss


def wide(tensor: Tensor) -> torch.dtype:
    """The type that losses are computed in: float32, whatever autocast does, or float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        labels_N: Tensor,
        head: nn.Module,
        vocabulary_V: Tensor | None,
        with_z: bool,
        chunk: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        terms = 2 if with_z else 1
        sums = _no_sums(hidden_ND)
        hidden_grads = [torch.empty_like(hidden_ND) for _ in range(terms)]
        totals: list[list[Tensor]] = [[] for _ in range(terms)]
        outgoing: list[Tensor] = []  # the gradients of a chunk's logits, one for each term
        for part in _parts(len(hidden_ND), chunk):
            with torch.enable_grad():
                hidden = hidden_ND[part].detach().requires_grad_()
                logits_RV, labels_R = _logits(hidden, labels_N[part], head, vocabulary_V)
            if not outgoing or len(outgoing[0]) != len(logits_RV):
                outgoing = [torch.empty_like(logits_RV.detach()) for _ in range(terms)]
            sums += _turn_into_gradients(logits_RV.detach(), labels_R, with_z, outgoing)
            for i, gradient_RV in enumerate(outgoing):
                hidden_grads[i][part], *grads = torch.autograd.grad(
                    logits_RV, [hidden, *parameters], gradient_RV, retain_graph=i + 1 < terms
                )
                totals[i] = _added(totals[i], grads)
        if not totals[0]:  # no position at all
            totals = [[torch.zeros_like(p) for p in parameters] for _ in range(terms)]
        ctx.terms, ctx.dtypes = terms, [p.dtype for p in parameters]
        ctx.save_for_backward(*hidden_grads, *(grad for total in totals for grad in total))
        ce_sum, z_sum = (each.clone() for each in sums)  # FSDP2 hangs hooks on them, not on views
        if not with_z:
            ctx.mark_non_differentiable(z_sum)
        return ce_sum, z_sum

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        saved, terms = ctx.saved_tensors, ctx.terms
        hidden_grad = _weighted(saved[:terms], outer[:terms])
        rest, each = saved[terms:], len(ctx.dtypes)
        grads = [
            _weighted(rest[j::each], outer[:terms]).to(dtype) for j, dtype in enumerate(ctx.dtypes)
        ]
        return (hidden_grad, None, None, None, None, None, *grads)


def _losses_of(
    hidden_RD: Tensor, labels_R: Tensor, head: nn.Module, vocabulary_V: Tensor | None
) -> Tensor:
    logits_RV, labels_R = _logits(hidden_RD, labels_R, head, vocabulary_V)
    return F.cross_entropy(logits_RV.to(wide(logits_RV)), labels_R, reduction="none")


def _logits(
    hidden_RD: Tensor, labels_R: Tensor, head: nn.Module, vocabulary_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits_RV = head(hidden_RD)
    if vocabulary_V is None:
        return logits_RV, labels_R
    return logits_RV.index_select(-1, vocabulary_V), torch.searchsorted(vocabulary_V, labels_R)


def _turn_into_gradients(
    logits_NV: Tensor, labels_N: Tensor, with_z: bool, outgoing: Sequence[Tensor]
) -> Tensor:
    """The sums (2,) of the cross entropy and of log(Z)^2; fills `outgoing` with their gradients.

    d(-log p_y) / d(logits) = p - onehot(y); d(log(Z)^2) / d(logits) = 2 log(Z) p.
    """
    sums = _no_sums(logits_NV)
    rows = max(1, CACHED // logits_NV.shape[1])
    if logits_NV.device.type != "cpu":
        rows = max(1, len(logits_NV))
    for part in _parts(len(logits_NV), rows):
        values_RV = logits_NV[part].to(wide(logits_NV), copy=True)
        labels_R1 = labels_N[part, None]
        top_R1 = values_RV.amax(-1, keepdim=True)
        label_R1 = values_RV.gather(-1, labels_R1)
        total_R1 = values_RV.sub_(top_R1).exp_().sum(-1, keepdim=True)
        log_z_R1 = total_R1.log() + top_R1
        sums[0] += (log_z_R1 - label_R1).sum()
        if with_z:
            sums[1] += log_z_R1.square().sum()
        if not outgoing:
            continue
        p_RV = values_RV.mul_(total_R1.reciprocal_())
        if with_z:
            outgoing[1][part] = p_RV * (2 * log_z_R1)
        p_RV.scatter_(-1, labels_R1, p_RV.gather(-1, labels_R1) - 1)
        outgoing[0][part] = p_RV
    return sums


def _no_sums(like: Tensor) -> Tensor:
    return torch.zeros(2, dtype=wide(like), device=like.device)


def _parts(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _added(totals: list[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of one more chunk added, in at least float32."""
    if not totals:
        return [grad.to(wide(grad)) for grad in grads]
    return [total.add_(grad) for total, grad in zip(totals, grads, strict=True)]


def _weighted(grads: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
    """Each term's gradient times what arrives at that term, added."""
    total = grads[0] * outer[0]
    for grad, factor in zip(grads[1:], outer[1:], strict=True):
        total.addcmul_(grad, factor)
    return total
