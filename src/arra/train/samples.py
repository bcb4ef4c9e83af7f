"""Sample grids while training, from generators of their own: training randomness is untouched."""

from typing import TYPE_CHECKING

import torch

from arra.files import atomic_write

if TYPE_CHECKING:
    from arra.train.setup import Run


def paint_samples(run: "Run", step: int) -> None:
    """Writes samples/step-XXXXXXXX.png: the first prompts of the validation (or training) split."""
    from arra.data.images import grid
    from arra.generate.pipeline import Pipeline
    from arra.image_tokenizers import load_image_tokenizer

    source = run.validation or run.loader
    prompts = source.dataset.texts[: run.config.log.samples]
    height, width = (int(side) for side in source.dataset.grids[0])
    tokenizer = load_image_tokenizer(run.tokenizer_spec, device=str(run.device))
    run.step.eval()
    with torch.random.fork_rng():
        pipe = Pipeline(run.backbone, tokenizer, grid=(height, width))
        images = pipe(prompts, seeds=list(range(len(prompts))))
    run.step.train()
    columns = max(1, round(len(prompts) ** 0.5))
    with atomic_write(run.folder / "samples" / f"step-{step:08d}.png") as temporary:
        grid(images, columns, captions=prompts).save(temporary, format="PNG")
