"""What is sharded gets its weights from process 0: the same training as when each opened them all.

Each run is put together twice in the same processes, in both ways.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import in_ranks
from small_runs import CODES, GRID, small_config, small_dataset, tiny_chameleon, trajectory
from tiny_painters import emu3_special_tokens, emu3_tokenizer, publish_emu3, publish_janus

from arra.config import EngineConfig, LoraConfig, ModelConfig, TrainConfig
from arra.data.shards import open_dataset
from arra.models.base import Backbone
from arra.models.llamagen_convert import to_original
from arra.models.llamagen_layers import LlamaGenConfig
from arra.models.llamagen_model import LlamaGenForImageGeneration
from arra.models.loading import fit_text_tokenizer, load_for_training, save_skeleton
from arra.train.adapters import Opened, adapted_backbone
from arra.train.first_weights import FirstWeights, open_on_main, tensors_of
from arra.train.setup import Run, _as_stored, assemble
from arra.train.world import World, open_world


def put_together(config: TrainConfig, world: World, run: Path, from_main: bool) -> Run:
    dataset = open_dataset(config.data_folder, "train", features=("clip",))

    def load(config: TrainConfig, world: World) -> Opened:
        def whole() -> Backbone:
            return load_for_training(
                config.model_path,
                config.model,
                codebook_KC=torch.zeros(CODES, 4),
                captions=dataset.texts,
                seed=config.seed,
                grid=GRID,
                class_names=["one", "two", "3"] if config.model.architecture == "llamagen" else [],
            )

        if config.lora.rank:
            return adapted_backbone(config, run, world, whole)
        return Opened(whole())

    def describe(found: Opened) -> None:
        record = dataclasses.asdict(found.base) if found.base else None
        told = {"grid": GRID, "image_tokenizer": "", "fingerprint": "", "trained_vocabulary": "all"}
        save_skeleton(found.backbone, run, adapter=record, **told)

    first: FirstWeights | None = None
    if from_main:
        stored = config if config.lora.rank else _as_stored(config)
        opened, first = open_on_main(
            config, run, world, lambda: load(stored, World(world.device)), describe
        )
        assert all(t.is_meta for _, t in tensors_of(opened.backbone.model))
    else:
        opened = load(config, world)
    parts = (opened.backbone, dataset, None, "", opened.adapter)
    return assemble(config, run, world, *parts, first=first)


def both_ways(config: TrainConfig, folder: Path) -> list[object]:
    with open_world("cpu") as world:
        found: list[object] = []
        for from_main in (False, True):
            run = put_together(config, world, folder, from_main)
            tensors = dict(tensors_of(run.step))
            assert not any(t.is_meta for t in tensors.values())
            lines, weights = trajectory(run, 2)
            found.append((lines, weights, {n: t.dtype for n, t in tensors.items()}))
        return found


def assert_same(config: TrainConfig, folder: Path, ranks: int = 2) -> None:
    for each, anew in in_ranks(ranks, both_ways, config, folder, timeout=300):
        assert anew[0] == each[0]
        assert anew[1].keys() == each[1].keys()
        assert all(torch.equal(anew[1][name], tensor) for name, tensor in each[1].items())
        assert anew[2] == each[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


def language_model(folder: Path) -> Path:
    """A tiny model that writes, in bfloat16 and with tied tables."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = fit_text_tokenizer(["a red circle", "two blue squares"], 280)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MODELS: dict[str, Callable[[Path], object]] = {
    "chameleon": tiny_chameleon,
    "janus": lambda folder: publish_janus(folder, CODES),
    "emu3": lambda folder: publish_emu3(folder, emu3_tokenizer(emu3_special_tokens(CODES)), CODES),
    "grown": language_model,
}


@pytest.mark.parametrize("family", MODELS)
def test_a_model_in_a_folder(family: str, data: Path, tmp_path: Path) -> None:
    MODELS[family](tmp_path / "model")
    config = small_config(data, model_path=str(tmp_path / "model"))
    assert_same(config, tmp_path / "run")


@pytest.mark.parametrize("architecture", ["llama", "llamagen"])
def test_fresh_weights(architecture: str, tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data", classes=3)
    config = small_config(data)
    model = dataclasses.replace(config.model, architecture=architecture, dropout=0.0)
    assert_same(dataclasses.replace(config, model=model), tmp_path / "run")


def test_weights_that_stay_as_they_are_stored(data: Path, tmp_path: Path) -> None:
    model = ModelConfig(dtype="auto")
    spec = str(language_model(tmp_path / "model"))
    config = small_config(data, model_path=spec, model=model, dtype="bfloat16")
    assert_same(config, tmp_path / "run")


@pytest.mark.parametrize("family", ["chameleon", "grown"])
def test_an_adapter(family: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    MODELS[family](tmp_path / "model")
    config = small_config(data, model_path=str(tmp_path / "model"), lora=LoraConfig(rank=2))
    assert_same(config, tmp_path / "run")


def from_a_file(config: TrainConfig, run: Path) -> bool:
    """Whether each process gets what is in the file; nothing is sharded here."""
    codes = torch.zeros(CODES, 4)

    def load() -> Opened:
        spec = config.model_path
        return Opened(load_for_training(spec, config.model, codebook_KC=codes, captions=(), seed=0))

    def describe(found: Opened) -> None:
        told = {"grid": (4, 4), "image_tokenizer": "", "fingerprint": "", "trained_vocabulary": ""}
        save_skeleton(found.backbone, run, **told)

    with open_world("cpu") as world:
        opened, first = open_on_main(config, run, world, load, describe)
        step = torch.nn.ModuleDict({"model": opened.backbone.model}).to_empty(device="cpu")
        first.fill(step)
        expected = dict(tensors_of(load().backbone.model))
        filled = dict(tensors_of(step["model"]))
    assert not first.held
    return all(torch.equal(filled[name], tensor) for name, tensor in expected.items())


def test_a_file_in_another_layout(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = LlamaGenConfig(
        vocab_size=CODES,
        hidden_size=768,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_classes=3,
        grid_height=4,
        grid_width=4,
    )
    file = tmp_path / "c2i_64.pt"
    torch.save({"model": to_original(LlamaGenForImageGeneration(config))}, file)
    settings = small_config(data, model_path=str(file))
    assert in_ranks(2, from_a_file, settings, tmp_path / "run") == [True, True]


@pytest.mark.long
def test_copies_of_shards(data: Path, tmp_path: Path) -> None:
    tiny_chameleon(tmp_path / "model")
    engine = EngineConfig("hybrid", shard_ranks=2)
    config = small_config(data, model_path=str(tmp_path / "model"), engine=engine)
    assert_same(config, tmp_path / "run", ranks=4)
