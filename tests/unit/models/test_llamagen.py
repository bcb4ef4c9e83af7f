"""LlamaGen against numbers of its own code (tests/golden/llamagen.json), and as a family."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import fill, ints
from torch import Tensor
from transformers import AutoConfig, AutoModel

from arra.config import SIZES, ModelConfig
from arra.foreign import read_foreign, write_original
from arra.generate.engine import Engine
from arra.generate.pipeline import Pipeline
from arra.generate.request import Request
from arra.generate.settings import Sampling
from arra.image_tokenizers.vq import VQConfig, VQModel
from arra.layout import Image, Text
from arra.models import load_model
from arra.models.families import family_named
from arra.models.llamagen import CLASS_SAMPLING, TEXT_SAMPLING, LlamaGen
from arra.models.llamagen_convert import from_original, to_original
from arra.models.llamagen_layers import LlamaGenConfig
from arra.models.llamagen_model import LlamaGenForImageGeneration
from arra.models.probes import check
from arra.objective import Feature, Objective, Target
from arra.text_features import TextFeatures

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "llamagen.json").read_text())
CODES, GRID, SLOTS = 20, (3, 3), 6
ARGUMENTS = argparse.Namespace(image_size=48, downsample_size=16, n_head=2)


def original(kind: str) -> dict[str, Tensor]:
    shapes = GOLDEN[kind]["shapes"]
    return {name: fill(name, tuple(shape), 0.2) for name, shape in shapes.items()}


def golden(kind: str, tmp_path: Path) -> LlamaGen:
    """Through the real way of loading: a file as LlamaGen's training script saves it."""
    file = tmp_path / f"{kind}.pt"
    torch.save({"model": original(kind), "steps": 7, "args": ARGUMENTS}, file)
    backbone = load_model(file)
    assert isinstance(backbone, LlamaGen)
    return backbone


def captions() -> tuple[Tensor, TextFeatures]:
    """Ids (3, 15) and features of the golden captions: one is dropped, all are left-padded."""
    codes = ints("codes", (3, 9), CODES)
    ids = torch.cat([torch.arange(CODES, CODES + SLOTS).expand(3, -1), codes[:, :-1]], 1)
    mask = torch.arange(SLOTS) >= torch.tensor(GOLDEN["text"]["padding"])[:, None]
    dropped = torch.tensor(GOLDEN["text"]["null"])
    return ids, TextFeatures(fill("caption", (3, SLOTS, 12), 1.0), mask, dropped)


def relative(found: Tensor, expected: list[float]) -> float:
    wanted = torch.tensor(expected).view(found.shape)
    return float((found - wanted).abs().max() / wanted.abs().max())


def tiny(condition: str = "class", **changes: Any) -> LlamaGen:
    torch.manual_seed(0)
    config = LlamaGenConfig(
        vocab_size=CODES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        grid_height=3,
        grid_width=4,
        condition=condition,
        num_classes=4,
        id2label=dict(enumerate(["tench", "red fox", "0", "grey_owl"])),
        text_slots=SLOTS,
        caption_dim=12,
        **changes,
    )
    model = LlamaGenForImageGeneration(config).eval()
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return LlamaGen._of(model)


# ---- the original's numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_class_logits_are_the_originals(tmp_path: Path, attention: str) -> None:
    backbone = golden("class", tmp_path)
    backbone.model.set_attn_implementation(attention)
    classes = torch.tensor(GOLDEN["class"]["classes"])[:, None] + CODES
    ids = torch.cat([classes, ints("codes", (2, 9), CODES)[:, :-1]], 1)
    with torch.no_grad():
        logits = backbone.head(backbone.last_hidden(ids))
    assert relative(logits, GOLDEN["class"]["logits"]) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_caption_logits_are_the_originals(tmp_path: Path, attention: str) -> None:
    """Left padding, the learned caption under the mask of its row."""
    backbone = golden("text", tmp_path)
    backbone.model.set_attn_implementation(attention)
    ids, text = captions()
    with torch.no_grad():
        logits = backbone.head(backbone.last_hidden(ids, text))[:, SLOTS - 1 :]
    assert relative(logits, GOLDEN["text"]["logits"]) <= 1e-5


@pytest.mark.parametrize("kind", ["class", "text"])
def test_decoding_is_the_originals(tmp_path: Path, kind: str) -> None:
    """Step by step, each row at a place of its own."""
    backbone, text = golden(kind, tmp_path), None
    if kind == "class":
        classes = torch.tensor(GOLDEN["class"]["classes"])[:, None] + CODES
        ids = torch.cat([classes, ints("codes", (2, 9), CODES)[:, :-1]], 1)
    else:
        ids, text = captions()
    rows, columns = ids.shape
    first, numbers = columns - 8, torch.arange(rows)
    cache = backbone.new_cache(rows, columns + 3)
    logits = torch.empty(rows, 9, CODES)
    for _ in range(2):  # a cache is used again
        with torch.no_grad(), backbone.decoding():
            hidden = backbone.prefill(ids, cache, numbers, text)
            logits[:, 0] = backbone.head(hidden[:, first - 1])
            for step in range(8 + rows):  # row b begins b steps later
                at = (first + step - numbers).clamp(first, columns - 1)
                hidden = backbone.step(ids.gather(1, at[:, None]), at[:, None], cache)
                logits[numbers, at - first + 1] = backbone.head(hidden[:, 0])
        assert relative(logits, GOLDEN[kind]["cached"]) <= 1e-5


def test_painting_is_the_originals_own_generate(tmp_path: Path) -> None:
    """Greedy codes with guidance 2, through our engine."""
    backbone, expected = golden("class", tmp_path), GOLDEN["class"]
    sampling = Sampling(cfg=expected["greedy_cfg"], temperature=0)
    requests = [
        Request(tuple(backbone.condition(str(label), GRID)), 0, GRID, sampling)
        for label in expected["greedy_classes"]
    ]
    painted = Engine(backbone, slots=4).paint(requests)
    assert torch.stack(painted).flatten(1).tolist() == expected["greedy"]


def test_captions_are_painted_as_by_the_originals_generate(tmp_path: Path) -> None:
    """Greedy with guidance 2: the unguided rows have the learned caption under the guided mask."""
    backbone, expected = golden("text", tmp_path), GOLDEN["text"]
    _, text = captions()
    values, mask = text.values_BND[:2].repeat(2, 1, 1), text.mask_BN[:2].repeat(2, 1)
    both = TextFeatures(values, mask, torch.tensor([False, False, True, True]))
    ids = torch.tensor(backbone.condition("", GRID)).expand(4, -1)
    cache = backbone.new_cache(4, SLOTS + 8)
    drawn = []
    with torch.no_grad():
        for step in range(9):
            if step == 0:
                hidden = backbone.prefill(ids, cache, torch.arange(4), both)
            else:
                hidden = backbone.step(ids, torch.full((4, 1), SLOTS + step - 1), cache)
            guided, unguided = backbone.head(hidden[:, -1]).chunk(2)
            drawn.append((unguided + expected["greedy_cfg"] * (guided - unguided)).argmax(-1))
            ids = drawn[-1].repeat(2)[:, None]
    assert torch.stack(drawn, 1).tolist() == expected["greedy"]


def test_a_published_file_paints_pictures(tmp_path: Path) -> None:
    golden("class", tmp_path)
    torch.manual_seed(0)
    sizes = {"base_channels": 4, "res_blocks": 1, "norm_groups": 2, "z_channels": 4}
    config = VQConfig(
        channel_multipliers=(1, 1),
        codebook_size=CODES,
        codebook_dim=3,
        middle_attention=False,
        **sizes,
    )
    VQModel(config).save_pretrained(tmp_path / "vq")
    pipe = Pipeline.from_pretrained(tmp_path / "class.pt", image_tokenizer=tmp_path / "vq")
    assert (pipe.grid, pipe.sampling.cfg, pipe.sampling.top_k) == (GRID, 4.0, 2000)
    assert [image.size for image in pipe(["3", ""])] == [(6, 6), (6, 6)]
    with pytest.raises(ValueError, match="name one with --image-tokenizer"):
        Pipeline.from_pretrained(tmp_path / "class.pt")


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_file_comes_back_byte_for_byte(tmp_path: Path, kind: str) -> None:
    tensors = original(kind)
    model = golden(kind, tmp_path).model
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():  # mapped, so training must not write into the file
        model.output.weight.add_(1.0)
    kept = read_foreign(tmp_path / f"{kind}.pt").tensors["output.weight"]
    assert torch.equal(kept, tensors["output.weight"])
    again = load_model(tmp_path / "ours")
    assert again.sampling == (CLASS_SAMPLING if kind == "class" else TEXT_SAMPLING)
    write_original(tmp_path / "back.pt", {"model": to_original(again.model)})
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert back.keys() == tensors.keys()  # what the original's strict loading asks for
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_files_lie_as_scripts_and_wrappers_leave_them(tmp_path: Path) -> None:
    tensors = original("class")
    compiled = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    painted = tensors | {
        "layers.0.attention.kv_cache.k_cache": torch.zeros(2, 2, 16, 16),
        "freqs_cis": torch.zeros(1 + 9, 8, 2),
    }
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for content in (tensors, {"module": tensors}, {"ema": tensors}, compiled, painted, half):
        file = tmp_path / "model.safetensors.pt"
        torch.save({"args": ARGUMENTS, "model": content}, file)
        model = LlamaGen.from_foreign(read_foreign(file)).model
        given = half if content is half else tensors
        assert all(torch.equal(to_original(model)[name], given[name]) for name in tensors)


def test_the_size_of_the_image_is_told_by_args_or_name() -> None:
    tensors = original("class")
    heads = {"n_head": 2}
    for name, side in {"c2i_B_256.pt": 16, "c2i_XL_384.pt": 24, "t2i_XL_stage2_512.pt": 32}.items():
        config = from_original(tensors, {"args": heads}, name).config
        assert (config.grid_height, config.grid_width) == (side, side)
    said = {"args": {**heads, "image_size": 256, "downsample_size": 8, "drop_path_rate": 0.2}}
    config = from_original(tensors, said, "c2i_B_384.pt").config
    assert (config.grid_height, config.drop_path, config.mlp_dropout) == (32, 0.2, 0.0)
    with pytest.raises(ValueError, match="does not say how large its images are"):
        from_original(tensors, heads, "pytorch_model.bin")


def _lacking(tensors: dict[str, Tensor]) -> None:
    del tensors["layers.1.feed_forward.w3.weight"]


def _misshapen(tensors: dict[str, Tensor]) -> None:
    tensors["output.weight"] = torch.zeros(3, 32)


def _foreign_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["q_norm.weight"] = torch.zeros(3)


def _another_family(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["encoder.conv_in.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (_lacking, r"expected \(96, 32\) as layers.1.feed_forward.w3.weight, found nothing"),
        (_misshapen, r"expected \(20, 32\) as output.weight, found \(3, 32\)"),
        (_foreign_tensor, r"expected nothing as q_norm.weight, found \(3,\)"),
        (_another_family, r"found 1 tensors such as encoder.conv_in.weight"),
    ],
)
def test_a_wrong_file_gets_one_sentence(
    tmp_path: Path, harm: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    tensors = original("class")
    harm(tensors)
    torch.save({"model": tensors, "args": ARGUMENTS}, tmp_path / "c2i.pt")
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path / "c2i.pt")
    torch.save({"model": original("class")}, tmp_path / "c2i_256.pt")
    with pytest.raises(ValueError, match="put n_head into the file's args"):
        load_model(tmp_path / "c2i_256.pt")


@pytest.mark.parametrize(
    ("size", "millions"), [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3097)]
)
def test_published_sizes_take_no_second_copy(size: str, millions: int) -> None:
    """Parameters as published; the tensors of the file become the model's."""
    layers, width, heads, inside = SIZES[size]
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    with torch.device("meta"):
        model = LlamaGenForImageGeneration(LlamaGenConfig(**sizes))
    assert model.config.mlp_width() == inside
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    tensors = to_original(model)  # without memory behind them: nothing may copy or compute
    loaded = from_original(tensors, {}, "c2i_256.pt")
    assert loaded.config.num_attention_heads == heads
    assert all(p.is_meta for p in loaded.parameters())


# ---- as a family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_the_probes_pass(condition: str, kv_heads: int | None) -> None:
    check(tiny(condition, num_key_value_heads=kv_heads))
    assert family_named("llamagen") is LlamaGen


def test_transformers_opens_the_folder(tmp_path: Path) -> None:
    backbone = tiny()
    backbone.save(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path / "model")) is LlamaGenConfig
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model.config.id2label[1] == "red fox"
    ids = torch.tensor([[CODES + 1, 3, 4]])
    torch.testing.assert_close(model(ids).logits, backbone.model(ids).logits, rtol=0, atol=0)


def test_a_class_has_a_number_and_a_name() -> None:
    backbone, grid = tiny(), (3, 4)
    for text, number in {"tench": 0, "1": 1, "Red_Fox": 1, "0": 2, "grey owl": 3, "": 4}.items():
        assert backbone.condition(text, grid) == [CODES + number], text
    assert backbone.null_condition(grid) == [CODES + 4]
    with pytest.raises(ValueError, match=r"there is no class 'tensh'.*0 to 3.*'tench'"):
        backbone.condition("tensh", grid)
    with pytest.raises(ValueError, match="no class '4'"):
        backbone.condition("4", grid)
    with pytest.raises(ValueError, match="paints 3x4 codes"):
        backbone.condition("tench", (4, 4))
    assert backbone.room(grid) == 1
    assert tiny("text").condition("a fox", grid) == list(range(CODES, CODES + SLOTS))


def test_a_datasets_names_are_taken_where_classes_have_none(tmp_path: Path) -> None:
    backbone = golden("class", tmp_path)
    backbone.name_classes(["10", "11", "12", "13", "14"])  # numbers say which
    backbone.name_classes(["n01", "n02"])  # not all classes
    assert backbone.condition("1", GRID) == [CODES + 1]
    names = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
    backbone.name_classes(names)
    assert backbone.condition("n01484850", GRID) == backbone.condition("2", GRID) == [CODES + 2]
    backbone.name_classes(["a", "b", "c", "d", "e"])
    assert backbone.model.config.id2label == dict(enumerate(names))


def test_ids_and_codes_go_both_ways() -> None:
    backbone, codes = tiny(), list(range(12))
    sample = backbone.layout.sample(
        [Text(tuple(backbone.condition("tench", (3, 4)))), Image(tuple(codes), 3, 4)],
        max_length=backbone.max_length,
    )
    assert sample.ids[0] == CODES
    assert backbone.layout.ids_to_codes(torch.tensor(sample.ids[1:])).tolist() == codes


def test_attentions_and_cache_agree_in_float64() -> None:
    backbone = tiny("text")
    backbone.model.double()
    batch, text = batch_of(backbone)
    with torch.no_grad():
        fused = backbone.last_hidden(batch.ids_BT, text)
        backbone.model.set_attn_implementation("eager")
        plain = backbone.last_hidden(batch.ids_BT, text)
        rows, length = batch.ids_BT.shape
        cache = backbone.new_cache(rows, length)
        begun = backbone.prefill(batch.ids_BT, cache, torch.arange(rows), text)
        last = torch.full((rows, 1), length - 1)
        cached = backbone.step(batch.ids_BT[:, -1:], last, cache)
    torch.testing.assert_close(begun, fused, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain, fused, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cached, fused[:, -1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_bfloat16_is_near(condition: str) -> None:
    backbone = tiny(condition)
    batch, text = batch_of(backbone)
    exact = backbone.last_hidden(batch.ids_BT, text)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = backbone.last_hidden(batch.ids_BT, text)
    mixed.square().mean().backward()
    backbone.model.bfloat16()
    half = backbone.last_hidden(batch.ids_BT, text)
    assert half.dtype == torch.bfloat16
    for near in (mixed, half):
        assert (near.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_row_and_a_column_turn_by_themselves() -> None:
    """The same codes, one cell further right or down, are seen from the same distance."""
    backbone = tiny()
    ids = torch.tensor([[CODES, 5, 6]]).expand(3, -1)
    positions = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 5, 6]])
    with torch.no_grad():
        hidden = backbone.model.hidden(ids, positions)
    torch.testing.assert_close(hidden[0], hidden[1])
    torch.testing.assert_close(hidden[0], hidden[2])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_painting_gives_legal_codes(guidance: float) -> None:
    backbone, grid = tiny(), (3, 4)
    sampling = Sampling(cfg=guidance, top_k=2000)
    requests = [
        Request(tuple(backbone.condition(name, grid)), 5, grid, sampling)
        for name in ("tench", "red fox")
    ]
    codes = torch.stack(Engine(backbone, slots=4).paint(requests))
    assert codes.shape == (2, *grid)
    assert ((codes >= 0) & (codes < CODES)).all()
    (alone,) = Engine(backbone, slots=4).paint(requests[1:])
    assert torch.equal(alone, codes[1])


# ---- training ------------------------------------------------------------------------------------


def batch_of(backbone: LlamaGen) -> tuple[Any, TextFeatures | None]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for text in ("tench", "grey_owl", "", "0"):
        codes = torch.randint(0, CODES, (12,), generator=generator).tolist()
        prompt = Text(tuple(backbone.condition(text, (3, 4))))
        rows.append(backbone.layout.sample([prompt, Image(tuple(codes), 3, 4)]))
    if not backbone.text_slots:
        return backbone.layout.collate(rows), None
    values = torch.randn(4, SLOTS, 12, generator=generator)
    mask = torch.arange(SLOTS) >= torch.tensor([0, 2, 4, 5])[:, None]
    return backbone.layout.collate(rows), TextFeatures(values, mask, torch.arange(4) == 2)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_twenty_aligned_steps_move_every_parameter(condition: str) -> None:
    backbone = tiny(condition)
    model = backbone.model.train()
    objective = Objective(32, [Target("clip", 8, (2,))])
    batch, text = batch_of(backbone)
    feature = Feature(torch.randn(4, 8), torch.zeros(8), torch.full((8,), 0.3))
    named = [*model.named_parameters(), *objective.named_parameters()]
    before = {name: p.detach().clone() for name, p in named}
    optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(20):
        with backbone.tap(objective.layers) as taps:
            last = backbone.last_hidden(batch.ids_BT, text)
        loss = objective(taps, last, backbone.head, batch, {"clip": feature}).total()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for name, p in named:
        assert not torch.equal(p, before[name]), name
    if condition == "class":  # classes that were not in the batch stay as they were
        moved = (model.cls_embedding.embedding_table.weight != before[named[0][0]]).any(1)
        assert moved.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("condition", ["class", "text"])
def test_checkpointing_changes_no_gradient(condition: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = tiny(condition, drop_path=0.3)
        model = backbone.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch, text = batch_of(backbone)
        torch.manual_seed(3)
        with backbone.tap([2]) as taps:
            last = backbone.last_hidden(batch.ids_BT, text)
        (taps[2].square().mean() + last.square().mean()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_a_fresh_one_starts_as_the_original() -> None:
    config = ModelConfig(architecture="llamagen", layers=2, hidden_size=64, heads=2, mlp_size=96)
    torch.manual_seed(0)
    backbone = LlamaGen.fresh(config, 512, (2, 3), ["cat", "dog"], 0)
    parameters = dict(backbone.model.named_parameters())
    assert not parameters.pop("output.weight").any()
    for name, p in parameters.items():
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert abs(p.std().item() - 0.02) < 4e-3, name
    assert (backbone.max_length, backbone.condition("dog", (2, 3))) == (7, [513])
    by_text = LlamaGen.fresh(config, 512, (2, 3), ["cat", "dog"], 12)
    assert by_text.text_slots == 120  # LlamaGen's
    caption = by_text.model.cls_embedding.uncond_embedding
    assert abs(caption.std().item() - 12**-0.5) < 0.02
    with pytest.raises(ValueError, match="prepare class folders"):
        LlamaGen.fresh(config, 512, (2, 3), [], 0)


def test_dropouts_act_in_training_only() -> None:
    config = {"token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}
    ids = torch.tensor([[CODES, 1, 2, 3]])
    for name in (*config, "attention_dropout", "drop_path"):
        backbone = tiny(**{**config, name: 0.5})
        torch.nn.init.normal_(backbone.model.layers[2].attention.wo.weight)
        once, twice = backbone.last_hidden(ids), backbone.last_hidden(ids)
        assert torch.equal(once, twice), name
        backbone.model.train()
        many = [backbone.last_hidden(ids) for _ in range(6)]
        assert any(not torch.equal(many[0], other) for other in many[1:]), name


def test_a_head_needs_a_width_for_row_and_column() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        LlamaGenForImageGeneration(LlamaGenConfig(hidden_size=36, num_attention_heads=6))
