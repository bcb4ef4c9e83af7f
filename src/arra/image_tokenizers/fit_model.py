"""The model that a fit of an image tokenizer starts from."""

from pathlib import Path
from typing import Literal

from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.fit_config import ARCHITECTURE, TokenizerConfig, architecture_of
from arra.image_tokenizers.semantic import ENCODER, SemanticVQModel, semantic_config
from arra.image_tokenizers.teacher import Teacher, split_layers, store_teacher
from arra.image_tokenizers.vq import VQModel


def fitted_model(config: TokenizerConfig) -> VQModel:
    """What is fitted, on the CPU, in float32: new weights, or those of `config.init`.

    The codebook has no gradients: it follows averages of the latents (codebook.py), or stays.

    Raises:
        ValueError: `config.init` is no tokenizer of the VQ family, or is built otherwise than the
            config says.
    """
    if config.init is None:
        model = _new_model(config)
    else:
        model = published_model(config.init)
        if kind_of(model) != config.kind:
            raise ValueError(f"{config.init} is a {kind_of(model)} tokenizer: leave out --kind")
        if isinstance(model, SemanticVQModel):
            model.store_encoder(Path(config.out))
        given = architecture_of(model.config)
        wrong = [
            f"--{name.replace('_', '-')} {given[name]}, not {getattr(config, name)}"
            for name in ARCHITECTURE
            if getattr(config, name) not in (None, given[name])
        ]
        if wrong:
            raise ValueError(
                f"{config.init} has {', '.join(wrong)}: a tokenizer that is fitted further keeps "
                f"its architecture, so leave out these flags, or --init"
            )
        model.config.image_size = config.size
        model.requires_grad_(True)
    model.codes.weight.requires_grad_(False)
    return model.train()


def _new_model(config: TokenizerConfig) -> VQModel:
    if config.kind == "plain":
        return VQModel(config.model_config())
    assert config.teacher is not None
    spec, layers = split_layers(config.teacher)
    folder = Path(config.out) / ENCODER
    if not folder.exists():
        store_teacher(spec, folder)
    teacher = Teacher(folder, layers)
    if not layers:
        teacher.layers = teacher.spread()
    return SemanticVQModel(semantic_config(config.model_config(), teacher), teacher)


def kind_of(model: VQModel) -> Literal["plain", "semantic"]:
    """`TokenizerConfig.kind` of a tokenizer."""
    return "semantic" if isinstance(model, SemanticVQModel) else "plain"


def published_model(spec: str) -> VQModel:
    """The tokenizer of `spec` (see `load_image_tokenizer`), which can be fitted further.

    Raises:
        ValueError: it is of another kind.
    """
    model = load_image_tokenizer(spec)
    if not isinstance(model, VQModel):
        raise ValueError(
            f"--init {spec} is a {type(model).__name__}; only tokenizers of the VQ family can be "
            f"fitted further: a folder of `arra tokenizer train`, or a published file of taming's "
            f"layout or its descendants'"
        )
    return model
