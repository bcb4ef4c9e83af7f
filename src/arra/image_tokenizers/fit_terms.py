"""The terms of a tokenizer's loss, by name: what each compares, and its weight.

A term looks at one `Seen` and gives a scalar. One that is an `nn.Module` with parameters of its
own (a projector towards a teacher, say) is trained and checkpointed with the tokenizer; a finished
tokenizer holds nothing of it.

Legend: N images, D code width, H and W pixels or cells.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arra.image_tokenizers.feature_loss import FeatureLoss
from arra.image_tokenizers.fit_config import TokenizerConfig


@dataclass(frozen=True)
class Seen:
    """What the terms of one step look at.

    Attributes:
        x_NCHW: the images, floats -1..1.
        y_NCHW: their reconstructions.
        z_NDHW: latents of the encoder.
        e_NDHW: the codes nearest to them, without a gradient (the latents themselves before
            `quantize_from`).
        q_NDHW: what the decoder decodes: the values of e, the gradient of z.
    """

    x_NCHW: Tensor
    y_NCHW: Tensor
    z_NDHW: Tensor
    e_NDHW: Tensor
    q_NDHW: Tensor


@dataclass(frozen=True)
class Term:
    """One term.

    Attributes:
        weight: its factor in the loss.
        loss: gives the scalar. It runs under autocast where the fit is in bfloat16.
        of_pixels: whether it compares reconstructions with images. Those terms' gradient is what
            the discriminator's is weighed against.
    """

    weight: float
    loss: Callable[[Seen], Tensor]
    of_pixels: bool = False


def loss_terms(config: TokenizerConfig, device: torch.device) -> dict[str, Term]:
    """The terms that a config asks for; a weight of 0 leaves one out of the loss, not of the log.

    Raises:
        ValueError: the encoder of the feature loss cannot be had, or gives no layers.
    """
    terms = {
        "l1": Term(config.l1, absolute_error, of_pixels=True),
        "l2": Term(config.l2, squared_error, of_pixels=True),
        "commitment": Term(config.commitment, commitment),
    }
    if config.feature_encoder is not None:
        features = FeatureLoss(config.feature_encoder, device)
        terms["feature"] = Term(
            config.feature_weight, lambda seen: features(seen.y_NCHW, seen.x_NCHW), of_pixels=True
        )
    return terms


def absolute_error(seen: Seen) -> Tensor:
    """Mean |x - y|."""
    return (seen.y_NCHW - seen.x_NCHW).abs().mean()


def squared_error(seen: Seen) -> Tensor:
    """Mean (x - y)^2."""
    return (seen.y_NCHW - seen.x_NCHW).square().mean()


def commitment(seen: Seen) -> Tensor:
    """|z - e|^2, summed over the width, mean over cells (arXiv 1711.00937, eq. 3, last term)."""
    return (seen.z_NDHW - seen.e_NDHW).square().sum(dim=1).mean()
