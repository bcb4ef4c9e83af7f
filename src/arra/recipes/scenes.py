"""A painter of about 4M parameters, small enough for a CPU."""

from arra.config import AlignConfig, DataConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig


def scenes(data: str, out: str) -> TrainConfig:
    """From random weights on 64 codes an image: the demo's recipe, and one for small pictures.

    The block in the middle is aligned. Block 1 (the paper's) is block 1 of 32; of 4 blocks it is
    something else: experiments/demo holds what each depth gives. Features are centred: raw (the
    paper) class tokens of the bundled encoder score 0.87 against a constant vector. Query and key
    norms (Qwen3's blocks) and code rows that start from the codebook take a quarter off the loss
    of equal steps (experiments/demo); both arms have them.
    """
    return TrainConfig(
        data_folder=data,
        out=out,
        recipe="scenes",
        steps=1000,
        batch_size=32,
        dtype="auto",
        model=ModelConfig(
            architecture="qwen3",
            layers=4,
            hidden_size=256,
            heads=8,
            mlp_size=640,
            new_rows="codebook",
            attention="eager",
        ),
        align=AlignConfig(weight=1.0, layer=(2,), centred=True),
        data=DataConfig(prompt_dropout=0.1),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, ema=0.0),
        log=LogConfig(every=20),
    )
