"""Fitting a tokenizer: resuming, dead codes, bad images, refusals."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from arra.data.sources import open_source
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.codebook import CodebookAverage
from arra.image_tokenizers.fit import TokenizerConfig, fit_tokenizer
from arra.image_tokenizers.fit_config import schedule
from arra.image_tokenizers.pixels import PixelPool
from arra.image_tokenizers.vq import VQConfig, VQModel


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of two colours each, and one file that is not a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = np.full((16, 16, 3), random.integers(0, 256, 3), np.uint8)
        pixels[:, random.integers(2, 14) :] = random.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture {i}")
    (folder / "99.png").write_bytes(b"no picture")
    (folder / "99.txt").write_text("broken")
    return folder


def config(source: Path, out: Path, **changes: object) -> TokenizerConfig:
    base = TokenizerConfig(
        source=str(source),
        out=str(out),
        size=16,
        steps=10,
        batch_size=6,
        codebook_size=16,
        codebook_dim=4,
        base_channels=8,
        norm_groups=4,
        quantize_from=0.2,
        revive_every=2,
        log_every=2,
        checkpoint_every=4,
    )
    return dataclasses.replace(base, **changes)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_ten_steps_are_five_and_five(pictures: Path, tmp_path: Path) -> None:
    once = fit_tokenizer(config(pictures, tmp_path / "once"))
    twice = config(pictures, tmp_path / "twice")
    fit_tokenizer(twice, stop_after=5)
    assert not (tmp_path / "twice" / "model.safetensors").exists()
    with open(tmp_path / "twice" / "log.jsonl", "a") as handle:
        handle.write('{"step": 6, "loss": 0.5}\n{"step": 8, "lo')  # killed while writing
    fit_tokenizer(twice)
    assert (once / "model.safetensors").read_bytes() == (
        tmp_path / "twice" / "model.safetensors"
    ).read_bytes()
    states = [
        load_file(tmp_path / name / "checkpoints" / "step-00000010" / "training.safetensors")
        for name in ("once", "twice")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert [line["step"] for line in log(tmp_path / "twice")] == [2, 4, 6, 8, 10]
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.partial"))


def test_finished_is_left_alone_and_other_flags_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(pictures, tmp_path / "out", steps=2)
    fit_tokenizer(settings)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    fit_tokenizer(dataclasses.replace(settings, log_every=1))
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"other flags \(--lr: 0.002 -> 0.1\)"):
        fit_tokenizer(dataclasses.replace(settings, lr=0.1))


def test_another_source_under_the_same_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("red")
    settings = config(folder, tmp_path / "out", batch_size=2)
    fit_tokenizer(settings, stop_after=1)
    (folder / "3.png").unlink()
    with pytest.raises(ValueError, match="the source has changed"):
        fit_tokenizer(settings)


def test_it_learns_and_lists_what_it_could_not_read(pictures: Path, tmp_path: Path) -> None:
    out = fit_tokenizer(
        config(pictures, tmp_path / "out", steps=60, lr=5e-3, log_every=10, batch_size=13)
    )
    lines = log(out)
    assert lines[-1]["l1"] < 0.7 * lines[0]["l1"]
    assert lines[-1]["rejected"] == 1
    rejected = (out / "rejects.jsonl").read_text().splitlines()
    assert len(rejected) == 1
    assert "not an image" in rejected[0]
    model = load_image_tokenizer(out)
    assert model.factor == 8
    assert model.config.image_size == 16


def test_half_precision_is_stored_and_codes_come_from_what_is_stored(
    pictures: Path, tmp_path: Path
) -> None:
    out = fit_tokenizer(config(pictures, tmp_path / "out", steps=2, save_dtype="float16"))
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = load_image_tokenizer(out)
    assert torch.equal(loaded.codes.weight, stored["codes.weight"].float())


def test_order_depends_on_seed_and_step_only(pictures: Path) -> None:
    source = open_source(pictures)
    first, second = (PixelPool(source, 16, seed=3, memory_gb=1) for _ in range(2))
    forward = [first.batch(step, 4) for step in range(6)]
    backward = [second.batch(step, 4) for step in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert sum(len(batch) for batch in forward[:3]) in (11, 12)  # the broken one is left out
    other = PixelPool(source, 16, seed=4, memory_gb=1).batch(0, 4)
    assert other.shape != forward[0].shape or not torch.equal(other, forward[0])


def test_little_memory_still_reads_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arra.image_tokenizers.pixels.BLOCK", 4)
    pool = PixelPool(open_source("builtin:scenes", limit=22), 64, seed=0, memory_gb=1e-4)
    assert pool.window == 1
    epochs = [torch.cat([pool.batch(step, 11) for step in (2 * e, 2 * e + 1)]) for e in (0, 1)]
    sums = [sorted(batch.long().sum(dim=(1, 2, 3)).tolist()) for batch in epochs]
    assert sums[0] == sums[1]
    assert not torch.equal(*epochs)
    assert len(pool._blocks) <= pool.capacity


@pytest.mark.parametrize("l2", [True, False])
def test_dead_codes_are_revived(l2: bool) -> None:
    torch.manual_seed(0)
    model = VQModel(
        VQConfig(
            base_channels=4,
            channel_multipliers=[1],
            z_channels=4,
            codebook_size=6,
            codebook_dim=2,
            l2_normalize=l2,
        )
    )
    angles = torch.arange(6) * torch.pi / 3 + 0.1
    centres = torch.stack([angles.cos(), angles.sin()], dim=1)
    z_RD = centres.repeat_interleave(50, dim=0)
    with torch.no_grad():  # all codes but one are out of reach
        model.codes.weight[:] = centres[0] if l2 else 100.0
        model.codes.weight[0] = centres[0]
    average = CodebookAverage(model, decay=0.9)
    generator = torch.Generator().manual_seed(0)
    assert len(model.nearest(z_RD[:, :, None, None]).unique()) == 1
    for step in range(150):
        if step % 5 == 0:
            average.revive(z_RD, 0.1, generator)
        average.update(z_RD, model.nearest(z_RD[:, :, None, None]).flatten())
    codes = model.nearest(z_RD[:, :, None, None]).flatten()
    assert len(codes.unique()) == 6
    assert torch.allclose(model.embed(codes[:, None, None])[:, :, 0, 0], z_RD, atol=1e-2)
    assert average.revive(z_RD, 0.1, generator) == 0


def test_learning_rate_rises_and_falls() -> None:
    settings = TokenizerConfig(source="x", out="y", steps=100, warmup=0.1)
    rates = [schedule(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_bad_settings_and_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--size 20 is not a multiple of 8"):
        TokenizerConfig(source="x", out="y", size=20)
    with pytest.raises(ValueError, match="--steps must be at least 1"):
        TokenizerConfig(source="x", out="y", steps=0)
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(b"")
        (folder / f"{name}.txt").write_text("empty file")
    with pytest.raises(ValueError, match=r"none of 2 images can be read; .*0 bytes"):
        fit_tokenizer(config(folder, tmp_path / "out", batch_size=2))


def test_a_loss_that_is_not_finite_stops_the_fit(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="lower --lr"):
        fit_tokenizer(config(pictures, tmp_path / "out", lr=1e30))
