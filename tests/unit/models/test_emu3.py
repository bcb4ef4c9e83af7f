"""Emu3: sizes are digits of text; compared live with transformers' classes."""

import json
import re
from pathlib import Path

import painter_commands
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from tiny_painters import BOS, emu3_special_tokens, emu3_tokenizer, publish_emu3
from tiny_painters import EMU3_CODES as CODES
from transformers import Emu3ForConditionalGeneration

from arra.generate.engine import Engine
from arra.generate.request import Request
from arra.generate.settings import Sampling
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.vq import to_bytes
from arra.layout import Image, Layout, Text
from arra.models import load_model
from arra.models.emu3 import Emu3

GRID = (3, 4)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_emu3(tmp_path_factory.mktemp("emu3"), emu3_tokenizer(emu3_special_tokens()))


@pytest.fixture
def backbone(published: Path) -> Emu3:
    found = load_model(published)  # the probes pass
    assert isinstance(found, Emu3)
    return found


def original(published: Path) -> Emu3ForConditionalGeneration:
    return Emu3ForConditionalGeneration.from_pretrained(published).eval()


def written(text: str, codes: list[int] | None = None) -> str:
    """A sequence in the words of the original processor and dataset."""
    rows = "".join(
        "".join(f"<|visual token {c:06d}|>" for c in (codes or [])[row * 4 : row * 4 + 4])
        + "<|extra_200|>"
        for row in range(GRID[0])
    )
    end = f"{rows}<|extra_201|><|image end|>" if codes else ""
    return f"{BOS}{text}<|image start|>3*4<|image token|>{end}"


def test_a_sequence_is_the_published_format(backbone: Emu3) -> None:
    tokenizer, codes = backbone.text_tokenizer, [(7 * i) % CODES for i in range(12)]
    prompt = Text(tuple(backbone.condition("a red circle", GRID)))
    sample = backbone.layout.sample([prompt, Image(tuple(codes), *GRID)])
    expected = tokenizer(written("a red circle", codes), add_special_tokens=False)["input_ids"]
    assert sample.ids == expected
    held = [
        token
        for token, (_, cell) in zip(sample.ids, sample.sets["holding"], strict=True)
        if cell >= 0
    ]
    assert backbone.layout.ids_to_codes(torch.tensor(held)).tolist() == codes
    assert Layout.from_json(json.loads(json.dumps(backbone.layout.to_json()))) == backbone.layout
    assert backbone.null_condition(GRID) == [tokenizer.bos_token_id]
    assert backbone.sampling["cfg"] == 3
    assert backbone.sampling["top_k"] == 2048


def test_names_of_codes_in_a_prompt_stay_text(backbone: Emu3) -> None:
    ids = backbone.condition("a <|visual token 000003|>", GRID)
    assert not set(ids) & set(backbone.layout.code_ids)


def test_weights_come_back_byte_for_byte(published: Path, tmp_path: Path) -> None:
    load_model(published).save(tmp_path)
    before = load_file(published / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


@torch.no_grad()
def test_logits_are_those_of_transformers(published: Path, backbone: Emu3) -> None:
    text = written("a red circle", list(range(12)))
    ids = backbone.text_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    theirs = original(published)(input_ids=ids).logits
    ours = backbone.head(backbone.last_hidden(ids))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_greedy_guided_pictures_are_those_of_transformers(published: Path, backbone: Emu3) -> None:
    """The same codes as `generate` with the documented constraint, and the same pixels."""
    model, tokenizer = original(published), backbone.text_tokenizer
    (height, width), known = GRID, tokenizer.get_vocab()
    inputs = tokenizer(written("a red circle"), add_special_tokens=False, return_tensors="pt")
    null = tokenizer(written(""), add_special_tokens=False, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    ends = [known["<|extra_201|>"], known["<|image end|>"], tokenizer.eos_token_id]

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        step = len(ids) - prompt
        if step >= height * (width + 1):
            return [ends[step - height * (width + 1)]]
        is_end = step % (width + 1) == width
        return [known["<|extra_200|>"]] if is_end else list(backbone.layout.code_ids)

    theirs = model.generate(
        **inputs,
        max_new_tokens=height * (width + 1) + 3,
        prefix_allowed_tokens_fn=allowed,
        guidance_scale=3.0,
        negative_prompt_ids=null["input_ids"],
        negative_prompt_attention_mask=null["attention_mask"],
        do_sample=False,
    )[:, prompt:]
    greedy = Sampling(cfg=3.0, temperature=0.0)
    request = Request(tuple(backbone.condition("a red circle", GRID)), 0, GRID, greedy)
    ours = torch.stack(Engine(backbone, slots=2).paint([request]))
    rows = theirs[:, :-3].view(1, height, width + 1)
    assert set(rows[..., -1].flatten().tolist()) == {known["<|extra_200|>"]}
    assert torch.equal(backbone.layout.ids_to_codes(rows[..., :-1]), ours)
    assert len(set(ours.flatten().tolist())) > 3, "the comparison needs some variety"
    pixels = model.decode_image_tokens(image_tokens=theirs, height=height, width=width)
    assert torch.equal(load_image_tokenizer(published).decode(ours), to_bytes(pixels))


@torch.no_grad()
def test_codes_are_those_of_transformers(published: Path, tmp_path: Path) -> None:
    tokenizer = load_image_tokenizer(published)
    assert (tokenizer.codebook_size, tokenizer.factor) == (CODES, 2)
    assert tokenizer.codebook.shape == (CODES, 4)
    pixels = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    values = pixels.float() / 127.5 - 1
    theirs = original(published).model.vqmodel.encode(values, image_sizes=[(6, 8)] * 2).image_tokens
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes, torch.stack(theirs))
    tokenizer.save_pretrained(tmp_path / "own")
    again = load_image_tokenizer(tmp_path / "own")
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))
    with pytest.raises(ValueError, match="multiples of 2"):
        tokenizer.encode(pixels[..., :7])
    with pytest.raises(ValueError, match=f"codes are 0..{CODES - 1}"):
        tokenizer.decode(codes + CODES)


def test_pixels_have_the_range_that_the_folder_says(published: Path, tmp_path: Path) -> None:
    plain = load_image_tokenizer(published)
    plain.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.3] * 3}))
    shifted = load_image_tokenizer(tmp_path)
    assert shifted.fingerprint != plain.fingerprint
    codes = torch.arange(4).view(1, 2, 2)
    assert not torch.equal(shifted.decode(codes), plain.decode(codes))


def test_wrong_folders_are_refused_in_one_sentence(published: Path, tmp_path: Path) -> None:
    merged = emu3_tokenizer(emu3_special_tokens())
    merged.add_tokens(["12"])  # spells 12 as one token
    cases = {
        "number by number": (publish_emu3(tmp_path / "a", merged), "does not spell numbers"),
        "unnumbered": (
            publish_emu3(tmp_path / "b", emu3_tokenizer(emu3_special_tokens()[:-1])),
            "vocabulary_map has 19 visual tokens",
        ),
    }
    (published / "tokenizer.json").rename(tmp_path / "kept.json")
    try:
        with pytest.raises(ValueError, match="has no tokenizer"):
            load_model(published)
    finally:
        (tmp_path / "kept.json").rename(published / "tokenizer.json")
    for folder, words in cases.values():
        with pytest.raises(ValueError, match=words):
            load_model(folder)


def logits(model: Emu3ForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


FULL = (r"\.text_model\.", "^lm_head")
ADAPTED = (r"\.layers\.\d\.\w+\.\w+_proj\.", "embed_tokens", "^lm_head")
"""Patterns of the parameters that training moves: all of them, and none besides."""


@pytest.mark.parametrize(("options", "moving"), [((), FULL), (("--lora.rank", 4), ADAPTED)])
def test_the_commands_align_it_and_give_back_a_folder_of_transformers(
    published: Path, tmp_path: Path, options: tuple[object, ...], moving: tuple[str, ...]
) -> None:
    """prepare, train adapt, export, generate: what should move moves, and nothing else does."""
    if options:
        pytest.importorskip("peft")
    export = painter_commands.adapt(published, tmp_path, 8, *options)
    before = original(published)
    after = Emu3ForConditionalGeneration.from_pretrained(export / "model", output_loading_info=True)
    model, found = after
    assert not any(found.values()), "the export is whole"
    moved = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        should = any(re.search(pattern, name) for pattern in moving)
        assert torch.equal(parameter, moved[name]) != should, name
    ours = load_model(export)
    said = model.generation_config  # how to paint, in place of how to write
    assert (said.eos_token_id, said.pad_token_id) == (ours.layout.end, ours.layout.pad)
    ids = torch.tensor([[*ours.condition("a red circle", GRID), *ours.layout.code_ids[:5]]])
    with torch.no_grad():
        assert torch.equal(ours.head(ours.last_hidden(ids)), logits(model.eval(), ids))
    for folder in (published, export):
        out = tmp_path / f"pictures-{folder.name}"
        painter_commands.run(
            *("generate", folder, "a red circle", "a star", "--out", out, "--num", 1, "--slots", 2),
            *("--device", "cpu", *("--grid", 3, 4)),
        )
        assert [PIL.Image.open(f).size for f in sorted(out.glob("0*.png"))] == [(8, 6)] * 2
