"""A tiny prepared dataset, written through the format's own owner, without encoders."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from arra.data.manifest import FeatureInfo, Manifest, SplitInfo, TokenizerInfo, write_manifest
from arra.data.shard_file import Row, shard_name, write_shard
from arra.image_tokenizers.vq import VQConfig, VQModel

CODES, DIM, GRID = 16, 6, (2, 3)
TINY_VQ = VQConfig(
    image_size=8,
    base_channels=4,
    channel_multipliers=(1, 1),
    res_blocks=1,
    middle_attention=False,
    norm_groups=2,
    z_channels=4,
    codebook_size=CODES,
    codebook_dim=3,
)


def write_dataset(folder: Path, tokenizer: Path, fingerprint: str, *, features: bool) -> Path:
    """12 training and 4 validation images of random codes, with one feature or none."""
    generator = np.random.default_rng(0)
    dims = {"clip": DIM} if features else {}
    splits = {}
    for split, count in {"train": 12, "val": 4}.items():
        values = generator.normal(size=(count, DIM)).astype(np.float16)
        rows = [
            Row(
                id=f"{split}-{i}",
                sample=f"{split}-{i}",
                image_index=0,
                text=["a red circle", "two blue squares", "a line", ""][i % 4],
                codes_hw=generator.integers(0, CODES, GRID),
                features={"clip": values[i]} if features else {},
            )
            for i in range(count)
        ]
        splits[split] = SplitInfo(
            count, [write_shard(folder / shard_name(split, 0), rows, dims, {})]
        )
    unit = np.full(DIM, 0.1).tolist()
    info = FeatureInfo(DIM, "none", "made up", "class", [0.0] * DIM, unit, unit)
    reject_hash = hashlib.sha256(b"").hexdigest()
    manifest = Manifest(
        splits=splits,
        tokenizer=TokenizerInfo(str(tokenizer), fingerprint, CODES, 2),
        features={"clip": info} if features else {},
        size=8,
        crop="none",
        rejects_sha256=reject_hash,
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> VQModel:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vq")
    model = VQModel(TINY_VQ).eval()
    model.save_pretrained(folder)
    model.folder = folder
    return model


@pytest.fixture(scope="session")
def tiny_dataset(tiny_tokenizer: VQModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    fingerprint = tiny_tokenizer.fingerprint
    return write_dataset(folder, tiny_tokenizer.folder, fingerprint, features=True)


@pytest.fixture(scope="session")
def bare_dataset(tiny_tokenizer: VQModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows without features."""
    folder = tmp_path_factory.mktemp("bare")
    fingerprint = tiny_tokenizer.fingerprint
    return write_dataset(folder, tiny_tokenizer.folder, fingerprint, features=False)
