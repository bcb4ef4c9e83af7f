"""The VQ model: shapes, lookup, files, refusals."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arra.files import read_json, write_json
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.vq import VQConfig, VQModel, to_bytes, to_floats


def tiny(**changes: object) -> VQModel:
    sizes = {
        "image_size": 16,
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "res_blocks": 1,
        "norm_groups": 4,
        "z_channels": 6,
        "codebook_size": 20,
        "codebook_dim": 4,
        "attention_levels": [1],
        "l2_normalize": True,
    }
    torch.manual_seed(0)
    return VQModel(VQConfig(**{**sizes, **changes})).eval()


def images(count: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 2),
        ({"patch_size": 2, "middle_attention": False}, 4),
        ({"channel_multipliers": [1, 1, 2], "norm": "pixel", "l2_normalize": False}, 4),
        ({"channel_multipliers": [1], "patch_size": 8, "attention_levels": []}, 8),
        ({"res_blocks": 2, "decoder_res_blocks": 1, "dropout": 0.5}, 2),
    ],
)
def test_shapes_and_types(changes: dict, factor: int) -> None:
    model = tiny(**changes)
    assert model.factor == factor
    codes = model.encode(images(3, 16, 24))
    assert codes.shape == (3, 16 // factor, 24 // factor)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < model.codebook_size
    pixels = model.decode(codes)
    assert pixels.shape == (3, 3, 16, 24)
    assert pixels.dtype == torch.uint8


def test_ranges() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(to_floats(every)), every)
    assert to_floats(every).aminmax() == (-1.0, 1.0)
    assert torch.equal(to_bytes(torch.tensor([-7.0, 7.0])), torch.tensor([0, 255]))


@pytest.mark.parametrize("l2", [True, False])
def test_lookup_is_the_naive_argmin(l2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(l2_normalize=l2)
    monkeypatch.setattr("arra.image_tokenizers.vq.LOOKUP_ROWS", 100)  # five latents at a time
    z_NDHW = model.latents(to_floats(images()))
    rows = z_NDHW.permute(0, 2, 3, 1).reshape(-1, 4).double()
    weight = model.codes.weight.double()
    if l2:
        assert torch.allclose(rows.norm(dim=1), torch.ones(1).double())
        weight = weight / weight.norm(dim=1, keepdim=True)
    distances = (rows[:, None] - weight[None]).square().sum(-1)
    assert torch.equal(model.nearest(z_NDHW).flatten(), distances.argmin(dim=1))


def test_what_is_decoded_is_the_codebook() -> None:
    model = tiny()
    assert torch.allclose(model.codebook.norm(dim=1), torch.ones(20))
    codes = torch.arange(16).view(1, 4, 4)
    vectors = model.embed(codes)
    assert torch.equal(vectors[0].flatten(1).T, model.codebook[:16])
    assert torch.equal(model.nearest(vectors), codes)
    assert torch.equal(tiny(l2_normalize=False).codebook, tiny(l2_normalize=False).codes.weight)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.bin"))
    loaded = load_image_tokenizer(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.fingerprint == model.fingerprint
    codes = model.encode(images())
    assert torch.equal(loaded.encode(images()), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    again = VQModel.from_pretrained(tmp_path / "saved")
    assert again.fingerprint == model.fingerprint


def test_half_precision_on_disk_keeps_the_fingerprint(tmp_path: Path) -> None:
    tiny().half().save_pretrained(tmp_path / "half")
    loaded = load_image_tokenizer(tmp_path / "half")
    assert loaded.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "full")
    assert load_image_tokenizer(tmp_path / "full").fingerprint == loaded.fingerprint
    assert loaded.fingerprint != tiny().fingerprint


def test_fingerprint_sees_what_decides_codes() -> None:
    base = tiny()
    assert base.fingerprint == tiny(image_size=32).fingerprint
    others = [tiny(l2_normalize=False), tiny(attention_levels=[])]
    changed = tiny()
    with torch.no_grad():
        changed.codes.weight[0, 0] += 1e-3
    prints = [model.fingerprint for model in [base, changed, *others]]
    assert all(a != b for a, b in itertools.combinations(prints, 2))


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (images(1, 15, 16), "15x16 pixels do not fit .* multiples of 2"),
        (images().float(), "uint8 images of shape"),
        (images()[0], "uint8 images of shape"),
        (images()[:, :1], "uint8 images of shape"),
        (images()[:0], "do not fit"),
    ],
)
def test_pixels_that_do_not_fit(pixels: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tiny().encode(pixels)


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (torch.full((1, 2, 2), 20), "code 20 does not belong .* 0..19"),
        (torch.full((1, 2, 2), -1), "code -1 does not belong"),
        (torch.zeros(4, dtype=torch.int64), r"shape \(N, height, width\)"),
        (torch.zeros(1, 2, 2), r"shape \(N, height, width\)"),
    ],
)
def test_codes_that_do_not_fit(codes: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tiny().decode(codes)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="norm is 'batch'"):
        tiny(norm="batch")
    with pytest.raises(ValueError, match="attention_levels"):
        tiny(attention_levels=[2])


def test_bad_folders(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    tiny().save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_image_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(weights)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "codes.weight"}, folder / "x")
    (folder / "x").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"codes.weight should be .* but is None"):
        load_image_tokenizer(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        load_image_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(weights)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model_type": "vit"})
    with pytest.raises(ValueError, match="model_type 'vit'"):
        load_image_tokenizer(folder)
    with pytest.raises(ValueError, match="image tokenizer"):
        load_image_tokenizer(tmp_path / "nowhere")


def published_widths(multipliers: list[int]) -> dict[str, list[int]]:
    """Input widths of the residual blocks in the published members' original modules, in order."""
    widths = [128 * m for m in multipliers]
    encoder, before = [], 128
    for width in widths:
        encoder += [before, width]  # two blocks: the first changes the width
        before = width
    decoder = []
    for width in reversed(widths):
        decoder += [before, width, width]
        before = width
    return {"encoder": encoder, "decoder": decoder}


@pytest.mark.parametrize(
    ("multipliers", "attended", "codes", "dim"),
    [
        ([1, 1, 2, 2, 4], True, 16384, 8),
        ([1, 2, 2, 4], True, 16384, 8),
        ([1, 1, 2, 2, 4], False, 8192, 256),
    ],
)
def test_structure_holds_the_published_members(
    multipliers: list[int], attended: bool, codes: int, dim: int
) -> None:
    last = len(multipliers) - 1
    with torch.device("meta"):
        model = VQModel(
            VQConfig(
                channel_multipliers=multipliers,
                attention_levels=[last] if attended else [],
                codebook_size=codes,
                codebook_dim=dim,
                l2_normalize=attended,
            )
        )
    expected = published_widths(multipliers)
    for part in ("encoder", "decoder"):
        levels = getattr(model, part).levels
        widths = [block.conv1.in_channels for level in levels for block in level.blocks]
        assert widths == expected[part]
        assert all(level.blocks[0].norm1.num_groups == 32 for level in levels)
    assert model.factor == 2**last
    keys = model.state_dict()
    in_levels = {k.split(".")[2] for k in keys if ".attention." in k and "levels" in k}
    assert bool(in_levels) == attended
    assert keys["quant_conv.weight"].shape == (dim, 256, 1, 1)
    assert keys["post_quant_conv.weight"].shape == (256, dim, 1, 1)
    assert keys["codes.weight"].shape == (codes, dim)
    assert keys["decoder.conv_in.weight"].shape == (512, 256, 3, 3)
    if len(multipliers) == 5:  # as counted in the original modules with the same sizes
        assert sum(t.numel() for t in keys.values()) == (71_883_403 if attended else 68_718_467)
