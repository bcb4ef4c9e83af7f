"""Published VQ tokenizers: the original code's numbers, their own layouts back, wrong files."""

import argparse
import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from formula import fill, ints
from safetensors.torch import save_file
from torch import Tensor
from transformers import JanusVQVAE, JanusVQVAEConfig

from arra import load_image_tokenizer
from arra.files import write_json
from arra.image_tokenizers.vq import VQModel, to_bytes, to_floats

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "vq.json").read_text())
CASES = ["llamagen_ds16", "llamagen_ds8", "chameleon", "chameleon_attention"]


@functools.cache
def filled(case: str) -> dict[str, Tensor]:
    rows = (row.split() for row in GOLDEN[case]["layout"])
    return {name: fill(name, tuple(map(int, shape))) for name, *shape in rows}


def original(case: str) -> dict[str, Tensor]:
    """The weights that the original code had when its numbers were recorded."""
    return dict(filled(case))


def settings(case: str) -> dict:
    """A vqgan.yaml as Meta's: with what only training needs."""
    golden = GOLDEN[case]
    sizes = {key: golden[key] for key in ("ddconfig", "n_embed", "embed_dim")}
    other = {"ckpt_path": "somewhere.ckpt", "lossconfig": {"target": "taming.losses.Loss"}}
    return {"model": {"target": "taming.models.vqgan.VQModel", "params": {**sizes, **other}}}


def write(case: str, folder: Path) -> Path:
    """The original file (LlamaGen's) or folder (Chameleon's)."""
    if case.startswith("llamagen"):
        torch.save({"model": original(case)}, folder / "vq.pt")
        return folder / "vq.pt"
    torch.save({"state_dict": original(case)}, folder / "vqgan.ckpt")
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(settings(case)))
    return folder


def close(a: Tensor, b: list[float] | Tensor) -> None:
    expected = torch.as_tensor(b)
    error = (a.flatten() - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"max|a-b| / max|b| = {error:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_numbers_of_the_original_code(case: str, tmp_path: Path) -> None:
    golden = GOLDEN[case]
    model = load_image_tokenizer(write(case, tmp_path))
    assert model.config.l2_normalize is case.startswith("llamagen")
    images = ints("pixels", (2, 3, 32, 32), 256).to(torch.uint8)
    latents = model.quant_conv(model.encoder(to_floats(images)))
    close(latents[:, :, ::2, ::2], golden["latents"])
    expected = torch.tensor(golden["codes"])
    assert torch.equal(model.encode(images), expected)
    codes = ints("codes", tuple(expected.shape), 64)
    floats = model.render(model.embed(codes))
    close(floats[:, :, ::3, ::3], golden["pixels"])
    assert torch.equal(model.decode(codes), to_bytes(floats))


def test_sizes_of_the_published_files() -> None:
    """The sizes that LlamaGen's README names: 72M parameters for ds16, 70M for ds8."""
    from arra.image_tokenizers.vq import VQConfig

    for multipliers, millions in (((1, 1, 2, 2, 4), 72), ((1, 2, 2, 4), 70)):
        with torch.device("meta"):
            model = VQModel(
                VQConfig(
                    channel_multipliers=list(multipliers),
                    attention_levels=[len(multipliers) - 1],
                    codebook_size=16384,
                    codebook_dim=8,
                    l2_normalize=True,
                )
            )
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("wrapped", ["model", "ema", "module", "state_dict", "bare", "prefixed"])
def test_wrappers(wrapped: str, tmp_path: Path) -> None:
    tensors = original("llamagen_ds8")
    tree: dict = {wrapped: tensors, "steps": 7, "args": argparse.Namespace(image_size=384)}
    if wrapped == "bare":
        tree = tensors
    elif wrapped == "prefixed":
        tree = {"model": {f"module._orig_mod.{name}": t for name, t in tensors.items()}}
    torch.save(tree, tmp_path / "vq.pt")
    model = load_image_tokenizer(tmp_path / "vq.pt")
    assert torch.equal(model.codes.weight, tensors["quantize.embedding.weight"])
    assert model.config.image_size == (384 if "args" in tree else 256)


def test_other_tensor_types_are_computed_in_float32(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in original("llamagen_ds8").items()}
    save_file(tensors, tmp_path / "vq.safetensors")
    model = load_image_tokenizer(tmp_path / "vq.safetensors")
    assert model.dtype == torch.float32
    assert torch.equal(model.quant_conv.weight, tensors["quant_conv.weight"].float())


# ---- inside a model of transformers --------------------------------------------------------------


def janus(folder: Path, *, decoder: bool = True) -> JanusVQVAE:
    config = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=64,
        latent_channels=16,
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        num_patches=8,
    )
    vq = JanusVQVAE(config).eval()
    tensors = {name: fill(name, tuple(t.shape)) for name, t in vq.state_dict().items()}
    vq.load_state_dict(tensors)
    kept = {f"model.vqmodel.{n}": t for n, t in tensors.items() if decoder or "decoder" not in n}
    save_file({**kept, "lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "x", "vq_config": config.to_dict()})
    return vq


@torch.no_grad()
def test_tokenizer_of_a_janus_folder(tmp_path: Path) -> None:
    vq = janus(tmp_path)
    model = load_image_tokenizer(tmp_path)
    assert (model.config.image_size, model.factor, model.codebook_size) == (32, 4, 64)
    x_NCHW = to_floats(ints("pixels", (2, 3, 32, 32), 256).to(torch.uint8))
    close(model.quant_conv(model.encoder(x_NCHW)), vq.quant_conv(vq.encoder(x_NCHW)).flatten())
    codes = ints("codes", (2, 8, 8), 64)
    close(model.render(model.embed(codes)), vq.decode(codes.flatten(1)).flatten())


def test_no_decoder_in_transformers_chameleon(tmp_path: Path) -> None:
    janus(tmp_path, decoder=False)
    with pytest.raises(ValueError, match=r"the decoder comes from vqgan\.ckpt with vqgan\.yaml"):
        load_image_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="found a whole model in transformers' format"):
        load_image_tokenizer(tmp_path / "model.safetensors")


# ---- wrong files ---------------------------------------------------------------------------------


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_image_tokenizer(path)
    sentence = str(caught.value)
    assert str(path.parent if path.is_file() else path) in sentence
    assert "\n" not in sentence


def test_another_family(tmp_path: Path) -> None:
    tensors = {
        "tok_embeddings.weight": torch.zeros(4, 2),
        "layers.0.attention.wqkv.weight": torch.ones(2),
    }
    torch.save({"model": tensors}, tmp_path / "gpt.pt")
    refused(
        tmp_path / "gpt.pt",
        "expected an image tokenizer .*found 2 tensors such as layers.0.attention.wqkv.weight",
    )


@pytest.mark.parametrize("case", ["llamagen_ds8", "chameleon"])
def test_missing_additional_and_misshapen_tensors(case: str, tmp_path: Path) -> None:
    name = "vq.pt" if case.startswith("llamagen") else "vqgan.ckpt"
    wrapper = "model" if case.startswith("llamagen") else "state_dict"
    write(case, tmp_path)
    tensors = original(case)
    lacking = {n: t for n, t in tensors.items() if not n.startswith("decoder.norm_out")}
    torch.save({wrapper: lacking}, tmp_path / name)
    refused(tmp_path / name, "found 2 of them missing, such as decoder.norm_out.bias")
    torch.save({wrapper: {**tensors, "extra": torch.zeros(1)}}, tmp_path / name)
    refused(tmp_path / name, "and no others, found 1 more, such as extra")
    tensors["decoder.conv_out.bias"] = torch.zeros(7)
    torch.save({wrapper: tensors}, tmp_path / name)
    refused(tmp_path / name, r"decoder.conv_out.bias of shape \(3,\), found \(7,\)")
    torch.save(
        {wrapper: {n: t for n, t in tensors.items() if "quantize" not in n}}, tmp_path / name
    )
    refused(tmp_path / name, "codebook|such as quantize.embedding.weight")


def test_settings_beside_the_checkpoint(tmp_path: Path) -> None:
    folder = write("chameleon", tmp_path)
    about = settings("chameleon")
    file = folder / "vqgan.yaml"
    sizes = about["model"]["params"]["ddconfig"]
    for key, value in (("tanh_out", True), ("in_channels", 1), ("attn_type", "linear")):
        file.write_text(yaml.safe_dump(about))
        sizes[key] = value
        file.write_text(yaml.safe_dump(about))
        with pytest.raises(ValueError, match=f"asks for .*{key}.*, which is not supported"):
            load_image_tokenizer(folder)
        del sizes[key]
    sizes["ch_mult"] = [1, 2]
    file.write_text(yaml.safe_dump(about))
    refused(folder, "expected the .* tensors of Chameleon's VQGAN")
    file.write_text("model: {params: [1, 2")
    refused(folder, "expected a VQGAN's settings under model.params")
    file.write_text("!!python/object/apply:os.system ['touch x']")
    refused(folder, "expected a VQGAN's settings under model.params")
    file.unlink()
    refused(folder, "expected vqgan.yaml beside the checkpoint of that name")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        load_image_tokenizer("pretrained_models/vq_ds16_c2i.pt")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_image_tokenizer(tmp_path)
