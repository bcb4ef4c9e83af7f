"""arra convert: files in, folders out, and byte for byte back."""

import argparse
import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from formula import fill, ints
from torch import Tensor

import arra
from arra import cli, load_image_tokenizer
from arra.convert import UNUSED, ConvertConfig, convert
from arra.foreign import read_foreign
from arra.image_tokenizers.vq import VQConfig, VQModel
from arra.models.llamagen_layers import LlamaGenConfig
from arra.models.llamagen_model import LlamaGenForImageGeneration

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vq.json").read_text())
BUNDLED = str(Path(arra.__file__).parent / "bundled" / "scenes-tokenizer")
USED = "quantize.codebook_used"


@functools.cache
def filled(case: str) -> dict[str, Tensor]:
    rows = (row.split() for row in GOLDEN[case]["layout"])
    return {name: fill(name, tuple(map(int, shape))) for name, *shape in rows}


def original(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The record of used codes stays in float32 whatever type the weights have."""
    return {name: t if name == USED else t.to(dtype) for name, t in filled(case).items()}


def write(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(exist_ok=True)
    if case.startswith("llamagen"):
        torch.save({"model": original(case, dtype)}, folder / "vq.pt")
        return folder / "vq.pt"
    more = {"loss.discriminator.main.0.weight": torch.ones(2), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": {**original(case, dtype), **more}}, folder / "vqgan.ckpt")
    params = {key: GOLDEN[case][key] for key in ("ddconfig", "n_embed", "embed_dim")}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    return folder


def same_bytes(given: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    def content(tensor: Tensor) -> tuple:
        plain = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return tensor.dtype, tensor.shape, plain

    assert given.keys() == expected.keys()
    return all(content(given[name]) == content(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("llamagen_ds16", torch.float32),
        ("llamagen_ds8", torch.bfloat16),
        ("chameleon", torch.float32),
        ("chameleon_attention", torch.float16),
    ],
)
def test_there_and_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, ours, back = write(case, tmp_path / "source", dtype), tmp_path / "a", tmp_path / "b"
    family = case.partition("_")[0]
    assert cli.main(["convert", str(source), "--out", str(ours)]) == 0
    assert cli.main(["convert", str(ours), "--out", str(back), "--to", family]) == 0
    if family == "llamagen":
        file = back / f"vq_{case.partition('_')[2]}.pt"
        assert torch.load(file, weights_only=True).keys() == {"model"}
    else:
        file = back / "vqgan.ckpt"
        assert torch.load(file, weights_only=True).keys() == {"state_dict"}
        wrote = yaml.safe_load((back / "vqgan.yaml").read_text())
        assert wrote == yaml.safe_load((source / "vqgan.yaml").read_text())
    assert same_bytes(read_foreign(file).tensors, original(case, dtype))
    codecs = [
        load_image_tokenizer(place)
        for place in (source, ours, back if file.name == "vqgan.ckpt" else file)
    ]
    assert len({codec.fingerprint for codec in codecs}) == 1
    codes = ints("codes", (1, 2, 2), 64)
    assert torch.equal(codecs[0].decode(codes), codecs[1].decode(codes))


@pytest.mark.parametrize("condition", ["class", "text"])
def test_a_transformer_there_and_back(condition: str, tmp_path: Path) -> None:
    """As train_c2i.py saves one, in bfloat16 but for one tensor."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 16}
    config = LlamaGenConfig(
        condition=condition, num_classes=3, text_slots=4, caption_dim=6, **sizes
    )
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaGenForImageGeneration(config).state_dict().items()}
    tensors = {name: fill(name, tuple(shape)).bfloat16() for name, shape in shapes.items()}
    tensors["norm.weight"] = tensors["norm.weight"].float()
    options = argparse.Namespace(image_size=256, downsample_size=16, gpt_model="GPT-B")
    torch.save({"model": tensors, "steps": 9, "args": options}, tmp_path / "0000009.pt")
    assert cli.main(["convert", str(tmp_path / "0000009.pt"), "--out", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "config.json").is_file()
    back = ["--out", str(tmp_path / "b"), "--to", "llamagen"]
    assert cli.main(["convert", str(tmp_path / "a"), *back]) == 0
    file = tmp_path / "b" / f"{condition[0]}2i_256.pt"
    assert same_bytes(read_foreign(file).tensors, tensors)


def test_remarks(tmp_path: Path) -> None:
    said = convert(ConvertConfig(str(write("chameleon", tmp_path / "c")), str(tmp_path / "x")))
    assert "is Chameleon's VQGAN" in said
    assert "2 tensors that only training reads were left out" in said
    assert not (tmp_path / "x" / UNUSED).exists()
    tensors = original("llamagen_ds8")
    averaged = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "ema": averaged, "steps": 1}, tmp_path / "vq.pt")
    said = convert(ConvertConfig(str(tmp_path / "vq.pt"), str(tmp_path / "y")))
    assert "--weights ema takes the others" in said
    convert(ConvertConfig(str(tmp_path / "vq.pt"), str(tmp_path / "z"), "llamagen", "ema"))
    assert [file.name for file in (tmp_path / "z").iterdir()] == ["vq_ds8.pt"]
    assert same_bytes(read_foreign(tmp_path / "z" / "vq_ds8.pt").tensors, averaged)


def test_a_tokenizer_of_our_own_in_their_layout(tmp_path: Path) -> None:
    """One without a record of used codes gets the zeros that the original class starts with."""
    config = VQConfig(
        base_channels=32,
        channel_multipliers=[1, 2],
        attention_levels=[1],
        z_channels=8,
        codebook_size=64,
        codebook_dim=8,
        l2_normalize=True,
    )
    VQModel(config).save_pretrained(tmp_path / "ours")
    convert(ConvertConfig(str(tmp_path / "ours"), str(tmp_path / "b"), "llamagen"))
    tensors = read_foreign(tmp_path / "b" / "vq_ds2.pt").tensors
    assert torch.equal(tensors[USED], torch.zeros(65536))
    model = load_image_tokenizer(tmp_path / "b" / "vq_ds2.pt")
    assert model.fingerprint == load_image_tokenizer(tmp_path / "ours").fingerprint


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(words: str, *arguments: str) -> None:
        assert cli.main(["convert", *arguments, "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()

    (tmp_path / "page.pt").write_text("<html>Not found</html>")
    refused("found a web page", str(tmp_path / "page.pt"))
    torch.save({"model": {"what.is.this": torch.zeros(1)}}, tmp_path / "other.pt")
    refused("found 1 tensors such as what.is.this", str(tmp_path / "other.pt"))
    refused("found nothing", str(tmp_path / "nowhere.pt"))
    refused("expected vqgan.ckpt or config.json in it", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused("'llama' in transformers' format, which loads as it is", str(tmp_path))
    tensors = original("llamagen_ds8")
    del tensors["encoder.conv_in.weight"]
    torch.save({"model": tensors}, tmp_path / "less.pt")
    refused("found no tensor encoder.conv_in.weight", str(tmp_path / "less.pt"))
    source = str(write("llamagen_ds8", tmp_path))
    refused("no averaged weights", source, "--weights", "ema")
    refused("cannot have l2_normalize True", source, "--to", "chameleon")
    refused("cannot have patch_size 4, norm pixel", BUNDLED, "--to", "llamagen")
    refused("is our own format already", BUNDLED)
    refused("--weights is for files with two", BUNDLED, "--to", "llamagen", "--weights", "ema")
