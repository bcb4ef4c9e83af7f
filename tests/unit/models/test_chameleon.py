"""Chameleon, Anole, Lumina-mGPT and ARRA's release, from tiny folders written as they publish."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    ChameleonForConditionalGeneration,
)

from arra.cli import main
from arra.config import ModelConfig, OptimConfig
from arra.files import read_json
from arra.generate.pipeline import Pipeline
from arra.image_tokenizers.vq import VQConfig, VQModel
from arra.layout import Image, Text
from arra.models import load_model
from arra.models.chameleon import Chameleon, LuminaMGPT
from arra.models.loading import load_for_training
from arra.objective import Feature, Objective, Target
from arra.train.optim import build_optimizer

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
from formula import fill, ints
from painted_logits import fed
from tiny_chameleon import (
    CODE_IDS,
    CODES,
    NAMES,
    change_config,
    keep_tensors,
    publish,
    publish_lumina,
    tiny,
)

GOLDEN = read_json(Path(__file__).parents[2] / "golden" / "chameleon.json")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("anole"))


@pytest.fixture(scope="module")
def lumina(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_lumina(tmp_path_factory.mktemp("lumina"))


@pytest.fixture(scope="module")
def vq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vq")
    torch.manual_seed(1)
    config = VQConfig(
        image_size=16,
        base_channels=4,
        channel_multipliers=(1, 1),
        res_blocks=1,
        middle_attention=False,
        norm_groups=2,
        z_channels=4,
        codebook_size=CODES,
        codebook_dim=3,
    )
    VQModel(config).save_pretrained(folder)
    return folder


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ---- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("swin", [False, True])
@torch.no_grad()
def test_logits_are_those_of_transformers_but_for_its_mask(swin: bool, tmp_path: Path) -> None:
    backbone = load_model(publish(tmp_path, tiny(swin)))  # the probes of head, tap and cache pass
    original = ChameleonForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, backbone.vocab_size, (2, 20))
    output = original(input_ids=ids, output_hidden_states=True)
    with backbone.tap([1, 2]) as taps:
        logits = backbone.head(backbone.last_hidden(ids))
    codes = list(backbone.layout.code_ids)
    text = [token for token in range(backbone.vocab_size) if token not in codes]
    assert relative(logits[..., text], output.logits[..., text]) <= 1e-6
    assert bool((output.logits[..., codes] == torch.finfo(torch.float32).min).all())
    own = original.lm_head(output.hidden_states[-1])
    assert relative(logits[..., codes], own[..., codes]) <= 1e-6
    assert torch.equal(taps[1], output.hidden_states[1])
    assert torch.equal(backbone.model.model.norm(taps[2]), output.hidden_states[2])


@pytest.mark.parametrize("key", ["norm", "swin"])
@torch.no_grad()
def test_logits_are_those_of_lumina_mgpts_code(key: str, tmp_path: Path) -> None:
    """Norms stored per shard; heads that share keys; weights by formula, outputs recorded."""
    golden = GOLDEN["logits"][key]
    swin, kv_heads = {"norm": (False, 4), "swin": (True, 2)}[key]
    publish_lumina(tmp_path, tiny(swin, kv_heads))
    stored = {name: fill(name, tuple(shape)) for name, shape in golden["shapes"].items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, model_parallel_size=2)
    backbone = load_model(tmp_path)
    logits = backbone.head(backbone.last_hidden(ints("ids", (2, 12), backbone.vocab_size)))
    found = logits[:, ::3][..., golden["columns"]]
    assert relative(found, torch.tensor(golden["logits"])) <= 1e-5
    # Its own code opens our export: as many shards as heads, unless heads share keys.
    shards = backbone.model.config.model_parallel_size
    assert shards == (4 if kv_heads == 4 else 2)


def test_the_format_is_told_by_content(published: Path, lumina: Path, tmp_path: Path) -> None:
    assert type(load_model(published)) is Chameleon
    opened = load_model(lumina)
    assert type(opened) is LuminaMGPT
    assert "{width}x{height}" in opened.layout.wording
    publish_lumina(tmp_path)
    projector = {"adaptor.layers.0.weight": torch.zeros(2, 2)}
    keep_tensors(tmp_path, lambda name: True, **projector)
    released = load_model(tmp_path)
    assert type(released) is LuminaMGPT
    assert released.layout.wording == ""
    assert "adaptor.layers.0.weight" not in released.model.state_dict()


def test_a_format_that_cannot_be_told_must_be_said(published: Path, tmp_path: Path) -> None:
    publish(tmp_path)
    change_config(tmp_path, architectures=["SomebodysChameleon"])
    with pytest.raises(ValueError, match=r"SomebodysChameleon.*say which with --format: chameleon"):
        load_model(tmp_path)
    assert load_model(tmp_path, published_format="arra").layout.style == "lumina"
    with pytest.raises(ValueError, match="no Chameleon format 'luminous'; there is chameleon, lum"):
        load_model(published, published_format="luminous")


def test_codes_are_the_permuted_image_tokens(published: Path) -> None:
    layout = load_model(published).layout
    assert list(layout.code_ids) == GOLDEN["codes"] == CODE_IDS
    ids = torch.tensor(layout.code_ids)
    assert layout.ids_to_codes(ids).tolist() == list(range(CODES))
    model = load_model(published).model.model
    assert model.vocabulary_mapping.img2bpe == dict(enumerate(layout.code_ids))


# ---- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["sequences"], ids=lambda case: case["text"])
def test_sequences_are_those_of_the_original_item_processor(
    case: dict[str, Any], lumina: Path
) -> None:
    name = "lumina" if case["wording"] else "arra"
    backbone = load_model(lumina, published_format=name)
    grid = height, width = case["height"] // 16, case["width"] // 16
    prompt = backbone.condition(case["text"], grid)
    assert prompt == case["prompt"]
    codes = tuple((7 * r + 3 * c + 1) % CODES for r in range(height) for c in range(width))
    sample = backbone.layout.sample([Text(tuple(prompt)), Image(codes, height, width)])
    assert sample.ids == case["ids"]
    assert sample.trained == [label >= 0 for label in case["labels"]]
    aligned = [image >= 0 for image, _ in sample.sets["hybnext"]]
    assert sum(aligned) == height * width


def test_unguided_rows_and_defaults(published: Path, lumina: Path) -> None:
    anole, sized = load_model(published), load_model(lumina)
    assert anole.condition("a", (2, 2)) == [NAMES["<s>"], NAMES["a"], NAMES["<reserved08706>"]]
    for empty in (anole.null_condition((2, 2)), anole.condition("", (2, 2))):
        assert empty == [NAMES["<s>"]]
    assert sized.without_prompt(sized.condition("a", (2, 2)), (2, 2)) == []
    assert anole.sampling == {"cfg": 3.0, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
    assert sized.sampling == {"cfg": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0}
    long = sized.condition("a fox " * 200, (2, 2))
    assert len(long) == sized.room((2, 2))
    assert long[-1] == NAMES["<reserved08706>"]
    with pytest.raises(ValueError, match="multiples of 2"):
        sized.layout.image_length(3, 2)


def test_a_caption_cannot_paint(published: Path) -> None:
    backbone = load_model(published)
    ids = backbone.text_ids("<racm3:break>")
    assert NAMES["<racm3:break>"] not in ids
    assert len(ids) == len("<racm3:break>")


# ---- painting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chameleon", "lumina"])
def test_guided_pictures_have_their_format(
    name: str, published: Path, lumina: Path, vq_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published if name == "chameleon" else lumina
    pipe = Pipeline.from_pretrained(folder, image_tokenizer=vq_folder, grid=(2, 4))
    backbone = pipe.backbone
    with fed(backbone, monkeypatch) as rows:
        codes = pipe.codes(["a fox"], slots=2)
    assert codes.shape == (1, 2, 4)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < CODES
    image = Image(tuple(codes.flatten().tolist()), 2, 4)
    guided = tuple(backbone.condition("a fox", (2, 4)))
    unguided = tuple(backbone.null_condition((2, 4)))
    for row, before in enumerate((guided, unguided)):
        expected = backbone.layout.sample([*([Text(before)] if before else []), image]).ids
        behind = len(expected) - 1 - expected[::-1].index(backbone.layout.code_ids[codes[0, 1, 3]])
        assert rows[row] == expected[:behind]  # the last code and what follows it are not fed
    assert pipe("a fox")[0].size == (8, 4)


def test_top_k_counts_image_codes(lumina: Path, vq_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(lumina, image_tokenizer=vq_folder, grid=(2, 2))
    greedy = pipe.codes(["a fox"] * 2, [0, 1], temperature=0)
    assert torch.equal(pipe.codes(["a fox"] * 2, [0, 1], top_k=1), greedy)


def test_generate_and_its_refusals(
    lumina: Path, published: Path, vq_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    command = ["generate", str(lumina), "a fox", "--num", "1", "--slots", "2", "--out", str(out)]
    assert main([*command, "--image-tokenizer", str(vq_folder), "--grid", "2", "4"]) == 0
    settings = read_json(out / "settings.json")
    assert settings["grid"] == [2, 4]
    assert settings["top_k"] == 2000
    assert settings["wording"].startswith("Generate an image of")
    assert (out / "00000-0.png").exists()
    capsys.readouterr()
    assert main([*command, "--grid", "2", "2"]) == 1
    assert "--image-tokenizer" in capsys.readouterr().err
    command[1] = str(published)
    assert main([*command, "--format", "chameleo"]) == 1
    assert "there is chameleon, lumina, arra" in capsys.readouterr().err


# ---- heads that were never taught ----------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_head_without_image_rows_is_named_and_reset_only_when_asked(
    value: float, tmp_path: Path
) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[CODE_IDS] = value
    publish(tmp_path, model)
    with pytest.raises(ValueError, match=r"never taught to paint: the output rows.*reset-image-he"):
        load_model(tmp_path)
    settings: dict[str, Any] = {"codebook_KC": torch.randn(CODES, 3), "captions": [], "seed": 0}
    with pytest.raises(ValueError, match="never taught to paint"):
        load_for_training(tmp_path, ModelConfig(), **settings)
    for new_rows in ("statistics", "codebook"):
        config = ModelConfig(reset_image_head=True, new_rows=new_rows)
        backbone = load_for_training(tmp_path, config, **settings)
        table = backbone.model.lm_head.weight.detach()
        text = [token for token in range(len(table)) if token not in CODE_IDS]
        assert torch.equal(table[text], model.lm_head.weight[text])
        assert 0.3 < float(table[CODE_IDS].std() / table[text].std()) < 3
        assert backbone.cannot_paint() is None


def test_a_trained_head_is_kept(published: Path) -> None:
    settings: dict[str, Any] = {"codebook_KC": torch.zeros(CODES, 3), "captions": [], "seed": 0}
    backbone = load_for_training(published, ModelConfig(), **settings)
    stored = load_file(published / "model.safetensors")["lm_head.weight"]
    assert torch.equal(backbone.model.lm_head.weight, stored)
    with pytest.raises(ValueError, match="reset-image-head is for a published model"):
        load_for_training(None, ModelConfig(reset_image_head=True), **settings)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chameleon", "lumina"])
def test_training_moves_all_but_the_image_encoder(name: str, published: Path, lumina: Path) -> None:
    folder = published if name == "chameleon" else lumina
    settings: dict[str, Any] = {"codebook_KC": torch.zeros(CODES, 3), "captions": [], "seed": 0}
    backbone = load_for_training(folder, ModelConfig(), **settings)
    layout, grid = backbone.layout, (2, 2)
    rng = np.random.default_rng(0)
    samples = []
    for text in ("a fox", "a hat", ""):
        prompt = backbone.condition(text, grid)
        image = Image(tuple(rng.integers(0, CODES, 4).tolist()), *grid)
        samples.append(layout.sample([Text(tuple(prompt)), image] if prompt else [image]))
    batch = layout.collate(samples)
    target = Target("clip", dim=6, layers=(1,))
    objective = Objective(backbone.hidden_size, [target])
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    optimizer = build_optimizer(backbone.model, objective, OptimConfig(lr=1e-2))
    values = torch.randn(3, 6)
    feature = Feature(values, values.mean(0), values.mean(0))
    losses = []
    for _ in range(20):
        with backbone.tap([1]) as taps:
            last = backbone.last_hidden(batch.ids_BT)
        terms = objective(taps, last, backbone.head, batch, {"clip": feature})
        loss = terms.total(objective.counts(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [n for n, p in backbone.model.named_parameters() if torch.equal(p, before[n])]
    assert all(name.startswith("model.vqmodel.") for name in still)
    assert bool(still) == (name == "chameleon")


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_opened_is_written_back_byte_by_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = publish(tmp_path / "in", tiny().to(dtype))
    backbone = load_model(folder)
    assert backbone.model.dtype == dtype
    backbone.save(tmp_path / "out")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    model, found = ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "out" / "model", dtype="auto", output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, backbone.vocab_size, (1, 9))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, backbone.model(input_ids=ids).logits)
    words = "a fox\na hat"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert tokenizer(words, add_special_tokens=False)["input_ids"] == backbone.text_ids(words)


def test_no_image_encoder_is_made_up(lumina: Path, tmp_path: Path) -> None:
    backbone = load_model(lumina)
    backbone.save(tmp_path)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == load_file(lumina / "model.safetensors").keys()
    empty = Chameleon.empty_model(tmp_path / "model")
    assert empty.state_dict().keys() == stored.keys()


def test_weights_change_type_only_when_asked(tmp_path: Path) -> None:
    folder = publish(tmp_path, tiny().to(torch.bfloat16))
    frequencies = load_model(folder).model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert load_model(folder, dtype="float32").model.dtype == torch.float32
    settings: dict[str, Any] = {"codebook_KC": torch.zeros(CODES, 3), "captions": [], "seed": 0}
    for asked, expected in (("float32", torch.float32), ("auto", torch.bfloat16)):
        backbone = load_for_training(folder, ModelConfig(dtype=asked), **settings)
        assert {p.dtype for p in backbone.model.parameters()} == {expected}


# ---- what is refused -----------------------------------------------------------------------------


def no_map(folder: Path) -> None:
    change_config(folder, vocabulary_map=None)


def no_codes(folder: Path) -> None:
    names = {n: t for n, t in NAMES.items() if not n.startswith("IMGIMG")}
    change_config(folder, vocabulary_map=names)


def lost_code(folder: Path) -> None:
    names = {n: t for n, t in NAMES.items() if n != "IMGIMGDZ"}
    change_config(folder, vocabulary_map=names)


def other_tokenizer(folder: Path) -> None:
    change_config(folder, vocabulary_map=NAMES | {"<eoss>": 21, "<racm3:break>": 20})


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lost_tensor(folder: Path) -> None:
    keep_tensors(folder, lambda name: name != "model.norm.weight")


def unknown_tensor(folder: Path) -> None:
    keep_tensors(folder, lambda name: True, extra=torch.zeros(1))


def other_width(folder: Path) -> None:
    change_config(folder, intermediate_size=64)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_map, "config.json has no vocabulary_map"),
        (no_codes, "no image tokens"),
        (lost_code, "no token for image code 3"),
        (other_tokenizer, "belong to different models"),
        (no_tokenizer, "has no tokenizer.json"),
        (no_weights, "found no such file"),
        (pickled, "found pickled weights"),
        (cut_off, "is cut off or damaged"),
        (lost_shard, "model-00002-of-00002.safetensors"),
        (lost_tensor, "1 missing \\(model.norm.weight"),
        (unknown_tensor, "1 unknown \\(extra"),
        (other_width, "has the shape \\(32, 48\\), its config.json describes \\(32, 64\\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_folder_gets_one_sentence(damage: Any, said: str, tmp_path: Path) -> None:
    publish(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_sizes_need_their_tokens(tmp_path: Path) -> None:
    publish(tmp_path)
    change_config(
        tmp_path, vocabulary_map={n: t for n, t in NAMES.items() if n != "<reserved08799>"}
    )
    with pytest.raises(ValueError, match="no tokens for sizes and row ends"):
        load_model(tmp_path, published_format="lumina")
