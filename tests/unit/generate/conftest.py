"""A tiny painter with its image tokenizer, in memory and as the folder that an export writes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arra.config import ModelConfig
from arra.image_tokenizers.vq import VQConfig, VQModel
from arra.models.base import Backbone
from arra.models.loading import PIPELINE, load_for_training, save_skeleton

CODES, GRID = 16, (2, 4)
CAPTIONS = ["a red circle", "two blue squares left of a line", "a large green triangle " * 3]


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    config = ModelConfig(layers=2, hidden_size=32, heads=2, mlp_size=64, text_vocabulary=280)
    made = load_for_training(
        None, config, codebook_KC=torch.zeros(CODES, 3), captions=CAPTIONS, seed=0
    )
    with torch.no_grad():
        made.model.get_output_embeddings().weight.mul_(20)
    return made


def tiny_vq(seed: int, codes: int = CODES) -> VQModel:
    torch.manual_seed(seed)
    config = VQConfig(
        image_size=16,
        base_channels=4,
        channel_multipliers=(1, 1),
        res_blocks=1,
        middle_attention=False,
        norm_groups=2,
        z_channels=4,
        codebook_size=codes,
        codebook_dim=3,
    )
    return VQModel(config).eval()


@pytest.fixture(scope="session")
def image_tokenizer() -> VQModel:
    return tiny_vq(0)


@pytest.fixture(scope="session")
def other_tokenizer() -> Callable[[int], VQModel]:
    """One with other weights and a codebook of the given size."""
    return lambda codes: tiny_vq(1, codes)


@pytest.fixture(scope="session")
def exported(
    backbone: Backbone, image_tokenizer: VQModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_skeleton(
        backbone,
        folder,
        grid=GRID,
        image_tokenizer="image_tokenizer",
        fingerprint=image_tokenizer.fingerprint,
        trained_vocabulary="all",
    )
    backbone.save(folder)
    image_tokenizer.save_pretrained(folder / "image_tokenizer")
    assert (folder / PIPELINE).is_file()
    return folder
