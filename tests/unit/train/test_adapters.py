"""What of a model moves under an adapter, and that nothing else does; 8-bit states; 4-bit bases.

Legend: B sequences, T tokens, N positions, D width, V vocabulary.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from arra.batch import Batch
from arra.config import CheckpointConfig, LoraConfig, OptimConfig
from arra.layout import Image, Text
from arra.models import adapted
from arra.models.adapted import BaseRecord, load_merged, put_on
from arra.models.causal_lm import CausalLM, grow
from arra.models.four_bits import Compute, quantize
from arra.models.loading import fit_text_tokenizer
from arra.objective import Feature, Objective, Target
from arra.train import checkpoint
from arra.train.adapters import peft_config
from arra.train.optim import build_optimizer
from arra.train.state import State
from arra.train.world import World

pytest.importorskip("peft")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)

CODES, DIM = 16, 6
ALONE = World(torch.device("cpu"))
TOKENIZER = fit_text_tokenizer(["a red circle, two blue squares"] * 3, 270)
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "gpt2": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "mistral": {"tie_word_embeddings": False},
}


def grown(architecture: str, **extra: object) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    return grow(model, copy.deepcopy(TOKENIZER), CODES)


def batch_of(backbone: CausalLM, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CODES, (4, 6), generator=generator).tolist()
    texts = [backbone.condition(t, (2, 3)) for t in ("a red circle", "a line", "", "two")]
    layout = backbone.layout
    rows = [layout.sample([Text(t), Image(c, 2, 3)]) for t, c in zip(texts, codes, strict=True)]
    return layout.collate(rows)


def step_loss(backbone: CausalLM, objective: Objective, batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(batch.num_images, DIM, generator=generator)
    feature = Feature(values, torch.zeros(DIM), torch.full((DIM,), 0.1))
    with backbone.tap(objective.layers) as taps:
        last_BTD = backbone.last_hidden(batch.ids_BT)
    return objective(taps, last_BTD, backbone.head, batch, {"clip": feature}).total()


def aligned(backbone: CausalLM) -> Objective:
    return Objective(backbone.hidden_size, [Target("clip", DIM, (1,), 1.0)])


def trained_for(steps: int, backbone: CausalLM, bits: int = 32) -> Objective:
    objective = aligned(backbone)
    config = OptimConfig(lr=1e-2, weight_decay=0.1, bits=bits)  # type: ignore[arg-type]
    optimizer = build_optimizer(backbone.model, objective, config)
    backbone.model.train()
    for step in range(steps):
        step_loss(backbone, objective, batch_of(backbone, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    backbone.model.eval()
    return objective


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_adapter_image_rows_and_projector_move(architecture: str) -> None:
    """Tensor by tensor and row by row, after 20 steps with alignment."""
    backbone = grown(architecture, **ARCHITECTURES[architecture])
    before = plain_state(backbone.model)
    projector = plain_state(aligned(backbone))
    inside = {id(m) for m in backbone.blocks.modules()}
    linear = {
        f"{name}.weight"
        for name, m in backbone.model.named_modules()
        if id(m) in inside and type(m).__name__ in ("Linear", "Conv1D")
    }
    assert len(linear) == 2 * (4 if architecture == "gpt2" else 7)
    tied = backbone.output_table.weight is backbone.model.get_input_embeddings().weight
    backbone, adapter = put_on(backbone, peft_config(backbone, LoraConfig(rank=4)))
    moving = {id(t) for t in adapter.tensors.values()}
    assert moving == {id(p) for p in backbone.model.parameters() if p.requires_grad}
    start = {name: t.detach().clone() for name, t in adapter.tensors.items()}
    objective = trained_for(20, backbone)
    assert not [n for n, t in adapter.tensors.items() if torch.equal(t, start[n])]
    after = plain_state(adapter.wrapped.merge_and_unload())
    assert after.keys() == before.keys()
    rows = torch.zeros(len(next(iter(before.values()))), dtype=torch.bool)
    rows[backbone.image_rows()] = True
    tables = [name for name, t in before.items() if t.shape[:1] == rows.shape]
    assert len(tables) == (1 if tied else 2)
    for name, old in before.items():
        changed = (after[name] != old).flatten(1).any(1) if old.ndim > 1 else after[name] != old
        if name in linear:
            assert changed.any(), f"{name} should have moved"
        elif name in tables:
            assert not changed[~rows].any(), f"{name}: a text row moved"
            whole = tied or name == "lm_head.weight"  # an input row moves if its token occurred
            assert changed[rows].all() if whole else changed[rows].any(), name
        else:
            assert torch.equal(after[name], old), f"{name} moved"
    for name, tensor in objective.named_parameters():
        assert not torch.equal(tensor, projector[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_whole_run_moves_everything(architecture: str) -> None:
    backbone = grown(architecture, **ARCHITECTURES[architecture])
    before, projector = plain_state(backbone.model), plain_state(aligned(backbone))
    objective = trained_for(20, backbone)
    for module, old in ((backbone.model, before), (objective, projector)):
        still = [n for n, t in module.named_parameters() if torch.equal(t, old[n])]
        # A key's bias adds the same to every score of a softmax: its gradient is rounding.
        assert not [name for name in still if not name.endswith("k_proj.bias")]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_gradients_are_those_of_plain_autograd(architecture: str) -> None:
    """The chunked loss sees the rows of the head, tied to the input table or not."""
    backbone = grown(architecture, **ARCHITECTURES[architecture])
    backbone, adapter = put_on(backbone, peft_config(backbone, LoraConfig(rank=2)))
    with torch.no_grad():
        for tensor in adapter.tensors.values():
            tensor.add_(torch.randn_like(tensor) * 0.02)
    batch = batch_of(backbone, 0)
    logits_BTV = backbone.model(input_ids=batch.ids_BT, use_cache=False).logits
    F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten()).backward()
    expected = {n: t.grad.clone() for n, t in adapter.tensors.items()}
    backbone.model.zero_grad()
    objective = Objective(backbone.hidden_size, chunk=5)
    last_BTD = backbone.last_hidden(batch.ids_BT)
    objective({}, last_BTD, backbone.head, batch, {}).total().backward()
    for name, tensor in adapter.tensors.items():
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert (tensor.grad - expected[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(architecture: str) -> None:
    backbone = grown(architecture, **ARCHITECTURES[architecture])
    config = peft_config(backbone, LoraConfig(rank=2, dropout=0.2))
    backbone, adapter = put_on(backbone, config)
    with torch.no_grad():
        for tensor in adapter.tensors.values():
            tensor.add_(torch.randn_like(tensor) * 0.02)
    objective, batch = aligned(backbone), batch_of(backbone, 0)
    backbone.model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        backbone.model.zero_grad()
        step_loss(backbone, objective, batch).backward()
        found.append({n: t.grad.clone() for n, t in adapter.tensors.items()})
    for name, grad in found[0].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


def test_a_subset_of_layers_can_be_named() -> None:
    backbone = grown("llama")
    config = LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "v_proj"))
    backbone, adapter = put_on(backbone, peft_config(backbone, config))
    layers = {n.split(".lora_")[0].rpartition(".")[2] for n in adapter.tensors if "lora_" in n}
    assert layers == {"q_proj", "v_proj"}
    assert adapter.config.lora_alpha == 3.0


class WithTables(CausalLM):
    """A family whose image codes have a table and a head of their own."""

    def image_rows(self) -> list[int]:
        return []

    def image_tables(self) -> list[nn.Module]:
        return [self.model.get_submodule("codes_in"), self.model.get_submodule("codes_out.last")]


def test_tables_of_a_familys_own_train_whole(tmp_path: Path) -> None:
    plain = grown("llama", tie_word_embeddings=False)
    model = plain.model
    model.add_module("codes_in", nn.Embedding(CODES, 32))
    model.add_module("codes_out", nn.ModuleDict({"last": nn.Linear(32, CODES)}))
    before = plain_state(model)
    backbone = WithTables(model, plain.text_tokenizer, plain.layout)
    backbone, adapter = put_on(backbone, peft_config(backbone, LoraConfig(rank=2)))
    tables = {n for n in adapter.tensors if "lora_" not in n}
    prefix = "base_model.model."
    assert tables == {
        f"{prefix}codes_in.weight",
        f"{prefix}codes_out.last.weight",
        f"{prefix}codes_out.last.bias",
    }
    codes_in, codes_out = backbone.image_tables()
    codes_out(codes_in(torch.arange(CODES))).sum().backward()
    groups = build_optimizer(model, nn.Module(), OptimConfig()).param_groups
    undecayed = {id(p) for p in groups[1]["params"]}
    assert id(adapter.tensors[f"{prefix}codes_in.weight"]) in undecayed
    with torch.no_grad():
        for name in tables:
            adapter.tensors[name].add_(1.0)
    merged = plain_state(adapter.wrapped.merge_and_unload())
    assert merged.keys() == before.keys()
    moved = {n for n in before if not torch.equal(merged[n], before[n])}
    assert moved == {name.removeprefix(prefix) for name in tables}


def test_rows_of_the_input_table_do_not_decay() -> None:
    backbone = grown("llama", tie_word_embeddings=False)
    backbone, adapter = put_on(backbone, peft_config(backbone, LoraConfig(rank=2)))
    decayed, rest = build_optimizer(backbone.model, nn.Module(), OptimConfig()).param_groups
    rows = next(t for n, t in adapter.tensors.items() if "embed_tokens" in n)
    assert [id(p) for p in rest["params"]] == [id(rows)]
    assert len(decayed["params"]) == len(adapter.tensors) - 1


def test_an_output_bias_that_peft_would_drop_is_refused_by_name() -> None:
    backbone = grown("phi")
    with torch.no_grad():
        backbone.output_table.bias.add_(1.0)
    with pytest.raises(ValueError, match=r"PhiForCausalLM cannot carry an adapter: .* bias"):
        put_on(backbone, peft_config(backbone, LoraConfig(rank=2)))


def test_another_adapters_weights_are_refused() -> None:
    backbone = grown("llama")
    _, adapter = put_on(backbone, peft_config(backbone, LoraConfig(rank=2)))
    weights = {name: t.detach().clone() for name, t in adapter.tensors.items()}
    with pytest.raises(ValueError, match=r"does not fit the adapter: .* is missing or differs"):
        adapter.load(dict(list(weights.items())[1:]), Path("file"))
    name = next(iter(weights))
    with pytest.raises(ValueError, match="does not fit the adapter"):
        adapter.load(weights | {name: weights[name][:, :1]}, Path("file"))


def test_missing_libraries_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = grown("llama")
    find = importlib.util.find_spec
    absent = ("peft", "bitsandbytes")
    monkeypatch.setattr(
        adapted.importlib.util, "find_spec", lambda n: None if n in absent else find(n)
    )
    with pytest.raises(ValueError, match=r"pip install 'arra\[peft\]'"):
        peft_config(backbone, LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"--optim.bits 8: .* pip install 'arra\[quantize\]'"):
        build_optimizer(backbone.model, nn.Module(), OptimConfig(bits=8))
    with pytest.raises(ValueError, match=r"pip install 'arra\[quantize\]'"):
        quantize(backbone, "float32")


# ---- bitsandbytes --------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("whole", [True, False])
def test_eight_bit_states_resume_exactly(tmp_path: Path, whole: bool) -> None:
    def fresh() -> tuple[CausalLM, Objective, State]:
        backbone, adapter = grown("llama", tie_word_embeddings=False), None
        if not whole:
            backbone, adapter = put_on(backbone, peft_config(backbone, LoraConfig(rank=128)))
        objective = aligned(backbone)
        optimizer = build_optimizer(backbone.model, objective, OptimConfig(lr=1e-2, bits=8))
        state = State(backbone.model, objective, optimizer, None, adapter)
        return backbone, objective, state

    def advance(run: tuple[CausalLM, Objective, State], steps: range) -> None:
        backbone, objective, state = run
        for step in steps:
            step_loss(backbone, objective, batch_of(backbone, step)).backward()
            state.optimizer.step()
            state.optimizer.zero_grad()

    straight = fresh()
    advance(straight, range(6))
    first = fresh()
    advance(first, range(3))
    with checkpoint.Saver(tmp_path, first[2], ALONE, CheckpointConfig()) as saver:
        saver.save(3, {})
    dtypes = {
        v.dtype for s in first[2].optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    }
    assert torch.uint8 in dtypes
    second = fresh()
    checkpoint.restore(tmp_path, second[2], ALONE)
    advance(second, range(3, 6))
    expected, found = straight[2].trained(), second[2].trained()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("architecture", "compute"), [("llama", "float32"), ("gpt2", "float32"), ("qwen3", "bfloat16")]
)
def test_a_four_bit_base_carries_an_adapter(
    tmp_path: Path, architecture: str, compute: Compute
) -> None:
    plain = grown(architecture, **ARCHITECTURES[architecture])
    plain.model.save_pretrained(tmp_path / "base")
    record = BaseRecord("base", compute)
    backbone = CausalLM.assemble(
        CausalLM.open_model(record.folder(tmp_path)), plain.text_tokenizer, plain.layout
    )
    quantize(backbone, compute)
    kinds = {type(m).__name__ for m in backbone.blocks.modules()}
    assert "Linear4bit" in kinds
    assert not kinds & {"Linear", "Conv1D"}
    assert type(backbone.output_table) is nn.Linear
    backbone, adapter = put_on(backbone, peft_config(backbone, LoraConfig(rank=4)))
    frozen = {n: p.clone() for n, p in backbone.model.named_parameters() if not p.requires_grad}
    start = {name: t.detach().clone() for name, t in adapter.tensors.items()}
    trained_for(5, backbone)
    assert not [n for n, t in adapter.tensors.items() if torch.equal(t, start[n])]
    for name, parameter in backbone.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])
    ids_BT = torch.tensor([[1, 5, 9, *backbone.image_rows()]])
    with torch.no_grad():
        expected = backbone.head(backbone.last_hidden(ids_BT))
    adapter.save_config(tmp_path, "base")
    painter = load_merged(
        CausalLM, tmp_path, record, adapter.tensors, tmp_path, plain.text_tokenizer, plain.layout
    )
    assert {p.dtype for p in painter.model.parameters()} == {torch.float32}
    with torch.no_grad():
        found = painter.head(painter.last_hidden(ids_BT))
    tolerance = 1e-5 if compute == "float32" else 3e-2  # merged products are float32's
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
