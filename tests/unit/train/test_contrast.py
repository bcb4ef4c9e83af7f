"""--objective cca: what trains, beside what, however a step is computed; and what it does to the
likelihoods."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import in_ranks
from small_runs import small_config, small_dataset, small_run, tiny_chameleon, trajectory
from torch import Tensor

from arra.config import AlignConfig, CcaConfig, EngineConfig, LoraConfig, LossConfig, TrainConfig
from arra.data.loader import MicroBatch
from arra.data.shards import open_dataset
from arra.train.contrast import ContrastiveStep, check_contrast
from arra.train.setup import Run
from arra.train.step import validate
from arra.train.world import World, open_world

Result = tuple[list[dict[str, float]], dict[str, Tensor], dict[str, float]]


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_chameleon(tmp_path_factory.mktemp("chameleon"))


@pytest.fixture
def config(data: Path) -> TrainConfig:
    return small_config(
        data,
        objective="cca",
        align=AlignConfig(weight=0.0),
        loss=LossConfig(chunk=16),
        cca=CcaConfig(beta=0.1, weight=3.0),
    )


def alone(config: TrainConfig) -> Run:
    return small_run(config, World(torch.device("cpu")))


def rewards(run: Run, step: int) -> tuple[float, float]:
    """Mean log p(x|c) - log p_start(x|c) of a step's images behind their own prompts and behind
    others'."""
    assert isinstance(run.step, ContrastiveStep)
    run.step.eval()
    with torch.no_grad():
        terms = [run.step(micro, 1.0) for micro in run.loader.step(step)]
    run.step.train()
    own, other = (
        sum(float(t.metrics[name][0]) for t in terms) / sum(t.metrics[name][1] for t in terms)
        for name in ("reward_own", "reward_other")
    )
    return own, other


# ---- batches ------------------------------------------------------------------------------------


def prompts_and_codes(run: Run, micro: MicroBatch) -> list[tuple[str, tuple[int, ...]]]:
    """Of each sequence of a batch."""
    table = {token: code for code, token in enumerate(run.backbone.layout.code_ids)}
    found, batch = [], micro.batch
    for ids, attended in zip(batch.ids_BT.tolist(), batch.attention_BT.tolist(), strict=True):
        tokens = [token for token, there in zip(ids, attended, strict=True) if there]
        text = [t for t in tokens if t < run.backbone.layout.begin]
        words = run.backbone.text_tokenizer.decode(text, skip_special_tokens=True)
        found.append((words, tuple(table[t] for t in tokens if t in table)))
    return found


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_an_image_comes_again_behind_the_prompt_of_another(
    config: TrainConfig, micro_batch: int
) -> None:
    """Whole captions in the order of the global batch, whatever it is cut into; those that were
    dropped or empty have no second sequence."""
    run = alone(replace(config, micro_batch=micro_batch))
    seen = set()
    for micro in run.loader.step(0):
        assert micro.contrast is not None
        images = len(micro.contrast.times_E)
        sequences = prompts_and_codes(run, micro)
        own, others = sequences[:images], sequences[images:]
        assert len(own) == len(micro.rows)
        for (prompt, _), times in zip(own, micro.contrast.times_E.tolist(), strict=True):
            assert times == (1 if prompt else 2)
        pairs = micro.contrast.pair_P.tolist()
        assert pairs == [i for i, (prompt, _) in enumerate(own) if prompt]
        for i, (prompt, codes) in zip(pairs, others, strict=True):
            assert codes == own[i][1]
            assert prompt not in ("", own[i][0])
            seen.add((own[i], prompt))
    whole = alone(config)
    (micro,) = whole.loader.step(0)
    sequences = prompts_and_codes(whole, micro)
    pairs = micro.contrast.pair_P.tolist() if micro.contrast else []
    others = sequences[-len(pairs) :]
    assert seen == {(sequences[i], prompt) for i, (prompt, _) in zip(pairs, others, strict=True)}


# ---- what it learns -----------------------------------------------------------------------------


def test_at_the_start_every_term_is_log_2(config: TrainConfig) -> None:
    run = alone(config)
    (micro,) = run.loader.step(0)
    assert micro.contrast is not None
    terms = run.step(micro, 1.0)
    times, pairs = micro.contrast.times_E, len(micro.contrast.pair_P)
    closed = math.log(2) * (int(times.sum()) + 3 * pairs) / len(times) / 3
    assert terms.total().item() == pytest.approx(closed, rel=1e-9)
    assert 0 < pairs < len(times) < int(times.sum())


def test_it_raises_the_likelihood_ratio_of_own_prompts_and_lowers_that_of_others(
    config: TrainConfig,
) -> None:
    """Images of training: what 20 pictures of random codes can teach is their names."""
    optim = replace(config.optim, lr=1e-2, schedule="constant")
    data = replace(config.data, prompt_dropout=0.0)
    run = alone(replace(config, cca=CcaConfig(beta=0.1, weight=1.0), optim=optim, data=data))
    assert rewards(run, 0) == (0, 0)
    lines, _ = trajectory(run, 50)
    found = [rewards(run, step) for step in range(50, 55)]
    assert all(own > 0.2 > -0.2 > other for own, other in found)
    assert lines[-1]["cca"] < 0.6 * lines[0]["cca"]
    assert lines[0]["ranked"] == 0 < 0.8 < lines[-1]["ranked"]


def test_the_start_does_not_move(config: TrainConfig) -> None:
    run = alone(config)
    assert isinstance(run.step, ContrastiveStep)
    assert run.step.start is not None
    before = {n: t.clone() for n, t in run.step.start.state_dict().items()}
    trajectory(run, 3)
    after = run.step.start.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = run.step.model.state_dict()
    assert not all(torch.equal(moved[name], tensor) for name, tensor in before.items())
    trained = {id(p) for group in run.state.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in run.step.start.parameters()}
    assert run.backbone.sampling["cfg"] == 1


def test_dropout_leaves_out_the_same_of_both(config: TrainConfig, tmp_path: Path) -> None:
    classes = small_dataset(tmp_path, classes=3)
    model = replace(config.model, architecture="llamagen", hidden_size=32, dropout=0.3)
    run = alone(replace(config, data_folder=str(classes), model=model))
    (micro,) = run.loader.step(0)
    terms = run.step(micro, 1.0)
    assert [float(terms.metrics[n][0]) for n in ("reward_own", "reward_other")] == [0, 0]
    assert run.step(micro, 1.0).total().item() == terms.total().item()
    hidden_BTD = run.backbone.last_hidden(micro.batch.ids_BT)
    assert not torch.equal(run.backbone.last_hidden(micro.batch.ids_BT), hidden_BTD)


def test_an_adapter_is_switched_off_in_place_of_a_copy(config: TrainConfig, chameleon: str) -> None:
    pytest.importorskip("peft")
    torch.set_default_dtype(torch.float32)  # peft's own type
    run = alone(replace(config, model_path=chameleon, lora=LoraConfig(rank=2)))
    assert isinstance(run.step, ContrastiveStep)
    assert run.step.start is None
    assert rewards(run, 0) == (0, 0)
    lines, _ = trajectory(run, 8)
    assert lines[-1]["cca"] < lines[0]["cca"]
    assert 0 not in rewards(run, 0)
    run.state.adapter.wrapped.disable_adapter_layers()
    assert rewards(run, 0) == (0, 0)


# ---- however a step is computed -----------------------------------------------------------------


def trained(config: TrainConfig, steps: int) -> Result:
    with open_world("cpu") as world:
        run = small_run(config, world)
        means = validate(run)
        return (*trajectory(run, steps), means | validate(run))


def assert_the_same(ranks: int, config: TrainConfig, changed: TrainConfig, off: float) -> None:
    ((lines, weights, means),) = in_ranks(1, trained, config, 4, timeout=200)
    for found in in_ranks(ranks, trained, changed, 4, timeout=200):
        for a, b in zip(found[0], lines, strict=True):
            for name in ("cca", "loss", "grad_norm", "reward_own", "reward_other", "ranked"):
                assert a[name] == pytest.approx(b[name], abs=off), name
        for name, tensor in weights.items():
            assert float((found[1][name] - tensor).abs().max()) <= off, name
        assert found[2] == pytest.approx(means, abs=off)


@pytest.mark.parametrize(
    ("ranks", "micro", "engine"),
    [
        (1, 1, EngineConfig()),
        (1, 3, EngineConfig(activation_checkpointing="full")),
        (2, 2, EngineConfig("ddp")),
        (2, 0, EngineConfig("fsdp")),
        (2, 2, EngineConfig("fsdp", activation_checkpointing="selective")),
        pytest.param(3, 0, EngineConfig("fsdp"), marks=pytest.mark.long),
        pytest.param(3, 2, EngineConfig("ddp"), marks=pytest.mark.long),
    ],
)
def test_the_same_trajectory(
    ranks: int, micro: int, engine: EngineConfig, config: TrainConfig
) -> None:
    assert_the_same(ranks, config, replace(config, micro_batch=micro, engine=engine), 1e-9)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_same_trajectory_of_an_adapter(
    parallel: str, config: TrainConfig, chameleon: str
) -> None:
    pytest.importorskip("peft")
    torch.set_default_dtype(torch.float32)
    adapted = replace(config, model_path=chameleon, lora=LoraConfig(rank=2))
    changed = replace(adapted, micro_batch=2, engine=EngineConfig(parallel))  # type: ignore
    assert_the_same(2, adapted, changed, 2e-5)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 1}, "--batch-size must be at least 2, got 1"),
        ({"align": AlignConfig()}, "has no --align.weight above 0"),
        ({"loss": LossConfig(z=1e-5)}, "has no --loss.z"),
        ({"loss": LossConfig(text=True)}, "has no --loss.text"),
        ({"cca": "beta"}, "--cca.beta must be more than 0, got 0"),
        ({"engine": EngineConfig(cross_entropy="liger")}, "--engine.cross-entropy liger"),
    ],
)
def test_what_the_settings_refuse(config: TrainConfig, change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(config, **({"cca": CcaConfig(beta=0)} if "cca" in change else change))


def test_no_painter_to_start_from(config: TrainConfig) -> None:
    train = open_dataset(config.data_folder, "train")
    with pytest.raises(ValueError, match="name one with --model"):
        check_contrast(config, [train])


@pytest.mark.parametrize(
    ("classes", "match"), [(1, "has 1 prompt: prepare"), (0, "has no prompts: prepare")]
)
def test_no_prompts_to_contrast(
    config: TrainConfig, chameleon: str, tmp_path: Path, classes: int, match: str
) -> None:
    train = open_dataset(small_dataset(tmp_path, classes=1), "train")
    if not classes:
        train.texts = [""] * len(train)
    with pytest.raises(ValueError, match=match):
        check_contrast(replace(config, model_path=chameleon), [train])
