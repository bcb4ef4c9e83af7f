"""--objective cca: the step that contrasts prompts, beside a frozen copy of what the run began as.

With an adapter there is no copy: the start is the same model, its adapter switched off.

Legend: B sequences, T tokens, D model width, S sequences with an image.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from arra.config import TrainConfig
from arra.contrastive import Contrastive
from arra.data.loader import MicroBatch
from arra.data.sequences import PLACEHOLDER
from arra.data.split import Split
from arra.models.adapted import Adapter
from arra.models.base import Backbone
from arra.models.loading import paints
from arra.objective import Terms
from arra.train.blocks import engage


class ContrastiveStep(nn.Module):
    """Backbone, objective and start as the one module that a parallel engine wraps.

    Args:
        start: the frozen copy, where `adapter` is None.
        adapter: what is switched off to have the start.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Contrastive,
        start: Backbone | None,
        adapter: Adapter | None,
    ) -> None:
        super().__init__()
        assert (start is None) != (adapter is None)
        self.model, self.objective = backbone.model, objective
        self.start = None if start is None else start.model
        self._backbone, self._start, self._adapter = backbone, start or backbone, adapter

    @property
    def more_blocks(self) -> Sequence[nn.Module]:
        """The blocks of the copy."""
        return () if self.start is None else [*self._start.blocks]

    @property
    def used(self) -> Sequence[nn.Parameter]:
        """Parameters of the copy that a forward pass needs: where the model's own train."""
        if self.start is None:
            return ()
        pairs = zip(self.start.parameters(), self.model.parameters(), strict=True)
        return [frozen for frozen, own in pairs if own.requires_grad]

    @property
    def frozen(self) -> Sequence[Tensor]:
        """All tensors of the copy."""
        return () if self.start is None else [*self.start.parameters(), *self.start.buffers()]

    def counts(self, micro: MicroBatch) -> dict[str, int]:
        """How many images of a micro-batch the loss is a mean over."""
        assert micro.contrast is not None
        return self.objective.counts(micro.contrast)

    def forward(self, micro: MicroBatch, factor: float) -> Terms:
        """The terms of one micro-batch; `factor` is of the alignment, which is not there."""
        batch, contrast = micro.batch, micro.contrast
        assert contrast is not None
        # What dropout leaves out is the same for both: at the start they are equal. The model that
        # trains comes first: FSDP2 notes at the first pass what has gradients, and a peft that is
        # switched off says that nothing of the adapter has.
        with _same_randomness(batch.ids_BT.device):
            last_BTD = self._backbone.last_hidden(batch.ids_BT, micro.text)
        return self.objective(
            last_BTD, self._backbone.head, batch, contrast, self._log_likelihood(micro)
        )

    @torch.no_grad()
    def _log_likelihood(self, micro: MicroBatch) -> Tensor:
        """(S,) of the images, by the start."""
        batch, start = micro.batch, self._start
        with self._switched_off():
            last_BTD = start.last_hidden(batch.ids_BT, micro.text)
            return self.objective.log_likelihood(last_BTD, start.head, batch)

    def _switched_off(self) -> AbstractContextManager[None]:
        return nullcontext() if self._adapter is None else self._adapter.wrapped.disable_adapter()


def contrastive_step(
    config: TrainConfig, backbone: Backbone, adapter: Adapter | None
) -> ContrastiveStep:
    """The step of a config, with a copy of the backbone as it is now, unless `adapter` can be
    switched off."""
    without_guidance(backbone)
    start = None
    if adapter is None:
        start = copy.deepcopy(backbone)
        start.model.requires_grad_(False)
        engage(start, config.engine)
    image = config.loss.vocab == "image"
    objective = Contrastive(
        beta=config.cca.beta,
        weight=config.cca.weight,
        vocabulary=backbone.layout.image_vocabulary() if image else None,
        chunk=config.loss.chunk,
    )
    return ContrastiveStep(backbone, objective, start, adapter)


def without_guidance(backbone: Backbone) -> None:
    """What it learns to paint with."""
    backbone.sampling = {**backbone.sampling, "cfg": 1.0}


def check_contrast(config: TrainConfig, splits: Sequence[Split]) -> None:
    """
    Raises:
        ValueError: there is no painter to start from, or there are no prompts to contrast.
    """
    if config.model_path is None or not paints(config.model_path):
        raise ValueError(
            "--objective cca goes on with a painter, and contrasts with what it was: name one with "
            "--model (a run, an export or a published painter)"
        )
    for split in splits:
        prompts: set[str] = set()
        for row in range(len(split)):
            prompts |= {split.texts[row].partition(PLACEHOLDER)[0].strip()} - {""}
            if len(prompts) > 1:
                break
        else:
            raise ValueError(
                f"--objective cca contrasts each image's prompt with another's, but split "
                f"{split.split!r} has {len(prompts) or 'no'} prompt{'s' * (not prompts)}: prepare "
                f"the data with captions or classes"
            )


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """Afterwards random numbers go on from where they were before."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        yield
