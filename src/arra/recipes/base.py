"""ARRA-Base: a painter from random weights."""

from arra.config import AlignConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig


def base(data: str, out: str) -> TrainConfig:
    """From random weights: a LlamaGen of 111M parameters (--model.size L, XL, XXL or 3B).

    The dataset decides what prompts it: features of captions, where it was prepared with
    --text-encoder; else its classes, where it has class names (a folder of class folders); else
    captions as text. A LlamaGen reads no text, so in the last case it is a Llama of the same size
    with a tokenizer fitted on the captions (--model.architecture llama, which has no dropout and
    takes --model.max-length tokens).

    Batch 32, learning rate 1e-4, lambda 1 at layer 1: arXiv 2503.07334v4, implementation details of
    ARRA-Base. Constant rate, AdamW with betas 0.9 and 0.95 and decay 0.05, clip 1.0, dropout 0.1,
    prompt dropout 0.1: FoundationVision/LlamaGen ce98ec4, autoregressive/train/train_c2i.py. The
    moving average is ours (there it is an option). 300 epochs of ImageNet there, see the recipe
    `imagenet`; --steps here is a start, not a claim.
    """
    return TrainConfig(
        data_folder=data,
        out=out,
        recipe="base",
        steps=100_000,
        batch_size=32,
        dtype="auto",
        model=ModelConfig(
            architecture="auto",
            layers=12,
            hidden_size=768,
            heads=12,
            mlp_size=2048,
            dropout=0.1,
            max_length=1024,
            text_vocabulary=8192,
        ),
        align=AlignConfig(weight=1.0, layer=(1,)),
        data=DataConfig(prompt_dropout=0.1),
        optim=OptimConfig(
            lr=1e-4, schedule="constant", warmup=0.0, weight_decay=0.05, clip=1.0, ema=0.9999
        ),
    )
