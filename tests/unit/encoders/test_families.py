"""Every further family gives what transformers' own model of it gives on random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from arra.encoders import load_encoder
from arra.encoders.families import FAMILIES
from arra.encoders.preprocessing import FLOAT_PROCESSORS

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
IMAGE = 24


def shaken(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def square(side):
    return {"height": side, "width": side}


def siglip(folder):
    vision = {**SIZES, "intermediate_size": 32, "image_size": IMAGE}
    text = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    model = shaken(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    SiglipImageProcessorPil(size=square(IMAGE)).save_pretrained(folder)

    def expected(pixels):
        output = model.vision_model(pixel_values=pixels)
        return {"patch": output.last_hidden_state, "projected": output.pooler_output}

    return model, expected


def sam(folder):
    vision = {**SIZES, "image_size": 32, "output_channels": 12, "window_size": 3}
    vision |= {"global_attn_indexes": [1], "mlp_dim": 32}
    decoder = {"hidden_size": 12, "num_attention_heads": 2, "mlp_dim": 8, "iou_head_hidden_dim": 8}
    prompt = {"hidden_size": 12, "image_size": 32, "patch_size": 8, "image_embedding_size": 4}
    model = SamModel(
        SamConfig(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompt)
    )
    processor = SamImageProcessorPil(size={"longest_edge": 32}, pad_size=square(32))
    processor.save_pretrained(folder)
    shaken(model)

    def expected(pixels):
        grid = model.get_image_embeddings(pixels)
        assert grid.shape[1:] == (12, 4, 4)
        return {"patch": grid.flatten(2).transpose(1, 2)}

    return model, expected


def sam2(folder):
    backbone = {"hidden_size": 8, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1]}
    backbone |= {"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1] * 4}
    backbone |= {"window_size_per_stage": [4, 2, 2, 1], "global_attention_blocks": [3]}
    backbone |= {"window_positional_embedding_background_size": [4, 4]}
    vision = {"backbone_config": {"model_type": "sam2_hiera_det_model", **backbone}}
    vision |= {"backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16}
    vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 8, "iou_head_hidden_dim": 8}
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
    config = Sam2Config(
        vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompt
    )
    model = shaken(Sam2Model(config))
    write(folder, "Sam2ImageProcessorFast", 64)

    def expected(pixels):
        grid = model.vision_encoder(pixels).fpn_hidden_states[-1]
        assert grid.shape[1:] == (16, 4, 4)
        return {"patch": grid.flatten(2).transpose(1, 2)}

    return model, expected


def dinov3(folder):
    config = DINOv3ViTConfig(
        **SIZES, image_size=IMAGE, intermediate_size=32, num_register_tokens=2, use_gated_mlp=True
    )
    model = shaken(DINOv3ViTModel(config))
    write(folder, "DINOv3ViTImageProcessorFast", IMAGE)

    def expected(pixels):
        hidden = model(pixel_values=pixels).last_hidden_state
        return {"class": hidden[:, 0], "patch": hidden[:, 3:]}

    return model, expected


def mae(folder):
    config = ViTMAEConfig(
        **SIZES,
        image_size=IMAGE,
        intermediate_size=32,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=1,
    )
    model = shaken(ViTMAEForPreTraining(config))
    ViTImageProcessorPil(size=square(IMAGE)).save_pretrained(folder)
    assert model.config.mask_ratio == 0.75

    def expected(pixels):
        tower = model.vit  # by the parts of the class, so that no masking can happen
        hidden = tower.embeddings.patch_embeddings(pixels)
        position = tower.embeddings.position_embeddings
        token = (tower.embeddings.cls_token + position[:, :1]).expand(len(pixels), -1, -1)
        hidden = torch.cat([token, hidden + position[:, 1:]], dim=1)
        layers = dict(tower.named_children()).get("layers") or tower.encoder.layer
        for layer in layers:
            hidden = layer(hidden)
        hidden = tower.layernorm(hidden)
        return {"class": hidden[:, 0], "patch": hidden[:, 1:]}

    return model, expected


def write(folder, kind, side):
    values = {"image_processor_type": kind, "size": square(side), "resample": 2}
    values |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


MAKERS = {"siglip": siglip, "sam": sam, "sam2": sam2, "dinov3_vit": dinov3, "vit_mae": mae}
CASES = [(name, pooling) for name in MAKERS for pooling in FAMILIES[name].poolings]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    found = {}
    for name, make in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        model, expected = make(folder)
        model.save_pretrained(folder)
        found[name] = (folder, model, expected)
    return found


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    sizes = [(40, 40), (24, 24), (33, 50)]
    return [Image.fromarray(generator.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


@pytest.mark.parametrize(("name", "pooling"), CASES)
def test_equals_transformers(built, images, name, pooling):
    folder, _, expected = built[name]
    encoder = load_encoder(folder, pooling, grids=True)
    pixels = encoder.preprocess(images)
    with torch.no_grad():
        parts = expected(pixels)
    parts["mean"] = parts["patch"].mean(dim=1)
    if "class" in parts:
        parts["both"] = torch.cat([parts["class"], parts["mean"]], dim=1)
    features = encoder(images)
    assert features.dtype == torch.float32
    assert features.shape[0] == 3
    assert features.shape[-1] == encoder.dim
    assert features.shape == parts[pooling].shape
    # a family that ignored its pixels would equal itself as well
    assert (features[0] - features[1]).abs().max() > 1e-3
    torch.testing.assert_close(features, parts[pooling], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_default_and_refusals(built, name):
    folder = built[name][0]
    has_class = "class" in FAMILIES[name].poolings
    assert load_encoder(folder).pooling == ("class" if has_class else "mean")
    for pooling in {"class", "both", "projected"} - set(FAMILIES[name].poolings):
        with pytest.raises(ValueError, match=rf"has no (class token|projection), so no @{pooling}"):
            load_encoder(f"{folder}@{pooling}")
    with pytest.raises(ValueError, match="one vector is needed here: use @class or @mean"):
        load_encoder(f"{folder}@patch")
    if name != "sam":
        with pytest.raises(ValueError, match="has one input size"):
            load_encoder(f"{folder}@mean:16")


@pytest.mark.parametrize("name", MAKERS)
def test_hidden_states_do_not_change_from_call_to_call(built, images, name):
    """Losses compare them layer by layer; MAE's class would mask and shuffle anew in each call."""
    encoder = load_encoder(built[name][0])
    pixels = encoder.preprocess(images)
    with torch.no_grad():
        first = encoder.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        again = encoder.model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(first) > 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_siglip_without_its_text_tower_or_head(built, images, tmp_path):
    folder, model, _ = built["siglip"]
    alone = SiglipVisionModel(model.config.vision_config)
    alone.load_state_dict(model.vision_model.state_dict())
    alone.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(
        (folder / "preprocessor_config.json").read_bytes()
    )
    torch.testing.assert_close(
        load_encoder(tmp_path, "projected")(images), load_encoder(folder, "projected")(images)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_use_head": False}))
    assert load_encoder(tmp_path)(images).shape == (3, 16)
    with pytest.raises(ValueError, match=r"saved without its head: use @mean"):
        load_encoder(tmp_path, "projected")


def test_sam_sees_smaller_inputs_on_request_only(built, images):
    folder = built["sam"][0]
    encoder = load_encoder(f"{folder}@patch:16", grids=True)
    assert encoder.pooling == "patch:16"
    assert encoder.preprocess(images).shape == (3, 3, 16, 16)
    assert encoder(images).shape == (3, 4, 12)
    again = load_encoder(encoder.spec, encoder.pooling, grids=True)
    assert again.fingerprint == encoder.fingerprint
    assert load_encoder(f"{folder}@patch", grids=True).fingerprint != encoder.fingerprint
    # at its own size nothing is interpolated
    whole = load_encoder(f"{folder}@mean:32")
    torch.testing.assert_close(whole(images), load_encoder(folder)(images))
    for size in (12, 40):
        with pytest.raises(ValueError, match=f"squares of 32 .* multiples of 8; {size} is none"):
            load_encoder(f"{folder}@mean:{size}")
    with pytest.raises(ValueError, match="no pooling"):
        load_encoder(f"{folder}@mean:0")


def test_interpolated_positions_are_the_bicubic_ones(built):
    folder, _, _ = built["sam"]
    position = load_encoder(folder).model.vision_encoder.pos_embed
    smaller = load_encoder(f"{folder}@mean:16").model.vision_encoder.pos_embed
    wanted = torch.nn.functional.interpolate(position.permute(0, 3, 1, 2), (2, 2), mode="bicubic")
    torch.testing.assert_close(smaller, wanted.permute(0, 2, 3, 1))


def test_sam2_as_published(built, images, tmp_path):
    """The hub's SAM 2 folders hold the model for videos."""
    folder = built["sam2"][0]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": Sam2VideoConfig.model_type})
    )
    torch.testing.assert_close(load_encoder(tmp_path)(images), load_encoder(folder)(images))


def test_float_preprocessing(built):
    """A plain picture stays plain; of a ramp, levels are not rounded to 8 bits."""
    assert set(FLOAT_PROCESSORS) == {"DINOv3ViTImageProcessor", "Sam2ImageProcessor"}
    encoder = load_encoder(built["dinov3_vit"][0])
    plain = encoder.preprocess([Image.new("RGB", (50, 31), (255, 0, 51))])[0]
    wanted = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(plain, wanted[:, None, None].expand(3, IMAGE, IMAGE))
    ramp = np.repeat(np.linspace(0, 255, 48).astype(np.uint8)[None, :, None], 48, axis=0)
    seen = encoder.preprocess([Image.fromarray(np.repeat(ramp, 3, axis=2))])[0]
    levels = (seen[0] * 0.229 + 0.485) * 255
    assert (levels - levels.round()).abs().max() > 0.1
    assert (levels.diff(dim=1) > 0).all()


def test_fingerprint_follows_shapeless_values(built, tmp_path):
    for name, key, value in (
        ("dinov3_vit", "rope_theta", 50.0),
        ("sam", "hidden_act", "relu"),
        ("sam2", "num_attention_heads_per_stage", [1, 1, 2, 2]),
    ):
        folder = built[name][0]
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        place = config
        if name != "dinov3_vit":
            place = config["vision_config"]
        if name == "sam2":
            place = place["backbone_config"]
        assert place[key] != value
        place[key] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_encoder(tmp_path).fingerprint != load_encoder(folder).fingerprint
