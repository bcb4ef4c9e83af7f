"""What one trained arm answers: pictures for prompts, and its loss on each held-out image.

Runs as a process of its own (`python -m arra.study.worker JOB.json`), so that two arms answer side
by side. Every task's answer is one folder or file, written whole: a task that has its answer is
skipped, so the same job again goes on where it was.

Legend: B samples of a batch, N predicted positions, D model width, V vocabulary.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from arra.data.loader import Loader
from arra.data.shards import open_dataset
from arra.files import atomic_dir, read_json, write_json
from arra.generate.pipeline import Pipeline
from arra.models import Backbone
from arra.models.loading import PIPELINE, load_checkpoint

LOSS_BATCH = 32


@dataclass(frozen=True)
class Painting:
    """Prompt i is painted from seed i by the weights of `checkpoint` into the folder `out`."""

    checkpoint: str
    prompts: list[str]
    cfg: float
    out: str


@dataclass(frozen=True)
class Losses:
    """Mean next-token loss of each of the first `limit` samples of a split, into the file `out`."""

    checkpoint: str
    data: str
    split: str
    limit: int
    out: str


@dataclass(frozen=True)
class WorkerJob:
    """Everything that one arm is asked."""

    run: str
    slots: int
    device: str
    paintings: list[Painting]
    losses: list[Losses]

    @property
    def tasks(self) -> list[Painting | Losses]:
        """Losses first: they need no painting and end soonest."""
        return [*self.losses, *self.paintings]

    def pending(self) -> int:
        """Tasks without an answer."""
        return sum(not Path(task.out).exists() for task in self.tasks)

    def write(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @staticmethod
    def read(path: Path) -> "WorkerJob":
        value = read_json(path)
        paintings = [Painting(**task) for task in value.pop("paintings")]
        losses = [Losses(**task) for task in value.pop("losses")]
        return WorkerJob(paintings=paintings, losses=losses, **value)


def answer(job: WorkerJob) -> None:
    """Does every task of `job` that has no answer yet."""
    described = read_json(Path(job.run) / PIPELINE)
    pipe = Pipeline.from_pretrained(job.run, job.device)
    pipe.slots = job.slots
    backbone, loaded = pipe.backbone, None
    for task in job.tasks:
        if Path(task.out).exists():
            continue
        if task.checkpoint != loaded:
            # Averaged weights where a run keeps them, as `load_model` does for the newest one.
            backbone = load_checkpoint(
                Path(job.run), Path(job.run) / "checkpoints" / task.checkpoint
            )
            backbone.to(job.device).model.eval()
            pipe.backbone, loaded = backbone, task.checkpoint
        if isinstance(task, Losses):
            only = described["trained_vocabulary"] == "image"
            write_json(task.out, list(_losses(backbone, task, only)))
        else:
            _paint(pipe, task)
        print(f"done {task.out}", flush=True)


def _paint(pipe: Pipeline, task: Painting) -> None:
    seeds = list(range(len(task.prompts)))
    images = pipe(task.prompts, seeds=seeds, cfg=task.cfg)
    with atomic_dir(task.out) as folder:
        lines = []
        for seed, (image, prompt) in enumerate(zip(images, task.prompts, strict=True)):
            name = f"{seed:05d}.png"
            image.save(folder / name)
            lines.append(json.dumps({"file": name, "prompt": prompt, "seed": seed}) + "\n")
        (folder / "images.jsonl").write_text("".join(lines), encoding="utf-8")


@torch.inference_mode()
def _losses(backbone: Backbone, task: Losses, only_images: bool) -> Iterator[float]:
    """Mean cross entropy of the trained positions of each sample, nats, prompts kept.

    The softmax runs over what the arm was trained on: the whole vocabulary, or `only_images`.
    """
    outside_V = torch.full((backbone.vocab_size,), only_images, device=backbone.device)
    outside_V[backbone.layout.image_vocabulary()] = False
    dataset = open_dataset(task.data, task.split, features=())
    loader = Loader(dataset, backbone, batch_size=LOSS_BATCH, seed=0)
    for micro in loader.in_order(task.limit):
        micro = micro.to(backbone.device)
        batch = micro.batch
        rows, length = batch.ids_BT.shape
        hidden_BTD = backbone.last_hidden(batch.ids_BT, micro.text)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.trained_N]
        logits_NV = backbone.head(hidden_ND).float().masked_fill(outside_V, -torch.inf)
        loss_N = torch.nn.functional.cross_entropy(logits_NV, batch.labels_N, reduction="none")
        loss_N = loss_N.double()
        row_N = batch.trained_N // length
        count_B = torch.bincount(row_N, minlength=rows)
        sum_B = torch.zeros(rows, dtype=torch.float64, device=loss_N.device)
        yield from (sum_B.index_add(0, row_N, loss_N) / count_B).tolist()


if __name__ == "__main__":
    answer(WorkerJob.read(Path(sys.argv[1])))
