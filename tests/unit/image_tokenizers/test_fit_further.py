"""Fitting published tokenizers further, and the recipes that a fit starts from."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from arra import cli
from arra.convert import ConvertConfig, convert
from arra.foreign import read_foreign
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.fit import fit_tokenizer
from arra.image_tokenizers.fit_config import TokenizerConfig, architecture_of
from arra.image_tokenizers.fit_model import fitted_model
from arra.image_tokenizers.fit_recipes import RECIPES, further, starting_from
from arra.image_tokenizers.published import CHAMELEON, LLAMAGEN, to_original
from arra.image_tokenizers.vq import VQConfig, VQModel

SMALL = {"base_channels": 8, "norm_groups": 32, "res_blocks": 1, "patch_size": 1}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        image = Image.linear_gradient("L").resize((24, 24)).rotate(40 * i)
        image.convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("gradient")
    return folder


def published(folder: Path, name: str) -> Path:
    """A small tokenizer in a published layout, or in ours."""
    torch.manual_seed(0)
    taming = name == "chameleon"
    config = VQConfig(
        image_size=16,
        channel_multipliers=[1, 2],
        attention_levels=[] if taming else [1],
        z_channels=12,
        codebook_size=24,
        codebook_dim=6,
        l2_normalize=not taming,
        **SMALL,
    )
    model = VQModel(config)
    if name == "ours":
        model.save_pretrained(folder / "ours")
        return folder / "ours"
    layout = CHAMELEON if taming else LLAMAGEN
    tensors = to_original(layout, config, model.state_dict(), {})
    if taming:
        path = folder / "vqgan.ckpt"
        torch.save({"state_dict": tensors}, path)
        (folder / "vqgan.yaml").write_text(
            "model:\n  params:\n    embed_dim: 6\n    n_embed: 24\n    ddconfig:\n"
            "      double_z: false\n      z_channels: 12\n      resolution: 16\n"
            "      in_channels: 3\n      out_ch: 3\n      ch: 8\n      ch_mult:\n      - 1\n"
            "      - 2\n      num_res_blocks: 1\n      attn_resolutions: []\n      dropout: 0.0\n"
        )
        return path
    path = folder / "vq.pt"
    torch.save({"model": tensors}, path)
    return path


def settings(init: Path, source: Path, out: Path, **changes: object) -> TokenizerConfig:
    start = TokenizerConfig(str(source), str(out), steps=4, batch_size=3, log_every=1, device="cpu")
    return dataclasses.replace(further(str(init), start), **changes)


@pytest.mark.parametrize("name", ["llamagen", "chameleon", "ours"])
def test_weights_are_taken_over_and_go_on(name: str, pictures: Path, tmp_path: Path) -> None:
    init = published(tmp_path, name)
    before = load_image_tokenizer(init)
    config = settings(init, pictures, tmp_path / "out", size=24)
    start = fitted_model(config)
    assert all(torch.equal(t, start.state_dict()[n]) for n, t in before.state_dict().items())
    assert all(p.requires_grad for n, p in start.named_parameters() if n != "codes.weight")
    out = fit_tokenizer(config, stop_after=2)
    fit_tokenizer(config)
    after = load_image_tokenizer(out)
    assert after.image_size == 24
    assert architecture_of(after.config) == architecture_of(before.config)
    assert not torch.equal(after.codes.weight, before.codes.weight)
    assert torch.cosine_similarity(after.codebook, before.codebook).mean() > 0.6  # not begun anew


def test_kept_codes_stay_while_the_rest_learns(pictures: Path, tmp_path: Path) -> None:
    init = published(tmp_path, "chameleon")
    out = fit_tokenizer(settings(init, pictures, tmp_path / "out", train_codes=False))
    before, after = load_image_tokenizer(init).state_dict(), load_file(out / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == before.keys() - {"codes.weight"}
    uses = [json.loads(line)["perplexity"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert uses[-1] < uses[0] <= 24  # the log tells how many codes these pictures use


def test_it_goes_back_into_its_published_layout(pictures: Path, tmp_path: Path) -> None:
    init = published(tmp_path, "llamagen")
    out = fit_tokenizer(settings(init, pictures, tmp_path / "out", size=16, ema_decay=0.9))
    convert(ConvertConfig(str(out), str(tmp_path / "back"), to="llamagen"))
    back = tmp_path / "back" / "vq_ds2.pt"
    assert read_foreign(back).tensors.keys() == read_foreign(init).tensors.keys()
    assert load_image_tokenizer(back).fingerprint == load_image_tokenizer(out).fingerprint


def test_another_architecture_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = published(tmp_path, "ours")
    command = ["tokenizer", "train", str(pictures), "--init", str(init), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--steps", "1"]
    assert cli.main([*command, "--codebook-size", "32", "--no-attention"]) == 1
    said = capsys.readouterr().err
    assert "--codebook-size 24, not 32, --attention True, not False: a tokenizer that is" in said
    assert cli.main([*command, "--codebook-size", "24"]) == 0
    assert load_image_tokenizer(tmp_path / "out").codebook_size == 24
    assert cli.main([*command[:3], "--init", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "holds no image tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "factor", "codes"), [("small", 8, 64), ("f4", 4, 4096)])
def test_recipes(name: str, factor: int, codes: int) -> None:
    config = RECIPES[name]("source", "out")
    assert config.recipe == name
    with torch.device("meta"):
        model = VQModel(config.model_config())
    assert model.factor == factor
    assert (config.size // factor) ** 2 == codes


@pytest.mark.parametrize(("name", "factor", "attended"), [("f16", 16, 4), ("f8", 8, 3)])
def test_recipes_have_the_published_shapes(name: str, factor: int, attended: int) -> None:
    config = RECIPES[name]("source", "out").model_config()
    with torch.device("meta"):
        model = VQModel(config)
        original = to_original(LLAMAGEN, config, model.state_dict(), {})
    assert model.factor == factor
    assert original["quantize.embedding.weight"].shape == (16384, 8)
    assert f"encoder.conv_blocks.{attended}.attn.1.q.weight" in original
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == {16: 72, 8: 70}[factor]


def test_flags_override_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert starting_from(["x", "--recipe=f8", "--steps", "3"]).batch_size == 128
    assert starting_from(["x", "--steps", "3"]).recipe == "small"
    assert cli.main(["tokenizer", "train", "x", "--recipe", "f32", "--out", "y"]) == 2
    assert "there is no recipe 'f32'; there is small, f4, f8, f16" in capsys.readouterr().err
