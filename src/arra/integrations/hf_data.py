"""A prepared dataset as `transformers.Trainer` reads one: a map-style dataset and its collator.

An item only says which sample is meant; the collator lays the sequences out, in the workers of the
Trainer's data loader if it has any.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from arra.data.loader import Drawn, Loader, MicroBatch
from arra.data.manifest import read_manifest
from arra.data.shards import open_dataset
from arra.models.base import Backbone
from arra.objective import Target

MICRO_BATCH = "micro_batch"
"""The one key of the inputs that the collator gives."""


@dataclass(frozen=True)
class Item:
    """A sample that a batch will hold."""

    loader: Loader
    drawn: Drawn


class PreparedImages(Dataset[Item]):
    """One split of a folder that `arra prepare` wrote, one item a sample.

    The order is the Trainer's own; `in_order` gives that of `arra train`. Which prompts are dropped
    is drawn by torch's generator, which the Trainer saves and restores. Views that `arra prepare
    --views` added are used in our order only.

    Args:
        folder: the prepared dataset.
        backbone: the model that it is laid out for.
        targets: what is aligned to, as the objective has it.
        split: "train" or "val".
        prompt_dropout: fraction of images whose prompt is dropped, for guidance (0.1 in LlamaGen).
        train_text: also train on the prompts.

    Raises:
        ValueError: the dataset, the model and the targets do not fit one another.
    """

    def __init__(
        self,
        folder: str,
        backbone: Backbone,
        targets: Sequence[Target] = (),
        *,
        split: str = "train",
        prompt_dropout: float = 0.0,
        train_text: bool = False,
    ) -> None:
        manifest = read_manifest(folder)
        codes = manifest.tokenizer.codebook_size
        if len(backbone.layout.code_ids) != codes:
            raise ValueError(
                f"the model paints with {len(backbone.layout.code_ids)} codes, {folder} has "
                f"{codes}: prepare it with the model's image tokenizer"
            )
        known = manifest.aligned()
        for target in targets:
            if target.name in known and target.dim != known[target.name].dim:
                raise ValueError(
                    f"feature {target.name!r} of {folder} has {known[target.name].dim} values: "
                    f"give its Target dim={known[target.name].dim}, not {target.dim}"
                )
        if len({target.centred for target in targets}) > 1:
            raise ValueError("either all targets are centred or none")
        self.manifest, self.targets, self.split = manifest, tuple(targets), split
        self.prompt_dropout, self.train_text = prompt_dropout, train_text
        self.rows = open_dataset(folder, split, features=[target.name for target in targets])
        self.backbone = backbone
        self.loader = self._loader(batch_size=1, seed=0)

    def __len__(self) -> int:
        return self.loader.num_samples

    def __getitem__(self, index: int) -> Item:
        dropped = bool(torch.rand(()) < self.prompt_dropout)
        return Item(self.loader, self.loader.sample(index, dropped))

    def batch(self, indices: Sequence[int]) -> MicroBatch:
        """These samples with their prompts, as evaluation sees them."""
        return self.loader.collate([self.loader.sample(index) for index in indices])

    def in_order(self, steps: int, batch_size: int, seed: int = 0) -> "RunInOrder":
        """The samples of a whole run in the order of `arra train`, a function of seed and step.

        The Trainer then needs train_sampling_strategy="sequential" and max_steps=steps.

        Args:
            steps: optimizer steps.
            batch_size: samples per optimizer step, of all processes and micro-batches together.
        """
        return RunInOrder(self._loader(batch_size, seed), steps)

    def _loader(self, batch_size: int, seed: int) -> Loader:
        return Loader(
            self.rows,
            self.backbone,
            batch_size=batch_size,
            seed=seed,
            prompt_dropout=self.prompt_dropout,
            train_text=self.train_text,
            centred=any(target.centred for target in self.targets),
        )


class RunInOrder(Dataset[Item]):
    """All samples of a run, one after the other: one epoch of it is the whole run."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self.loader, self.steps = loader, steps

    def __len__(self) -> int:
        return self.steps * self.loader.batch_size

    def __getitem__(self, position: int) -> Item:
        return Item(self.loader, self.loader.at(position))


def collate(items: Sequence[Item]) -> dict[str, MicroBatch]:
    """The Trainer's data collator: items of one dataset as one micro-batch."""
    return {MICRO_BATCH: items[0].loader.collate([item.drawn for item in items])}
