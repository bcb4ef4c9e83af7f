"""Towers in open_clip's own format give the numbers that open_clip and timm gave."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from arra.encoders import load_encoder
from arra.files import read_json

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
from formula import fill, ints

GOLDEN = read_json(Path(__file__).parents[2] / "golden" / "open_clip.json")
WIDTH, PATCH, SIZE, EMBED = 128, 8, 32, 12
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TIMM = {
    "timm_model_name": "vit_base_patch16_224",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": SIZE,
}
OWN = {"layers": 2, "width": WIDTH, "head_width": 64, "patch_size": PATCH, "image_size": SIZE}


def timm_shapes():
    shapes = {
        "trunk.cls_token": (1, 1, WIDTH),
        "trunk.pos_embed": (1, 17, WIDTH),
        "trunk.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "trunk.patch_embed.proj.bias": (WIDTH,),
        "trunk.norm.weight": (WIDTH,),
        "trunk.norm.bias": (WIDTH,),
        "head.proj.weight": (EMBED, WIDTH),
    }
    outs = {"attn.qkv": 3 * WIDTH, "attn.proj": WIDTH, "mlp.fc1": 4 * WIDTH, "mlp.fc2": WIDTH}
    for block in ("trunk.blocks.0.", "trunk.blocks.1."):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
        for name, out in outs.items():
            into = 4 * WIDTH if name == "mlp.fc2" else WIDTH
            shapes |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
    return shapes


def own_shapes():
    shapes = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (17, WIDTH),
        "proj": (WIDTH, EMBED),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    shapes |= {
        f"{n}.{leaf}": (WIDTH,) for n in ("ln_pre", "ln_post") for leaf in ("weight", "bias")
    }
    for block in ("transformer.resblocks.0.", "transformer.resblocks.1."):
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{block}attn.in_proj_bias": (3 * WIDTH,),
            f"{block}attn.out_proj.weight": (WIDTH, WIDTH),
            f"{block}attn.out_proj.bias": (WIDTH,),
            f"{block}mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            f"{block}mlp.c_fc.bias": (4 * WIDTH,),
            f"{block}mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            f"{block}mlp.c_proj.bias": (WIDTH,),
        }
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    return shapes


def published(folder, shapes, vision, model_cfg=None):
    """A folder as on the hub: a pickle of named tensors, the text tower's among them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"visual.{k}": fill(f"visual.{k}", shape) for k, shape in shapes.items()}
    tensors |= {"logit_scale": torch.tensor(4.6), "text.proj.0.weight": torch.ones(3, 3)}
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    config = {
        "model_cfg": {"embed_dim": EMBED, "vision_cfg": vision, **(model_cfg or {})},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def rewritten(folder, change):
    config = json.loads((folder / "open_clip_config.json").read_text())
    change(config)
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.fixture
def biomedclip(tmp_path):
    return published(tmp_path / "biomedclip", timm_shapes(), TIMM)


@pytest.fixture
def images():
    shapes = [(*size, 3) for size in GOLDEN["sizes"]]
    return [Image.fromarray(ints("picture", s, 256).to(torch.uint8).numpy()) for s in shapes]


def assert_golden(found, name):
    golden = torch.tensor(GOLDEN[name])
    assert (found[:, : golden.shape[1]] - golden).abs().max() <= 1e-5 * golden.abs().max()


def test_preprocessing_is_open_clips(biomedclip, images):
    pixels = load_encoder(biomedclip).preprocess(images)
    assert pixels.shape == (3, 3, SIZE, SIZE)
    assert_golden(pixels[:, 0, 5], "pixels_row")
    total = torch.tensor(GOLDEN["pixels_sum"], dtype=torch.float64)
    torch.testing.assert_close(pixels.double().sum((1, 2, 3)), total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pooling", ["class", "mean", "projected"])
def test_biomedclip_equals_open_clip_with_timm(biomedclip, images, pooling):
    encoder = load_encoder(biomedclip, pooling)
    features = encoder(images)
    assert features.shape == (3, encoder.dim) == (3, EMBED if pooling == "projected" else WIDTH)
    assert_golden(features, pooling)


@pytest.mark.parametrize(("quick", "name"), [(False, "native"), (True, "native_quick")])
def test_open_clips_own_tower(tmp_path, images, quick, name):
    folder = published(tmp_path, own_shapes(), OWN, {"quick_gelu": quick})
    encoder = load_encoder(folder, "projected")
    assert encoder.dim == EMBED
    assert_golden(encoder(images), name)
    assert load_encoder(folder)(images).shape == (3, WIDTH)


def test_poolings_and_fingerprints(biomedclip, images):
    both = load_encoder(biomedclip, "both")
    parts = [load_encoder(biomedclip, p)(images) for p in ("class", "mean")]
    torch.testing.assert_close(both(images), torch.cat(parts, dim=1))
    patches = load_encoder(f"{biomedclip}@patch", grids=True)
    assert patches(images).shape == (3, 16, WIDTH)
    assert_golden(patches.pool(both.preprocess(images)).mean(dim=1), "mean")
    assert load_encoder(biomedclip).pooling == "class"
    states = both.model(pixel_values=both.preprocess(images), output_hidden_states=True)
    assert len(states.hidden_states) == 3
    assert load_encoder(biomedclip).fingerprint != load_encoder(biomedclip, "mean").fingerprint
    first = load_encoder(biomedclip).fingerprint
    rewritten(biomedclip, lambda c: c["preprocess_cfg"].update(mean=[0.5, 0.5, 0.5]))
    assert load_encoder(biomedclip).fingerprint != first
    with pytest.raises(ValueError, match="has one input size"):
        load_encoder(f"{biomedclip}@class:16")


def test_other_files_of_weights(biomedclip, images):
    first = load_encoder(biomedclip)(images)
    published_name = biomedclip / "open_clip_pytorch_model.bin"
    published_name.rename(biomedclip / "RemoteCLIP-ViT-B-32.pt")
    torch.testing.assert_close(load_encoder(biomedclip)(images), first)
    tensors = torch.load(biomedclip / "RemoteCLIP-ViT-B-32.pt", weights_only=True)
    (biomedclip / "RemoteCLIP-ViT-B-32.pt").unlink()
    with pytest.raises(ValueError, match=r"needs open_clip_model.safetensors or .*; found none"):
        load_encoder(biomedclip)
    save_file(tensors, biomedclip / "open_clip_model.safetensors")
    torch.testing.assert_close(load_encoder(biomedclip)(images), first)


def test_refusals(biomedclip, tmp_path):
    for key, value in (
        ("timm_model_name", "convnext_base"),
        ("timm_pool", "avg"),
        ("timm_proj", "mlp"),
    ):
        folder = published(tmp_path / key, timm_shapes(), {**TIMM, key: value})
        with pytest.raises(ValueError, match="supported of timm are plain ViTs"):
            load_encoder(folder)
    folder = published(tmp_path / "kwargs", timm_shapes(), {**TIMM, "timm_model_kwargs": {"a": 1}})
    with pytest.raises(ValueError, match="sets timm_model_kwargs for its tower"):
        load_encoder(folder)
    strange = {**timm_shapes(), "trunk.blocks.0.ls1.gamma": (WIDTH,)}
    with pytest.raises(ValueError, match=r"visual\.trunk\.blocks\.0\.ls1\.gamma among them"):
        load_encoder(published(tmp_path / "strange", strange, TIMM))
    lacking = {k: v for k, v in timm_shapes().items() if k != "trunk.blocks.1.attn.proj.bias"}
    with pytest.raises(ValueError, match="lacks 1 weights"):
        load_encoder(published(tmp_path / "lacking", lacking, TIMM))
    lacking = {k: v for k, v in timm_shapes().items() if k != "head.proj.weight"}
    with pytest.raises(ValueError, match=r"lacks visual\.head\.proj\.weight"):
        load_encoder(published(tmp_path / "headless", lacking, TIMM))
    larger = published(tmp_path / "larger", timm_shapes(), {**TIMM, "image_size": 64})
    with pytest.raises(ValueError, match="does not fit its config"):
        load_encoder(larger)
    rewritten(biomedclip, lambda c: c["preprocess_cfg"].update(resize_mode="longest"))
    with pytest.raises(ValueError, match="asks for resize_mode 'longest'"):
        load_encoder(biomedclip)


def test_nothing_of_a_pickle_is_run(biomedclip):
    torch.save({"visual.proj": print}, biomedclip / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing of it was run"):
        load_encoder(biomedclip)


def test_from_the_hub(biomedclip, images, monkeypatch):
    """The hub's file of weights is a pickle: it is fetched for this format only."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(biomedclip)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    encoder = load_encoder("microsoft/BiomedCLIP@projected")
    assert_golden(encoder(images), "projected")
    assert encoder.name == "BiomedCLIP"
    assert not any("open_clip_pytorch_model.bin" in patterns for _, patterns in asked[:1])
    assert "open_clip_pytorch_model.bin" in asked[-1][1]
