"""The semantic tokenizer: a frozen encoder's features become codes, and the folder holds it all."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
)

from arra.data.images import to_pil
from arra.encoders import load_encoder
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.layers import VQConfig
from arra.image_tokenizers.semantic import ENCODER, SemanticVQModel, semantic_config
from arra.image_tokenizers.teacher import Teacher, TeacherLoss, split_layers, store_teacher
from arra.image_tokenizers.vq import to_floats

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8}
SIDE = 24


def clip(folder: Path) -> None:
    vision = {**SIZES, "intermediate_size": 32, "image_size": SIDE, "projection_dim": 12}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)


def registers(folder: Path) -> None:
    config = Dinov2WithRegistersConfig(**SIZES, image_size=SIDE, num_register_tokens=3)
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder)


def sam(folder: Path) -> None:
    vision = {**SIZES, "image_size": 32, "output_channels": 12, "global_attn_indexes": [1]}
    decoder = {"hidden_size": 12, "num_attention_heads": 2, "mlp_dim": 8, "iou_head_hidden_dim": 8}
    prompt = {"hidden_size": 12, "image_size": 32, "patch_size": 8, "image_embedding_size": 4}
    config = SamConfig(
        vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompt
    )
    SamModel(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    SamImageProcessorPil(size={"longest_edge": 32}, pad_size=square).save_pretrained(folder)


MAKERS = {"clip": clip, "registers": registers, "sam": sam}


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as published: CLIP with its text tower, SAM with its mask decoder."""
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SemanticVQModel:
    """Random weights behind the bundled encoder, 8x8 codes of 64 pixels, opened from its folder."""
    folder = tmp_path_factory.mktemp("semantic")
    store_teacher("builtin:scenes-clip", folder / ENCODER)
    teacher = Teacher(folder / ENCODER, (1, 4))
    config = VQConfig(
        image_size=64,
        base_channels=8,
        channel_multipliers=[1, 1],
        patch_size=4,
        norm="pixel",
        middle_attention=False,
        z_channels=8,
        codebook_size=32,
        codebook_dim=4,
        l2_normalize=True,
    )
    SemanticVQModel(semantic_config(config, teacher), teacher).save_pretrained(folder)
    found = load_image_tokenizer(folder)
    assert isinstance(found, SemanticVQModel)
    return found


def pictures(count: int = 3, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return smooth.round().to(torch.uint8)


def test_a_stored_teacher_is_the_same_encoder(made: Path, tmp_path: Path) -> None:
    store_teacher(str(made), tmp_path / "stored")
    before, after = Teacher(made), Teacher(tmp_path / "stored")
    assert after.encoder.fingerprint == before.encoder.fingerprint
    x_NCHW = to_floats(pictures(2, 40))
    grids = [teacher(x_NCHW, (3, 3)) for teacher in (before, after)]
    assert torch.equal(grids[0][0], grids[1][0])
    assert not [file for file in (tmp_path / "stored").iterdir() if file.suffix == ".bin"]
    weights = sum(f.stat().st_size for f in (tmp_path / "stored").glob("*.safetensors"))
    whole = sum(f.stat().st_size for f in made.glob("*.safetensors"))
    assert weights <= whole
    assert before.depth == (0 if before.encoder.family == "SAM" else 4)


def test_a_teacher_sees_what_the_encoder_sees(made: Path) -> None:
    teacher = Teacher(made)
    side = 32 if teacher.encoder.family == "SAM" else SIDE
    pixels_NCHW = pictures(2, side)
    expected_NPd = load_encoder(made, "patch", grids=True)(to_pil(pixels_NCHW))
    cells = side // 8
    found_Ndhw = teacher(to_floats(pixels_NCHW), (cells, cells))[-1]
    assert torch.allclose(found_Ndhw.flatten(2).transpose(1, 2), expected_NPd, atol=1e-4)


def test_layers_are_blocks_and_the_last_is_the_encoders_own(made: Path) -> None:
    plain = Teacher(made)
    if plain.depth == 0:
        assert plain.spread() == ()
        with pytest.raises(ValueError, match=r"no block 1 .* leave out"):
            Teacher(made, (1,))
        return
    assert plain.spread() == (1, 2, 3, 4)
    x_NCHW = to_floats(pictures(2, SIDE))
    grids = Teacher(made, (2, 4))(x_NCHW, (3, 3))
    assert torch.equal(grids[1], plain(x_NCHW, (3, 3))[0])
    pixels_NCHW = plain.encoder.preprocess(to_pil(pictures(2, SIDE)))
    states = plain.encoder.model(pixel_values=pixels_NCHW, output_hidden_states=True).hidden_states
    assert torch.allclose(grids[0].flatten(2).transpose(1, 2), states[2][:, -9:], atol=1e-4)
    with pytest.raises(ValueError, match=r"no block 5 .* choose from 1 to 4"):
        Teacher(made, (5,))


def test_cells_keep_their_place_on_another_grid() -> None:
    teacher = Teacher(load_encoder_folder())
    x_1CHW = torch.full((1, 3, 64, 64), -1.0)
    changed_1CHW = x_1CHW.clone()
    changed_1CHW[:, :, 48:, :16] = 1.0  # the lower left corner
    for grid in ((4, 4), (8, 8), (16, 16)):
        a_1dhw, b_1dhw = (teacher(x, grid)[0] for x in (x_1CHW, changed_1CHW))
        moved_hw = (a_1dhw - b_1dhw).square().sum(dim=(0, 1))
        row, column = divmod(int(moved_hw.argmax()), grid[1])
        assert row >= grid[0] * 3 // 4
        assert column < grid[1] // 4


def load_encoder_folder() -> Path:
    from arra.resolve import resolve_folder

    return resolve_folder("builtin:scenes-clip", "encoder")


def test_spelling_of_layers() -> None:
    assert split_layers("builtin:scenes-clip") == ("builtin:scenes-clip", ())
    assert split_layers("some/encoder@12,3,6") == ("some/encoder", (3, 6, 12))
    assert split_layers("./a@b/encoder") == ("./a@b/encoder", ())
    for wrong in ("some/encoder@mean", "some/encoder@0", "some/encoder@1,"):
        with pytest.raises(ValueError, match="blocks of the encoder"):
            split_layers(wrong)


def test_codes_and_pixels_come_back_from_the_folder(
    tokenizer: SemanticVQModel, tmp_path: Path
) -> None:
    pixels_NCHW = pictures()
    codes_NHW = tokenizer.encode(pixels_NCHW)
    assert codes_NHW.shape == (3, 8, 8)
    assert tokenizer.decode(codes_NHW).shape == (3, 3, 64, 64)
    assert (tokenizer.factor, tokenizer.image_size, tokenizer.codebook_size) == (8, 64, 32)
    tokenizer.save_pretrained(tmp_path / "copy")
    shutil.move(tmp_path / "copy", tmp_path / "elsewhere")  # nothing points outside
    again = load_image_tokenizer(tmp_path / "elsewhere")
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(pixels_NCHW), codes_NHW)
    assert torch.equal(again.decode(codes_NHW), tokenizer.decode(codes_NHW))


def test_the_frozen_encoder_is_in_no_state_and_learns_nothing(tokenizer: SemanticVQModel) -> None:
    assert not [name for name in tokenizer.state_dict() if "teacher" in name]
    tokenizer.train()
    assert not tokenizer.teacher.encoder.model.training
    x_NCHW = to_floats(pictures())
    assert all(not layer.requires_grad for layer in tokenizer.given(x_NCHW))
    assert torch.equal(tokenizer.latents(x_NCHW), tokenizer.latents_of(tokenizer.given(x_NCHW)))
    tokenizer.eval()
    half = tokenizer.teacher.encoder.model.dtype
    assert half == torch.float32


def test_damage_and_another_encoder_are_named(tokenizer: SemanticVQModel, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "whole")
    other = shutil.copytree(tmp_path / "whole", tmp_path / "other")
    shutil.rmtree(other / ENCODER)
    with pytest.raises(ValueError, match=r"frozen encoder .* is missing"):
        load_image_tokenizer(other)
    store_teacher("builtin:scenes-judge", other / ENCODER)
    with pytest.raises(ValueError, match=r"not the encoder that .* was fitted with"):
        load_image_tokenizer(other)
    flipped = shutil.copytree(tmp_path / "whole", tmp_path / "flipped")
    file = flipped / ENCODER / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"not the encoder that .* was fitted with"):
        load_image_tokenizer(flipped)
    (flipped / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_image_tokenizer(flipped)


def test_every_part_counts_in_the_fingerprint(tokenizer: SemanticVQModel) -> None:
    before = tokenizer.fingerprint
    for name, value in (("encoder_layers", [1, 3]), ("encoder_sha256", "0" * 64)):
        kept = getattr(tokenizer.config, name)
        setattr(tokenizer.config, name, value)
        assert tokenizer.fingerprint != before
        setattr(tokenizer.config, name, kept)
    assert tokenizer.fingerprint == before


def test_the_teachers_loss_is_one_minus_cosine_and_falls() -> None:
    loss = TeacherLoss(channels=6, dim=5)
    trunk_NChw, taught_Ndhw = torch.randn(2, 6, 3, 3), torch.randn(2, 5, 3, 3)
    found_Ndhw = loss.head(trunk_NChw).detach()
    cosine = [
        float(torch.dot(a, b) / (a.norm() * b.norm()))
        for a, b in zip(
            found_Ndhw.permute(0, 2, 3, 1).reshape(-1, 5),
            taught_Ndhw.permute(0, 2, 3, 1).reshape(-1, 5),
            strict=True,
        )
    ]
    assert loss(trunk_NChw, taught_Ndhw).item() == pytest.approx(1 - sum(cosine) / len(cosine))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2)
    first = float(loss(trunk_NChw, taught_Ndhw).detach())
    for _ in range(100):
        optimizer.zero_grad()
        loss(trunk_NChw, taught_Ndhw).backward()
        optimizer.step()
    assert loss(trunk_NChw, taught_Ndhw).item() < 0.2 * first
