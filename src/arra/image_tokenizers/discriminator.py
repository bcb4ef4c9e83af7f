"""A patch discriminator that pushes reconstructions towards what real images look like close up.

Architecture, hinge loss and adaptive weight are those of VQGAN (arXiv 2012.09841, section 3.1,
eq. 6 and 7), as CompVis/taming-transformers 3ba01b2 (modules/losses/vqperceptual.py) and
FoundationVision/LlamaGen ce98ec4 (tokenizer_image/vq_loss.py) train theirs.

Legend: N images, C channels, H and W pixels, h and w patches.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST_WEIGHT = 1e4
"""Where the ratio of gradient norms is cut off, as in both of the above."""


class PatchDiscriminator(nn.Module):
    """Images (N, 3, H, W) to one logit a patch, (N, h, w): positive says real.

    4x4 convolutions, `layers` of them with stride 2 and then two without; widths double from
    `channels` up to eight times that. With 3 layers a logit sees 70 pixels a side, with 2 it sees
    34 (pix2pix, arXiv 1611.07004, appendix 6.1.2). Norms are over the batch at hand, without
    running statistics: it is never used outside of training.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for index, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if index < layers else 1
            parts.append(nn.Conv2d(before, after, 4, stride, 1, bias=False))
            parts.append(nn.BatchNorm2d(after, track_running_stats=False))
            parts.append(nn.LeakyReLU(0.2))
        parts.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.layers = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.layers(x_NCHW).squeeze(1)


def hinge(real_Nhw: Tensor, fake_Nhw: Tensor) -> Tensor:
    """The discriminator's loss: real logits above 1, others below -1 cost nothing."""
    return 0.5 * (F.relu(1 - real_Nhw.float()).mean() + F.relu(1 + fake_Nhw.float()).mean())


def push(
    discriminator: PatchDiscriminator, y_NCHW: Tensor, rebuilt: Tensor, last_layer: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """What the discriminator adds to the tokenizer's loss, before `--gan-weight`.

    Its gradient with respect to y is that of -mean(logits), times the ratio of two norms, both of
    gradients at the decoder's last layer: that of the reconstruction's loss over that of
    -mean(logits) (eq. 7). So the push is as strong as the pull to the pixels, whatever the scale of
    the logits. The discriminator's parameters get no gradient.

    Args:
        discriminator: in training mode.
        y_NCHW: reconstructions, with their graph, which is kept.
        rebuilt: the reconstruction's loss: the weighted terms that compare y with the images.
        last_layer: weight of the decoder's last convolution.

    Returns:
        A scalar to add to the loss (its value means nothing, its gradient does), and for the log
        `adversarial`, -mean(logits), and `gan_ratio`, the ratio of the norms.
    """
    adversarial = -discriminator(y_NCHW).float().mean()
    (push_NCHW,) = torch.autograd.grad(adversarial, y_NCHW)
    (pull,) = torch.autograd.grad(rebuilt, last_layer, retain_graph=True)
    (pushed,) = torch.autograd.grad(y_NCHW, last_layer, push_NCHW, retain_graph=True)
    ratio = (pull.norm() / (pushed.norm() + 1e-4)).clamp(0, LARGEST_WEIGHT)
    said = {"adversarial": float(adversarial.detach()), "gan_ratio": float(ratio)}
    return (ratio * push_NCHW * y_NCHW).sum(), said
