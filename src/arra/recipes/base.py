"""ARRA-Base: a painter of GPT-B size from random weights."""

from arra.config import AlignConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig


def base(data: str, out: str) -> TrainConfig:
    """From random weights, 12 blocks of width 768 (the shape of LlamaGen's GPT-B, 111M).

    Batch 32, learning rate 1e-4: arXiv 2503.07334v4, implementation details of ARRA-Base. Constant
    rate, betas 0.9 and 0.95, decay 0.05, clip 1.0, prompt dropout 0.1: LlamaGen's training script.
    300 epochs of ImageNet there; --steps here is a start, not a claim.
    """
    return TrainConfig(
        data_folder=data,
        out=out,
        recipe="base",
        steps=100_000,
        batch_size=32,
        dtype="auto",
        model=ModelConfig(
            layers=12,
            hidden_size=768,
            heads=12,
            mlp_size=2048,
            max_length=1024,
            text_vocabulary=8192,
        ),
        align=AlignConfig(weight=1.0, layer=(1,)),
        data=DataConfig(prompt_dropout=0.1),
        optim=OptimConfig(
            lr=1e-4, schedule="constant", warmup=0.0, weight_decay=0.05, clip=1.0, ema=0.9999
        ),
    )
