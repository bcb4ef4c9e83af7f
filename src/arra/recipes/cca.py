"""CCA: a painter learns to paint without guidance."""

from arra.config import AlignConfig, CcaConfig, DataConfig, OptimConfig, TrainConfig


def cca(data: str, out: str) -> TrainConfig:
    """Distils guidance into the painter given as --model: it then paints at cfg 1, for half.

    Condition contrastive alignment (arXiv 2410.09347, docs/cca.md), on the data that the painter
    was trained on. One epoch of ImageNet at 256 images a step, learning rate 1e-5, constant, AdamW
    with betas 0.9 and 0.95 and decay 0.05, clip 1, prompt dropout 0.1, beta 0.02, bfloat16:
    thu-ml/CCA 7d5a073, LlamaGen_finetune.py and its README. lambda is 1000 there for the models B,
    XL and XXL, 300 for L and 500 for 3B: it decides between clean and various pictures, try some.
    """
    return TrainConfig(
        data_folder=data,
        out=out,
        recipe="cca",
        objective="cca",
        steps=5000,
        batch_size=256,
        dtype="auto",
        align=AlignConfig(weight=0.0),
        cca=CcaConfig(beta=0.02, weight=1000.0),
        data=DataConfig(prompt_dropout=0.1),
        optim=OptimConfig(lr=1e-5, schedule="constant", warmup=0.0, weight_decay=0.05, clip=1.0),
    )
