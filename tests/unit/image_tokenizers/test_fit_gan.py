"""The patch discriminator and the averaged weights of a fit, also through a resume."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.discriminator import PatchDiscriminator, hinge, push
from arra.image_tokenizers.fit import TokenizerConfig, fit_tokenizer
from arra.image_tokenizers.fit_run import Run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("noise")
    return folder


def config(source: Path, out: Path, **changes: object) -> TokenizerConfig:
    base = TokenizerConfig(
        source=str(source),
        out=str(out),
        size=16,
        crop_from=20,
        flip=True,
        steps=8,
        batch_size=4,
        codebook_size=16,
        codebook_dim=4,
        base_channels=8,
        norm_groups=4,
        gan_weight=0.5,
        gan_from=0.25,
        gan_layers=1,
        gan_channels=4,
        ema_decay=0.9,
        log_every=1,
        checkpoint_every=3,
        device="cpu",
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_fit_is_the_same_to_the_bit(pictures: Path, tmp_path: Path, dtype: str) -> None:
    once = fit_tokenizer(config(pictures, tmp_path / "once", dtype=dtype))
    twice = config(pictures, tmp_path / "twice", dtype=dtype)
    for stop in (1, 5):  # before the discriminator begins, and after
        fit_tokenizer(twice, stop_after=stop)
    fit_tokenizer(twice)
    files = sorted((once / "checkpoints").rglob("*.safetensors"))
    assert [f.stem for f in files] == ["discriminator", "ema", "model", "training"]
    for file in [*files, once / "model.safetensors"]:
        other = load_file(tmp_path / "twice" / file.relative_to(once))
        mine = load_file(file)
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items()), file
    assert all(t.dtype == torch.float32 for t in load_file(files[2]).values())


def test_the_average_is_what_is_saved(pictures: Path, tmp_path: Path) -> None:
    out = fit_tokenizer(config(pictures, tmp_path / "out", snapshot_every=8))
    saved = load_file(out / "model.safetensors")
    folder = next((out / "checkpoints").iterdir())
    average, last = (load_file(folder / f"{name}.safetensors") for name in ("ema", "model"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in average.items())
    assert any(not torch.equal(saved[name], tensor) for name, tensor in last.items())
    snapshot = load_image_tokenizer(out / "snapshots" / "step-00000008")
    assert snapshot.fingerprint == load_image_tokenizer(out).fingerprint


def test_the_discriminator_starts_late_and_a_weight_of_nothing_is_none(
    pictures: Path, tmp_path: Path
) -> None:
    out = fit_tokenizer(config(pictures, tmp_path / "out"))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert ["adversarial" in line for line in lines] == [False] * 2 + [True] * 6
    assert ["judged_right" in line for line in lines] == [False] * 2 + [True] * 6
    without = fit_tokenizer(config(pictures, tmp_path / "without", gan_weight=0.0))
    assert not list(without.rglob("discriminator.safetensors"))
    # until it starts, a fit with it is the fit without it
    early = [json.loads(s)["loss"] for s in (without / "log.jsonl").read_text().splitlines()[:2]]
    assert early == [line["loss"] for line in lines[:2]]


def test_the_push_is_as_strong_as_the_pull_at_the_last_layer() -> None:
    torch.manual_seed(0)
    last = torch.nn.Conv2d(4, 3, 3, padding=1)
    x_NCHW, h_NCHW = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 16, 16)
    discriminator = PatchDiscriminator(4, 2)
    for scale in (1.0, 100.0):  # of the logits: it must not matter
        with torch.no_grad():
            discriminator.layers[-1].weight.mul_(scale)
        y_NCHW = last(h_NCHW)
        rebuilt = (y_NCHW - x_NCHW).abs().mean()
        pushed, said = push(discriminator, y_NCHW, rebuilt, last.weight)
        (pull,) = torch.autograd.grad(rebuilt, last.weight, retain_graph=True)
        (found,) = torch.autograd.grad(pushed, last.weight, retain_graph=True)
        (plain,) = torch.autograd.grad(-discriminator(y_NCHW).mean(), last.weight)
        assert torch.allclose(found, said["gan_ratio"] * plain, rtol=1e-3, atol=1e-7)
        if scale > 1:  # where the 1e-4 beside the norm is nothing
            assert float(found.norm()) == pytest.approx(float(pull.norm()), rel=0.01)
        assert all(p.grad is None for p in discriminator.parameters())


def test_it_learns_to_tell_and_hinge_is_the_hinge() -> None:
    assert float(hinge(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0]))) == 0.75
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
    assert discriminator(real).shape == (8, 6, 6)
    for _ in range(30):
        loss = hinge(discriminator(real), discriminator(blurred))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3


def test_cuts_and_mirrors_depend_on_seed_and_step(pictures: Path, tmp_path: Path) -> None:
    pools = [Run(config(pictures, tmp_path / "x", seed=seed)).pool for seed in (0, 0, 1)]
    batches = [pool.batch(3, 4) for pool in pools]
    assert batches[0].shape == (4, 3, 16, 16)
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_refusals(tmp_path: Path) -> None:
    for changes, message in (
        ({"gan_layers": 3}, "--gan-layers 3 needs images of 24 pixels, not 16"),
        ({"ema_decay": 1.0}, "--ema-decay is 1.0"),
        ({"crop_from": 8}, "--crop-from 8 is less than --size 16"),
        ({"train_codes": False}, "--no-train-codes keeps the codes of a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, tmp_path / "out", **changes)
