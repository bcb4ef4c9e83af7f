"""Encoders give what transformers' own models give, from their own preprocessing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from arra.encoders import load_encoder, split_spec

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
WIDTH = 16


def shaken(model):
    """Random weights at which layers do something: fresh ones are so small that bugs hide."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def clip(folder):
    vision = {**SIZES, "intermediate_size": 32, "image_size": 24, "projection_dim": 12}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=10))
    size = {"height": 24, "width": 24}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size)
    return save(shaken(model), processor, folder)


def dinov2(folder):
    model = Dinov2Model(Dinov2Config(**SIZES, image_size=24, mlp_ratio=2))
    return save(shaken(model), small_bit_processor(), folder)


def registers(folder):
    config = Dinov2WithRegistersConfig(**SIZES, image_size=24, mlp_ratio=2, num_register_tokens=3)
    return save(shaken(Dinov2WithRegistersModel(config)), small_bit_processor(), folder)


def rad_dino(folder):
    """microsoft/rad-dino: DINOv2 whose file cuts nothing, with levels of X-rays."""
    model = Dinov2Model(Dinov2Config(**SIZES, image_size=24, mlp_ratio=2))
    levels = {"image_mean": [0.5307] * 3, "image_std": [0.2583] * 3}
    size = {"height": 24, "width": 24}
    processor = BitImageProcessorPil(size={"shortest_edge": 24}, crop_size=size, **levels)
    return save(shaken(model), processor, folder)


def small_bit_processor():
    size = {"height": 24, "width": 24}
    return BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)


def vit(folder):
    model = ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=32, image_size=24))
    return save(shaken(model), ViTImageProcessorPil(size={"height": 24, "width": 24}), folder)


def save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    makers = {"clip": clip, "dinov2": dinov2, "registers": registers, "vit": vit}
    makers |= {"rad-dino": rad_dino}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    sizes = [(40, 40), (24, 24), (33, 50)]
    return [Image.fromarray(generator.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


def expected(name, model, processor, images, pooling):
    if pooling == "patch":  # of the whole picture: squeezed, and nothing cut from the middle
        images = [image.resize((side := max(image.size), side), 3) for image in images]
        whole = {"size": {"height": 24, "width": 24}, "do_center_crop": False}
        pixels = processor(images=images, return_tensors="pt", **whole)["pixel_values"]
    else:
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if name == "clip":
            output = model.vision_model(pixel_values=pixels)
            if pooling == "projected":
                return model.visual_projection(output.pooler_output)
            token, patches = output.pooler_output, output.last_hidden_state[:, 1:]
        else:
            inner = model.vit if name == "vit" else model
            hidden = inner(pixel_values=pixels).last_hidden_state
            token, patches = hidden[:, 0], hidden[:, 4 if name == "registers" else 1 :]
    assert patches.shape[1] == 9
    mean = patches.mean(dim=1)
    both = torch.cat([token, mean], dim=1)
    return {"class": token, "mean": mean, "both": both, "patch": patches}[pooling]


@pytest.mark.parametrize("pooling", ["class", "mean", "both", "projected", "patch"])
@pytest.mark.parametrize("name", ["clip", "dinov2", "registers", "vit", "rad-dino"])
def test_equals_transformers(built, images, name, pooling):
    model, processor, folder = built[name]
    if pooling == "projected" and name != "clip":
        with pytest.raises(ValueError, match="no projection"):
            load_encoder(folder, pooling)
        return
    encoder = load_encoder(folder, pooling, grids=True)
    features = encoder(images)
    assert features.dtype == torch.float32
    assert encoder.gives_grids == (pooling == "patch")
    assert not encoder.gives_grids or encoder.grid == (3, 3)
    assert features.shape == (3, *([9] if pooling == "patch" else []), encoder.dim)
    assert encoder.pooling == pooling
    torch.testing.assert_close(features, expected(name, model, processor, images, pooling))


def test_patches_lie_where_they_are_in_the_picture(built):
    """DINOv2's file cuts 224 of 256 pixels out of the middle: its patches would lie elsewhere."""
    encoder = load_encoder(built["dinov2"][2], "patch", grids=True)
    levels = np.zeros((60, 90, 3), np.uint8)
    levels[:20, :30] = 255  # the first of 3 x 3 parts
    seen = encoder.preprocess([Image.fromarray(levels)])[0, 0]
    bright = (seen > seen.mean()).float().view(3, 8, 3, 8).mean((1, 3))
    assert bright[0, 0] > 0.9
    assert bright.sum() - bright[0, 0] < 0.3
    assert "crop" in str(built["dinov2"][1].to_dict())
    cut = load_encoder(built["dinov2"][2]).preprocess([Image.fromarray(levels)])[0, 0]
    assert ((cut > cut.mean()).float().view(3, 8, 3, 8).mean((1, 3))[0, 0]) < 0.8


def test_bfloat16_is_another_encoder(built, images):
    folder = built["vit"][2]
    exact, rounded = load_encoder(folder), load_encoder(folder, dtype="bfloat16")
    assert rounded.fingerprint != exact.fingerprint
    assert rounded.dtype == "bfloat16"
    features = rounded(images)
    assert features.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(features, exact(images))
    assert 0.995 < cosine.min() < 1 - 1e-7
    with pytest.raises(ValueError, match="float32 or bfloat16, not in 'float16'"):
        load_encoder(folder, dtype="float16")


def test_pooling_by_suffix_and_default(built):
    folder = built["clip"][2]
    assert load_encoder(folder).pooling == "class"
    assert load_encoder(f"{folder}@mean").pooling == "mean"
    assert load_encoder(f"{folder}@mean", "mean").dim == WIDTH
    with pytest.raises(ValueError, match="says @mean"):
        load_encoder(f"{folder}@mean", "class")
    with pytest.raises(ValueError, match="no pooling; there is class, projected, mean, both"):
        load_encoder(f"{folder}@maen")
    with pytest.raises(ValueError, match="unknown pooling"):
        load_encoder(folder, "max")


def test_split_spec():
    assert split_spec("a/b@both") == ("a/b", "both")
    assert split_spec("a@b/c") == ("a@b/c", None)


def test_frozen_but_differentiable_in_the_pixels(built, images):
    encoder = load_encoder(built["clip"][2])
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training
    assert not encoder(images).requires_grad
    pixels = encoder.preprocess(images).requires_grad_()
    encoder.pool(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_fingerprint(built, tmp_path, images):
    model, processor, folder = built["vit"]
    first = load_encoder(folder).fingerprint
    assert load_encoder(folder).fingerprint == first
    assert load_encoder(folder, "mean").fingerprint != first
    save(model, processor, tmp_path / "copy")
    assert load_encoder(tmp_path / "copy").fingerprint == first

    path = tmp_path / "copy" / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "resample": 3}))
    assert load_encoder(tmp_path / "copy").fingerprint != first
    path.write_text(json.dumps({**raw, "image_processor_type": "ViTImageProcessorFast"}))
    assert load_encoder(tmp_path / "copy").fingerprint == first

    path.write_text(json.dumps({**raw, "image_processor_type": "EfficientNetImageProcessor"}))
    with pytest.raises(ValueError, match=r"by EfficientNetImageProcessor; supported are Bit"):
        load_encoder(tmp_path / "copy")
    path.write_text(json.dumps({k: v for k, v in raw.items() if k != "image_processor_type"}))
    assert load_encoder(tmp_path / "copy").fingerprint == first

    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    assert load_encoder(tmp_path / "copy").fingerprint != first


def test_the_vision_half_alone_is_an_encoder(built, tmp_path, images):
    model, processor, folder = built["clip"]
    vision = CLIPVisionModel(model.config.vision_config)
    vision.load_state_dict(model.vision_model.state_dict())
    save(vision, processor, tmp_path)
    torch.testing.assert_close(load_encoder(tmp_path)(images), load_encoder(folder)(images))
    with pytest.raises(ValueError, match=r"lacks \d+ weights.*@class"):
        load_encoder(tmp_path, "projected")


def test_refusals(built, tmp_path):
    folder = built["vit"][2]
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"type 'llama'; supported are clip, .*dinov2, .*vit"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ValueError, match=r"naflex.*use one of fixed resolution, such as google/"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_encoder(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(FileNotFoundError, match="preprocessor_config"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="hub cannot be reached"):
        load_encoder("nobody/nothing")
