"""Sample grids while training, from generators of their own: training randomness is untouched."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from arra.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

    from arra.data.loader import Loader
    from arra.generate.captions import PromptFeatures
    from arra.train.setup import Run


def paint_samples(run: "Run", step: int) -> "Image.Image":
    """Paints the first prompts of the validation (or training) split, on all processes; process 0
    writes samples/step-XXXXXXXX.png."""
    from arra.data.images import grid
    from arra.data.views import common_grid
    from arra.generate.pipeline import Pipeline
    from arra.image_tokenizers import load_image_tokenizer

    source = run.validation or run.loader
    prompts = _prompts(source, run.config.log.samples)
    tokenizer = load_image_tokenizer(run.tokenizer_spec, device=str(run.world.device))
    run.step.eval()
    with torch.random.fork_rng(), run.engine.painting():
        pipe = Pipeline(
            run.backbone,
            tokenizer,
            grid=common_grid(source.dataset.first.grids),
            prompt_features=_stored(source),
        )
        images = pipe(prompts, seeds=list(range(len(prompts))))
    run.step.train()
    columns = max(1, round(len(prompts) ** 0.5))
    painted = grid(images, columns, captions=prompts)

    def write() -> None:
        with atomic_write(run.folder / "samples" / f"step-{step:08d}.png") as temporary:
            painted.save(temporary, format="PNG")

    run.world.on_main(write)
    return painted


def _prompts(source: "Loader", count: int) -> list[str]:
    """What training shows before an image: words alone end where the image begins."""
    from arra.data.sequences import PLACEHOLDER

    texts = source.dataset.first.texts[:count]
    return texts if source.captions else [text.partition(PLACEHOLDER)[0] for text in texts]


def _stored(source: "Loader") -> "PromptFeatures | None":
    """The features of the dataset's own captions: training opens no encoder."""
    column = source.captions
    if column is None:
        return None
    rows = {text: row for row, text in enumerate(source.dataset.first.texts)}

    def features_of(prompts: Sequence[str]) -> list[torch.Tensor]:
        return [torch.tensor(column[rows[prompt]]) for prompt in prompts]

    return features_of
