"""Janus: its codes have a table and a head of their own; compared live with transformers."""

import copy
import re
import shutil
from pathlib import Path

import painter_commands
import PIL.Image
import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file
from tiny_painters import JANUS_CODES as CODES
from tiny_painters import publish_janus
from transformers import JanusForConditionalGeneration

from arra.generate.engine import Engine
from arra.generate.request import Request
from arra.generate.settings import Sampling
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.vq import to_bytes
from arra.layout import Layout
from arra.models import load_model
from arra.models.janus import AFTER, BEFORE, Janus

GRID = (3, 3)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture
def backbone(published: Path) -> Janus:
    found = load_model(published)  # the probes pass
    assert isinstance(found, Janus)
    return found


def original(published: Path) -> JanusForConditionalGeneration:
    return JanusForConditionalGeneration.from_pretrained(published).eval()


def prompt(text: str) -> str:
    return f"<bos>{BEFORE}{text}{AFTER}<begin_of_image>"


def test_a_published_folder_is_recognised(backbone: Janus) -> None:
    assert backbone.default_grid == GRID
    assert backbone.vocab_size == CODES
    assert backbone.layout.style == "grid"
    assert backbone.layout.ids_to_codes(torch.arange(CODES)).tolist() == list(range(CODES))
    assert Layout.from_json(backbone.layout.to_json()) == backbone.layout
    assert backbone.sampling["cfg"] == 5


@pytest.mark.parametrize("text", ["a red circle", ": x", "  padded  "])
def test_prompts_are_the_template_tokenized_as_one(backbone: Janus, text: str) -> None:
    tokenizer = backbone.text_tokenizer
    expected = tokenizer(prompt(text.strip()), add_special_tokens=False)["input_ids"]
    ids = backbone.condition(text, GRID)
    assert ids == [CODES + token for token in expected]
    pad = CODES + tokenizer.pad_token_id
    dropped = backbone.without_prompt(ids, GRID)
    assert dropped == [ids[0], *[pad] * (len(ids) - 2), ids[-1]]
    assert set(backbone.null_condition(GRID)[1:-1]) == {pad}


def test_names_of_special_tokens_in_a_prompt_stay_text(backbone: Janus) -> None:
    ids = backbone.condition("a <begin_of_image><|Assistant|> b", GRID)
    assert ids.count(backbone._begin_image) == 1
    long = backbone.condition("a red circle " * 40, GRID)
    assert len(long) == backbone.room(GRID)
    assert long[-1] == backbone._begin_image
    after = backbone.text_tokenizer(AFTER, add_special_tokens=False)["input_ids"]
    assert long[-1 - len(after) : -1] == [CODES + token for token in after]


def test_weights_come_back_byte_for_byte(published: Path, tmp_path: Path) -> None:
    load_model(published).save(tmp_path)
    before = load_file(published / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


@torch.no_grad()
def test_logits_are_those_of_transformers(published: Path, backbone: Janus) -> None:
    model = original(published)
    text = backbone.condition("a red circle", GRID)
    codes = torch.randint(0, CODES, (1, 9))
    ours = backbone.head(backbone.last_hidden(torch.cat([torch.tensor([text]), codes], 1)))
    inputs = torch.cat(
        [
            model.get_input_embeddings()(torch.tensor([text]) - CODES),
            model.prepare_embeddings_for_image_generation(codes),
        ],
        1,
    )
    theirs = model.model.generation_head(model.model(inputs_embeds=inputs).last_hidden_state)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="the reference itself, JanusForConditionalGeneration.generate, raises in 5.17",
)
@torch.no_grad()
def test_greedy_guided_pictures_are_those_of_transformers(published: Path, backbone: Janus) -> None:
    """The same codes as `generate(generation_mode="image")`, and the same pixels."""
    model = original(published)
    texts = ["a red circle", "a blue square, a red one"]
    tokenizer = copy.deepcopy(backbone.text_tokenizer)
    tokenizer.padding_side = "left"
    inputs = tokenizer(
        [prompt(t) for t in texts], padding=True, return_tensors="pt", add_special_tokens=False
    )
    theirs = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_mode="image",
        do_sample=False,
    )
    greedy = Sampling(cfg=5.0, temperature=0.0)
    requests = [Request(tuple(backbone.condition(t, GRID)), 0, GRID, greedy) for t in texts]
    ours = torch.stack(Engine(backbone, slots=4).paint(requests))
    assert ours.flatten(1).tolist() == theirs.tolist()
    assert len(set(theirs.flatten().tolist())) > 4, "the comparison needs some variety"
    pixels = load_image_tokenizer(published).decode(ours)
    assert torch.equal(pixels, to_bytes(model.decode_image_tokens(theirs).permute(0, 3, 1, 2)))


def logits(model: JanusForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    text = model.get_input_embeddings()((ids - CODES).clamp(min=0))
    code = model.prepare_embeddings_for_image_generation(ids.clamp(max=CODES - 1))
    inputs = torch.where(ids[..., None] < CODES, code, text)
    return model.model.generation_head(model.model(inputs_embeds=inputs).last_hidden_state)


FULL = (r"\.language_model\.", r"\.generation_")
ADAPTED = (r"\.language_model\.layers\.\d\.\w+\.\w+_proj\.", r"\.generation_")
"""Patterns of the parameters that training moves: all of them, and none besides."""


@pytest.mark.parametrize(("options", "moving"), [((), FULL), (("--lora.rank", 4), ADAPTED)])
def test_the_commands_align_it_and_give_back_a_folder_of_transformers(
    published: Path, tmp_path: Path, options: tuple[object, ...], moving: tuple[str, ...]
) -> None:
    """prepare, train adapt, export, generate: what should move moves, and nothing else does."""
    if options:
        pytest.importorskip("peft")
    export = painter_commands.adapt(published, tmp_path, 6, *options)
    before = original(published)
    after = JanusForConditionalGeneration.from_pretrained(
        export / "model", output_loading_info=True
    )
    model, found = after
    assert not any(found.values()), "the export is whole"
    moved = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        should = any(re.search(pattern, name) for pattern in moving)
        assert torch.equal(parameter, moved[name]) != should, name
    assert model.generation_config.to_diff_dict() == before.generation_config.to_diff_dict()
    ours = load_model(export)
    ids = torch.tensor([[*ours.condition("a red circle", GRID), *ours.layout.code_ids[:5]]])
    with torch.no_grad():
        assert torch.equal(ours.head(ours.last_hidden(ids)), logits(model.eval(), ids))
    for folder in (published, export):
        out = tmp_path / f"pictures-{folder.name}"
        painter_commands.run(
            *("generate", folder, "a red circle", "a star", "--out", out, "--num", 1, "--slots", 2),
            *("--device", "cpu"),
        )
        assert [PIL.Image.open(f).size for f in sorted(out.glob("0*.png"))] == [(6, 6)] * 2


def test_text_is_not_trained_by_a_head_of_codes(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="exited with 1"):
        painter_commands.adapt(published, tmp_path, 6, "--loss.text")
    assert "its text cannot be trained; leave out --loss.text" in capsys.readouterr().err


def test_wrong_folders_are_refused_in_one_sentence(published: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(published, tmp_path / name))

    weights = load_file(published / "model.safetensors")
    del weights["model.generation_head.vision_head.bias"]
    save_file(weights, copied("missing") / "model.safetensors", {"format": "pt"})
    (copied("truncated") / "model.safetensors").write_bytes(
        (published / "model.safetensors").read_bytes()[:5000]
    )
    (copied("without") / "model.safetensors").unlink()
    copied("another")
    for file in (tmp_path / "another").glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<begin_of", "<start_"))
    for name, words in {
        "missing": "1 tensors are missing, such as model.generation_head.vision_head.bias",
        "truncated": "cannot be loaded as JanusForConditionalGeneration",
        "without": "cannot be loaded as JanusForConditionalGeneration",
        "another": "its text tokenizer has no <begin_of_image>",
    }.items():
        with pytest.raises(ValueError, match=words) as refusal:
            load_model(tmp_path / name)
        assert "\n" not in str(refusal.value)
