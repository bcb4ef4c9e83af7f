"""ARRA: a language model that can only write learns to paint."""

from arra.config import (
    AlignConfig,
    DataConfig,
    EngineConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)


def llm(data: str, out: str) -> TrainConfig:
    """Grows the causal language model given as --model by image tokens and trains all of it.

    Learning rate 2e-5, AdamW with decay 0.05 and betas 0.9 and 0.95, batch 6, z-loss 1e-5,
    lambda 1 at layer 1: arXiv 2503.07334v4, implementation details of ARRA. Warm-up and prompt
    dropout are ours; the released script has a constant rate and drops no prompts.
    """
    return TrainConfig(
        data_folder=data,
        out=out,
        recipe="llm",
        steps=10_000,
        batch_size=6,
        dtype="auto",
        engine=EngineConfig(activation_checkpointing="full"),
        align=AlignConfig(weight=1.0, layer=(1,)),
        loss=LossConfig(z=1e-5),
        data=DataConfig(prompt_dropout=0.1),
        optim=OptimConfig(lr=2e-5, schedule="constant", warmup=0.01, weight_decay=0.05, clip=4.0),
    )
