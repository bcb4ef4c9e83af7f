"""Fitting with a teacher: a semantic tokenizer, and an ordinary one that is taught."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.fit import fit_tokenizer
from arra.image_tokenizers.fit_config import TokenizerConfig
from arra.image_tokenizers.fit_recipes import further
from arra.image_tokenizers.semantic import ENCODER, SemanticVQModel

TEACHER = "builtin:scenes-clip"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of two colours each."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(8):
        pixels = np.full((32, 32, 3), random.integers(0, 256, 3), np.uint8)
        pixels[:, random.integers(4, 28) :] = random.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture {i}")
    return folder


def config(source: Path, out: Path, **changes: object) -> TokenizerConfig:
    base = TokenizerConfig(
        source=str(source),
        out=str(out),
        size=32,
        steps=6,
        batch_size=4,
        codebook_size=16,
        codebook_dim=4,
        base_channels=8,
        norm_groups=4,
        quantize_from=0.2,
        revive_every=2,
        log_every=1,
        checkpoint_every=3,
        device="cpu",
        teacher=TEACHER,
    )
    return dataclasses.replace(base, **changes)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["plain", "semantic"])
def test_six_steps_are_three_and_three(kind: str, pictures: Path, tmp_path: Path) -> None:
    settings = {"kind": kind, "ema_decay": 0.9}
    once = fit_tokenizer(config(pictures, tmp_path / "once", **settings))
    twice = config(pictures, tmp_path / "twice", **settings)
    fit_tokenizer(twice, stop_after=3)
    fit_tokenizer(twice)
    assert (once / "model.safetensors").read_bytes() == (
        tmp_path / "twice" / "model.safetensors"
    ).read_bytes()
    checkpoint = tmp_path / "twice" / "checkpoints" / "step-00000006"
    heads = [name for name in load_file(checkpoint / "teacher.safetensors") if "head" in name]
    assert len(heads) == 6
    assert [line["teacher"] for line in log(tmp_path / "twice")] == [
        line["teacher"] for line in log(once)
    ]


def test_nothing_of_the_teacher_is_in_an_ordinary_tokenizer(pictures: Path, tmp_path: Path) -> None:
    taught = fit_tokenizer(config(pictures, tmp_path / "taught", steps=30, lr=1e-2))
    plain = fit_tokenizer(config(pictures, tmp_path / "plain", teacher=None, steps=2))
    assert {p.name for p in taught.iterdir()} == {p.name for p in plain.iterdir()}
    tensors = [load_file(folder / "model.safetensors") for folder in (taught, plain)]
    assert tensors[0].keys() == tensors[1].keys()
    assert "teacher" not in (taught / "config.json").read_text()
    lines = log(taught)
    assert lines[-1]["teacher"] < 0.7 * lines[0]["teacher"]


def test_a_weight_of_zero_is_the_fit_without_a_teacher(pictures: Path, tmp_path: Path) -> None:
    """The head is drawn after the model, so the model starts the same, and has no gradient."""
    zero = fit_tokenizer(config(pictures, tmp_path / "zero", teacher_weight=0.0))
    none = fit_tokenizer(config(pictures, tmp_path / "none", teacher=None))
    weights = [load_file(folder / "model.safetensors") for folder in (zero, none)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():  # the norm of all gradients is summed in another order
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=1e-5), name


def test_a_semantic_folder_holds_its_encoder(pictures: Path, tmp_path: Path) -> None:
    out = fit_tokenizer(
        config(pictures, tmp_path / "out", kind="semantic", steps=2, snapshot_every=1)
    )
    model = load_image_tokenizer(out)
    assert isinstance(model, SemanticVQModel)
    assert model.config.encoder_layers == [1, 2, 3, 4]
    assert (out / ENCODER / "model.safetensors").is_file()
    snapshot = load_image_tokenizer(out / "snapshots" / "step-00000002")
    assert snapshot.fingerprint == model.fingerprint
    named = fit_tokenizer(
        config(pictures, tmp_path / "named", kind="semantic", teacher=f"{TEACHER}@2", steps=1)
    )
    assert load_image_tokenizer(named).config.encoder_layers == [2]


def test_a_semantic_tokenizer_is_fitted_further(pictures: Path, tmp_path: Path) -> None:
    first = fit_tokenizer(config(pictures, tmp_path / "first", kind="semantic", steps=2))
    start = further(str(first), config(pictures, tmp_path / "second", teacher=None, steps=2))
    assert (start.kind, start.size) == ("semantic", 32)
    second = fit_tokenizer(start)
    before, after = load_image_tokenizer(first), load_image_tokenizer(second)
    assert after.config.encoder_sha256 == before.config.encoder_sha256
    assert after.fingerprint != before.fingerprint
    with pytest.raises(ValueError, match=r"is a semantic tokenizer: leave out --kind"):
        fit_tokenizer(dataclasses.replace(start, kind="plain", out=str(tmp_path / "third")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "semantic", "teacher": None}, "name it by --teacher"),
        ({"kind": "semantic", "teacher": "builtin:scenes-clip@9"}, "no block 9"),
        ({"teacher": "builtin:scenes-clip@class"}, "blocks of the encoder"),
        ({"teacher": "builtin:nothing"}, "no bundled encoder"),
    ],
)
def test_refusals(pictures: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_tokenizer(config(pictures, tmp_path / "out", **changes))


def test_half_precision_weights_give_the_codes_of_the_folder(
    pictures: Path, tmp_path: Path
) -> None:
    out = fit_tokenizer(
        config(pictures, tmp_path / "out", kind="semantic", save_dtype="float16", steps=2)
    )
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {t.dtype for t in load_file(out / ENCODER / "model.safetensors").values()} == {
        torch.float32
    }
    model = load_image_tokenizer(out)
    pixels_NCHW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert model.decode(model.encode(pixels_NCHW)).shape == pixels_NCHW.shape
