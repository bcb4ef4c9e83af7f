"""CONDITION CONTRASTIVE ALIGNMENT: guidance distilled into the weights (arXiv 2410.09347).

Guidance compares what a model says with and without the prompt, at every token of every image it
paints. Here the comparison is made once, while training: an image is made more likely behind its
own prompt and less likely behind another image's. With r = log p(x|c) - log p_start(x|c), where p
is the model that trains and p_start the frozen one that it began as,

    L = 1 / max(lambda, 1) * mean over images of
        [ -log sigmoid(beta * r(x, own)) - lambda * log sigmoid(-beta * r(x, other's)) ]

(the division, the default numbers and what happens to images without a prompt are thu-ml/CCA's,
LlamaGen_finetune.py). log p(x|c) is the sum over an image's codes; what a format
dictates (begin, row ends, end) has no choice in it and does not count.

An image whose prompt is dropped has no other prompt: it is a positive twice, so that the model
without a prompt stays what it was. At the start r = 0 and every term is log 2.

Legend: B sequences, T tokens, N positions, D model width, V vocabulary, S sequences with an image:
E images behind their own prompts, then P of the same behind another's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arra.batch import Batch
from arra.cross_entropy import Kernel, position_losses
from arra.objective import Terms


@dataclass(frozen=True)
class Contrast:
    """Which sequences of a batch belong together.

    Attributes:
        times_E: how often each image counts behind its own prompt: 2 where there is none, else 1.
        pair_P: of the sequences after these, whose image each repeats.
    """

    times_E: Tensor
    pair_P: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Contrast":
        """The same with `change` applied to every tensor."""
        return Contrast(change(self.times_E), change(self.pair_P))


def partners(prompts: Sequence[str]) -> list[int]:
    """For each image of a batch, whose prompt it is contrasted with: the next one's, around the
    end, that is another prompt and not empty; -1 = there is none.

    An image without a prompt of its own has no partner either.
    """
    named = [i for i, prompt in enumerate(prompts) if prompt]
    found, count = [-1] * len(prompts), len(named)
    other = -1
    for place in reversed(range(2 * count - 1)):  # twice: the next one may be before it
        here, after = named[place % count], named[(place + 1) % count]
        if prompts[after] != prompts[here]:
            other = after
        found[here] = other  # with equal prompts, whose the next one has
    return found


class Contrastive(nn.Module):
    """The loss above; it has no parameters.

    Args:
        beta: how fast a likelihood ratio saturates its term.
        weight: lambda, of the images behind another's prompt.
        vocabulary: ids that the softmax runs over; None = all of them.
        chunk: positions whose logits exist at one time; T x V logits never do.
    """

    layers: tuple[int, ...] = ()  # nothing is tapped
    kernel: Kernel = "ours"
    vocabulary_V: Tensor | None

    def __init__(
        self,
        *,
        beta: float,
        weight: float,
        vocabulary: Sequence[int] | None = None,
        chunk: int = 1024,
    ) -> None:
        super().__init__()
        self.beta, self.weight, self.chunk = beta, weight, chunk
        ids = None if vocabulary is None else torch.tensor(sorted(vocabulary))
        self.register_buffer("vocabulary_V", ids, persistent=False)

    def counts(self, contrast: Contrast) -> dict[str, int]:
        """How many images the loss is a mean over; known before any forward pass."""
        return {"cca": len(contrast.times_E)}

    def log_likelihood(self, last_BTD: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """(S,) log p of each image's codes behind what stands before it, in nats.

        Args:
            last_BTD: the final hidden states (after the final norm), the input of `head`.
            head: hidden (N, D) -> logits (N, V).
        """
        predicting = batch.positions["hybnext"]
        losses_N = position_losses(
            last_BTD.flatten(0, 1).index_select(0, predicting.flat_N),
            batch.labels_BT.flatten().index_select(0, predicting.flat_N),
            head,
            vocabulary_V=self.vocabulary_V,
            chunk=self.chunk,
        )
        return -losses_N.new_zeros(batch.num_images).index_add(0, predicting.image_N, losses_N)

    def forward(
        self,
        last_BTD: Tensor,
        head: nn.Module,
        batch: Batch,
        contrast: Contrast,
        start_S: Tensor,
    ) -> Terms:
        """The loss of one micro-batch.

        Args:
            last_BTD, head: as in `log_likelihood`, of the model that trains.
            start_S: `log_likelihood` by the frozen start.
        """
        reward_S = self.beta * (self.log_likelihood(last_BTD, head, batch) - start_S)
        images, pairs = len(contrast.times_E), len(contrast.pair_P)
        own_E, other_P = reward_S.split([images, pairs])
        attracted = -(F.logsigmoid(own_E) * contrast.times_E).sum()
        repelled = -F.logsigmoid(-other_P).sum()
        loss = (attracted + self.weight * repelled) / max(self.weight, 1.0)
        with torch.no_grad():
            own_P = own_E[contrast.pair_P]
            metrics = {
                "reward_own": (own_P.sum(), pairs),
                "reward_other": (other_P.sum(), pairs),
                "ranked": ((own_P > other_P).sum(), pairs),
            }
        return Terms({"cca": loss}, self.counts(contrast), {"cca": 1.0}, metrics)
