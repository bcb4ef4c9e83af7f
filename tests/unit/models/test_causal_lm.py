"""Growing a language model, its probes, and the tap, on tiny models of real architectures."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from arra.config import ModelConfig
from arra.layout import Image, Text
from arra.models.causal_lm import CausalLM, grow
from arra.models.loading import fit_text_tokenizer, load_for_training
from arra.models.probes import check

ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gpt2": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
    "gptj": {"rotary_dim": 8},
    "mistral": {},
}
TOKENIZER = fit_text_tokenizer(["hello world, a circle"] * 3, 300)


def tiny(architecture: str, **extra: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=320,  # more rows than the tokenizer has tokens, as in Qwen
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def grown(architecture: str, codes: int = 64, **extra: object) -> CausalLM:
    return grow(tiny(architecture, **extra), copy.deepcopy(TOKENIZER), codes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture_passes_the_probes(architecture: str) -> None:
    check(grown(architecture, **ARCHITECTURES[architecture]))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
def test_growing_keeps_the_text_logits_bit_for_bit(architecture: str) -> None:
    model = tiny(architecture, **ARCHITECTURES[architecture])
    ids = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        backbone = grow(model, copy.deepcopy(TOKENIZER), 64)
        after = model(ids).logits
    assert torch.equal(after[..., : len(TOKENIZER)], before[..., : len(TOKENIZER)])
    assert backbone.vocab_size == max(320, len(TOKENIZER) + 2 + 64)


def test_a_padded_table_is_not_shrunk() -> None:
    backbone = grown("llama", codes=4)
    assert len(TOKENIZER) + 6 < 320
    assert backbone.vocab_size == 320
    assert backbone.layout.code_ids[0] == len(TOKENIZER) + 2


def test_new_rows_have_the_old_ones_spread_or_the_codebooks_geometry() -> None:
    model = tiny("llama")
    old = model.get_input_embeddings().weight[: len(TOKENIZER)].detach().clone()
    backbone = grow(model, copy.deepcopy(TOKENIZER), 512)
    new = model.get_input_embeddings().weight[list(backbone.layout.code_ids)].detach()
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=4e-3, rtol=0)
    torch.testing.assert_close(new.std(0), old.std(0), atol=0, rtol=0.3)
    codebook = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    model = tiny("llama")
    backbone = grow(model, copy.deepcopy(TOKENIZER), 512, codebook_KC=codebook)
    new = model.get_input_embeddings().weight[list(backbone.layout.code_ids)].detach()
    near = torch.corrcoef(torch.stack([torch.pdist(codebook), torch.pdist(new)]))[0, 1]
    assert near > 0.8, "codes that are near in the codebook start near"


def test_code_names_in_a_caption_stay_text() -> None:
    backbone = grown("llama")
    codes = set(backbone.layout.image_vocabulary())
    assert not codes & set(backbone.condition("a <|code_07|> and <|image|>", (2, 2)))
    assert backbone.condition("", (2, 2)) == backbone.null_condition((2, 2))
    name = backbone.text_tokenizer.convert_ids_to_tokens(backbone.layout.code_ids[7])
    assert name == "<|code_07|>"


@pytest.mark.parametrize("style", ["grid", "chameleon", "lumina"])
def test_every_style_can_be_grown(style: str) -> None:
    backbone = grow(tiny("llama"), copy.deepcopy(TOKENIZER), 16, style=style, rep=True)
    sample = backbone.layout.sample(
        [Text(tuple(backbone.condition("a circle", (2, 2)))), Image(tuple(range(4)), 2, 2)]
    )
    assert max(sample.ids) < backbone.vocab_size
    with pytest.raises(ValueError, match="grown before"):
        grow(backbone.model, backbone.text_tokenizer, 16, style=style)


def test_probes_catch_a_head_that_is_not_the_models() -> None:
    capped = grown("gemma2", head_dim=16, final_logit_softcapping=5.0)
    capped.head.soft_cap = None
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM: head\(hidden\) is not its logits"):
        check(capped)
    scaled = grown("cohere", logit_scale=0.25)
    scaled.head.scale = 1.0
    with pytest.raises(ValueError, match=r"head\(hidden\)"):
        check(scaled)
    biased = grown("phi")
    torch.nn.init.normal_(biased.head.bias)
    check(biased)
    biased.head = copy.deepcopy(biased.head)
    torch.nn.init.zeros_(biased.head.bias)
    with pytest.raises(ValueError, match=r"head\(hidden\)"):
        check(biased)


def test_probes_catch_a_tap_that_is_off_by_one() -> None:
    backbone = grown("llama")
    backbone._blocks = torch.nn.ModuleList([*backbone._blocks[1:], backbone._blocks[0]])
    with pytest.raises(ValueError, match="tap of block 1"):
        check(backbone)


def test_a_model_without_a_key_value_cache_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="MambaForCausalLM has no key/value cache"):
        check(grown("mamba", state_size=8))
    # Its recurrent layers keep a state besides, which does not go back row by row.
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM has no key/value cache"):
        check(grown("recurrent_gemma", logits_soft_cap=5.0))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_tap_has_the_same_gradient_under_checkpointing(reentrant: bool | None) -> None:
    backbone = grown("llama")
    model = backbone.model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    ids = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(0))
    with backbone.tap([2]) as taps:
        last = backbone.last_hidden(ids)
    (taps[2].square().mean() + last.square().mean()).backward()
    reference = grown("llama")
    hidden = reference.model.train()(ids, output_hidden_states=True).hidden_states
    (hidden[2].square().mean() + hidden[-1].square().mean()).backward()
    for (name, p), q in zip(model.named_parameters(), reference.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)


def test_alignment_reaches_blocks_up_to_the_tap_and_nothing_above() -> None:
    backbone = grown("llama")
    ids = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(0))
    with backbone.tap([2]) as taps:
        backbone.last_hidden(ids)
    taps[2].square().mean().backward()
    for block, reached in zip(backbone.blocks, (True, True, False), strict=True):
        assert all((p.grad is not None) == reached for p in block.parameters())
    assert all(p.grad is None for p in backbone.head.parameters())


def test_a_tap_beyond_the_last_block_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 9 does not exist"), grown("llama").tap([9]):
        pass


def test_padding_changes_no_hidden_state() -> None:
    backbone = grown("llama")
    backbone.model.double()
    ids = torch.randint(3, 280, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    with torch.no_grad():
        alone, long = backbone.last_hidden(ids), backbone.last_hidden(padded)
    torch.testing.assert_close(long[:, :9], alone, rtol=1e-12, atol=1e-12)


def test_a_pretrained_folder_is_grown_and_bad_folders_are_named(tmp_path) -> None:
    model = tiny("qwen3", head_dim=16)
    model.save_pretrained(tmp_path / "lm")
    TOKENIZER.save_pretrained(tmp_path / "lm")
    backbone = load_for_training(
        tmp_path / "lm", ModelConfig(), codebook_KC=torch.randn(16, 4), captions=[], seed=0
    )
    assert backbone.num_layers == 3
    assert len(backbone.layout.code_ids) == 16
    (tmp_path / "empty").mkdir()
    for spec, words in {
        tmp_path / "empty": "cannot be loaded as a model",
        "no/such/place": "neither an existing folder nor a hub id",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_for_training(
                spec, ModelConfig(), codebook_KC=torch.randn(16, 4), captions=[], seed=0
            )
