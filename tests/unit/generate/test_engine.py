"""The loop on other architectures, its fixed shapes, and what it refuses.

Legend: N images, T tokens, D width, K codes, P cells, h and w codes per side.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from arra.generate import engine
from arra.generate.engine import PROMPT_STEP, Request, paint
from arra.generate.sampling import sample
from arra.generate.settings import Sampling
from arra.layout import Image, Text
from arra.models.base import Backbone
from arra.models.causal_lm import CausalLM, grow
from arra.models.loading import fit_text_tokenizer

GRID = (3, 3)
CODES = 8
TOKENIZER = fit_text_tokenizer(["hello world, a circle"] * 3, 280)


def grown(architecture: str, **extra: object) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    backbone = grow(model, copy.deepcopy(TOKENIZER), CODES, style="lumina")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return backbone


def off_by(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest relative difference between painting's logits and full forwards."""
    seen: list[Tensor] = []

    def spy(logits_NK: Tensor, uniform_N: Tensor, sampling: Sampling) -> Tensor:
        seen.append(logits_NK.clone())
        return sample(logits_NK, uniform_N, sampling)

    monkeypatch.setattr(engine, "sample", spy)
    requests = [
        Request(tuple(backbone.condition(c, GRID)), 3) for c in ("a circle", "hello world", "a")
    ]
    requests.append(Request((1, *range(3, 40)), 4))  # a batch of its own, in a wider cache
    null = tuple(backbone.null_condition(GRID))
    worst = 0.0
    for batch in paint(backbone, requests, GRID, Sampling(cfg=2.0), slots=2):
        drawn_PNK = torch.stack(seen)
        seen.clear()
        for row, (index, codes_hw) in enumerate(zip(batch.indices, batch.codes_Nhw, strict=True)):
            guided_PK, unguided_PK = (
                full(backbone, prefix, codes_hw) for prefix in (requests[index].prefix, null)
            )
            expected_PK = unguided_PK + 2.0 * (guided_PK - unguided_PK)
            difference = (drawn_PNK[:, row] - expected_PK).abs().max() / expected_PK.abs().max()
            worst = max(worst, float(difference))
    return worst


@torch.no_grad()
def full(backbone: Backbone, prefix: tuple[int, ...], codes_hw: Tensor) -> Tensor:
    image = Image(tuple(codes_hw.flatten().tolist()), *codes_hw.shape)
    ids = backbone.layout.sample([Text(prefix), image]).ids
    codes = set(backbone.layout.code_ids)
    before = [t for t in range(len(ids) - 1) if ids[t + 1] in codes]
    hidden_TD = backbone.last_hidden(torch.tensor([ids]))[0]
    return backbone.head(hidden_TD[before])[:, list(backbone.layout.code_ids)]


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", {}),  # key and value heads shared
        ("gpt2", {}),  # learned positions
        ("phi", {}),  # half-rotary, a bias on the head
        ("mistral", {"sliding_window": 10}),  # a window shorter than the sequence
        ("gemma2", {"head_dim": 16, "sliding_window": 10, "final_logit_softcapping": 5.0}),
        ("recurrent_gemma", {"head_dim": 16, "attention_window_size": 64}),  # a state besides
    ],
)
def test_other_architectures_paint_what_they_predict(
    architecture: str, extra: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert off_by(grown(architecture, **extra), monkeypatch) < 1e-5


def test_plain_attention_is_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding on a CPU uses it; GPT-2's keeps float64 throughout."""
    backbone = grown("gpt2")
    backbone.model.double()
    backbone.model.set_attn_implementation("eager")
    assert off_by(backbone, monkeypatch) < 1e-12


def test_shapes_follow_from_slots_and_the_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = grown("llama")
    shapes: list[tuple[int, int]] = []
    step, caches = backbone.step, Counter[int]()

    def recording(
        ids_BT: Tensor, positions_BT: Tensor, mask_BC: Tensor, cache: object, text: None = None
    ) -> Tensor:
        assert text is None
        shapes.append(tuple(ids_BT.shape))
        caches[id(cache)] += 1
        assert not mask_BC[:, 0].any(), "one padding column at least"
        return step(ids_BT, positions_BT, mask_BC, cache)

    monkeypatch.setattr(backbone, "step", recording)
    lengths = [1, 15, 16, 31, 15, 2, 16]
    requests = [Request((1,) * n, i) for i, n in enumerate(lengths)]
    batches = list(paint(backbone, requests, GRID, Sampling(cfg=3.0), slots=3))
    assert [b.indices for b in batches] == [[0, 1, 4], [5], [2, 3, 6]]
    assert {rows for rows, _ in shapes} == {6}
    opening = 3  # begin and two sizes
    prefills = [width for _, width in shapes if width > 2]
    assert prefills == [PROMPT_STEP + opening] * 2 + [2 * PROMPT_STEP + opening]
    assert {width for _, width in shapes} - set(prefills) == {1}
    # The last row's end and the image's end are known and change nothing: they are not computed.
    assert len(shapes) == 3 * (GRID[0] * GRID[1] + GRID[0] - 1)
    assert len(caches) == 2, "batches of one width share a cache"


def test_a_used_cache_changes_nothing() -> None:
    """The second batch in a cache equals the first in a fresh one, bit for bit."""
    backbone = grown("llama")
    requests = [Request((1, 5, 9), 1), Request((1, 7), 2)]
    both = list(paint(backbone, requests, GRID, Sampling(cfg=2.0), slots=1))
    alone = list(paint(backbone, requests[1:], GRID, Sampling(cfg=2.0), slots=1))
    assert torch.equal(both[1].codes_Nhw, alone[0].codes_Nhw)


def test_nothing_to_paint() -> None:
    assert list(paint(grown("llama"), [], GRID, Sampling(), slots=2)) == []


def test_an_image_longer_than_the_model_is_refused() -> None:
    backbone, requests = grown("llama"), [Request((1,), 0)]
    # 9 x 9 codes, 9 row ends, begin, end and two sizes leave 2 of 96 tokens
    assert len(list(paint(backbone, requests, (9, 9), Sampling(), slots=1))) == 1
    with pytest.raises(ValueError, match=r"needs 104 tokens besides the prompt.* takes 96 in all"):
        list(paint(backbone, requests, (10, 9), Sampling(), slots=1))
    with pytest.raises(ValueError, match="--slots must be at least 1"):
        list(paint(backbone, [], GRID, Sampling(), slots=0))


def test_damaged_weights_are_named() -> None:
    backbone = grown("llama")
    with torch.no_grad():
        backbone.blocks[0].mlp.up_proj.weight[0, 0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are not finite"):
            list(paint(backbone, [Request((1,), 0)], GRID, Sampling(3.0, temperature), slots=2))
