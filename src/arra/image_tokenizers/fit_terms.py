"""The terms of a tokenizer's loss, by name: what each compares, and its weight.

A term looks at one `Seen` and gives a scalar. One that is an `nn.Module` with parameters of its
own (a projector towards a teacher, say) is trained and checkpointed with the tokenizer; a finished
tokenizer holds nothing of it.

Legend: N images, D code width, C channels, H and W pixels or cells, h and w cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arra.image_tokenizers.feature_loss import FeatureLoss
from arra.image_tokenizers.fit_config import TokenizerConfig
from arra.image_tokenizers.semantic import SemanticVQModel
from arra.image_tokenizers.teacher import Teacher, TeacherLoss, split_layers
from arra.image_tokenizers.vq import VQModel
from arra.resolve import resolve_folder


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
        trunk_NChw: the decoder's features on the grid of codes.
        given: what the encoder was given: the images, or a semantic tokenizer's frozen features.
    """

    x_NCHW: Tensor
    y_NCHW: Tensor
    z_NDHW: Tensor
    e_NDHW: Tensor
    q_NDHW: Tensor
    trunk_NChw: Tensor
    given: Any


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


def loss_terms(config: TokenizerConfig, model: VQModel, device: torch.device) -> dict[str, Term]:
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
    if config.teacher is not None or isinstance(model, SemanticVQModel):
        terms["teacher"] = Term(config.teacher_weight, _taught(config, model))
    return terms


def _taught(config: TokenizerConfig, model: VQModel) -> "Taught":
    channels = model.config.levels()[-1]
    if isinstance(model, SemanticVQModel):
        return Taught(channels, model.config.encoder_dim, None)
    assert config.teacher is not None
    spec, layers = split_layers(config.teacher)
    teacher = Teacher(resolve_folder(spec, "encoder"), layers)
    return Taught(channels, teacher.dim, teacher)


class Taught(nn.Module):
    """1 - cos between a head on the decoder's first features and the teacher's deepest ones.

    Args:
        channels: of the decoder's features.
        dim: of the teacher's.
        teacher: None: the features that the tokenizer was given.
    """

    def __init__(self, channels: int, dim: int, teacher: Teacher | None) -> None:
        super().__init__()
        self.loss, self.teacher = TeacherLoss(channels, dim), teacher

    def forward(self, seen: Seen) -> Tensor:
        """The scalar of one step."""
        trunk_NChw = seen.trunk_NChw
        if self.teacher is None:
            return self.loss(trunk_NChw, seen.given[-1])
        rows, columns = trunk_NChw.shape[2:]
        return self.loss(trunk_NChw, self.teacher(seen.x_NCHW, (rows, columns))[-1])


def absolute_error(seen: Seen) -> Tensor:
    """Mean |x - y|."""
    return (seen.y_NCHW - seen.x_NCHW).abs().mean()


def squared_error(seen: Seen) -> Tensor:
    """Mean (x - y)^2."""
    return (seen.y_NCHW - seen.x_NCHW).square().mean()


def commitment(seen: Seen) -> Tensor:
    """|z - e|^2, summed over the width, mean over cells (arXiv 1711.00937, eq. 3, last term)."""
    return (seen.z_NDHW - seen.e_NDHW).square().sum(dim=1).mean()
