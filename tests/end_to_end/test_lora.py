"""Adapter runs end to end on tiny language models: what moves, resume, peft's own view, export."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_runs import assert_same, assert_same_run, tensors_of
from transformers import AutoConfig, AutoModelForCausalLM

from arra.config import (
    AlignConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from arra.evaluate.perplexity import read_documents, text_perplexity
from arra.export import ExportConfig, export
from arra.files import read_json
from arra.generate.pictures import generate
from arra.generate.settings import GenerateConfig
from arra.models import load_model
from arra.models.loading import fit_text_tokenizer
from arra.study.worker import Losses, Painting, WorkerJob, answer
from arra.train.loop import train

peft = pytest.importorskip("peft")

STEPS = 4
STARTS = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 12},
    "gpt2": {"n_head": 2, "n_embd": 24, "n_layer": 2, "n_positions": 128},
}


@pytest.fixture(scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny language models that can only write, as standard folders."""
    folders = {}
    for architecture, extra in STARTS.items():
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp(architecture)
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
        sizes = {} if architecture == "gpt2" else sizes | {"max_position_embeddings": 128}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = AutoConfig.for_model(architecture, vocab_size=300, **sizes, **tokens, **extra)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        fit_text_tokenizer(["a red circle, two blue squares"] * 3, 280).save_pretrained(folder)
        folders[architecture] = folder
    return folders


@pytest.fixture
def config(tiny_dataset: Path, starts: dict[str, Path], tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data_folder=str(tiny_dataset),
        out=str(tmp_path / "run"),
        model_path=str(starts["qwen3"]),
        steps=STEPS,
        batch_size=4,
        threads=1,
        lora=LoraConfig(rank=4, dropout=0.1),
        align=AlignConfig(layer=(2,)),
        data=DataConfig(prompt_dropout=0.25),
        optim=OptimConfig(lr=3e-3, warmup=0.2, ema=0.9),
        checkpoint=CheckpointConfig(every=2, keep=0),
        log=LogConfig(every=2, validate_images=4),
    )


def without_ema(config: TrainConfig) -> TrainConfig:
    return replace(config, optim=replace(config.optim, ema=0.0))


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[1, 5, 9, *range(280, 296)]])
    return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", STARTS)
def test_plain_peft_opens_base_and_adapter(
    config: TrainConfig, starts: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    config = without_ema(replace(config, model_path=str(starts[architecture])))
    train(config)
    folder = export(ExportConfig(config.out, str(tmp_path / "adapter"), adapter_only=True))
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(ValueError, match="adapter without its model"):
        load_model(folder)
    pointed = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    assert Path(pointed) == (Path(config.out) / "base").resolve()
    base = AutoModelForCausalLM.from_pretrained(pointed)
    untouched = logits_of(base)
    opened = logits_of(peft.PeftModel.from_pretrained(base, folder))
    assert (opened - untouched).abs().max() > 1e-3, "the adapter learned nothing"
    found = logits_of(load_model(config.out).model)
    assert (found - opened).abs().max() <= 1e-5 * opened.abs().max()
    checkpoint = max((Path(config.out) / "checkpoints").glob("step-*"))
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(pointed), checkpoint
    )
    assert torch.equal(logits_of(again), opened)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_export_is_merged_and_plain(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    train(config)
    folder = export(ExportConfig(config.out, str(tmp_path / "out"), weights=weights))
    assert "merged the adapter" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    assert "adapter" not in read_json(folder / "pipeline.json")
    only = export(
        ExportConfig(config.out, str(tmp_path / "only"), weights=weights, adapter_only=True)
    )
    base = AutoModelForCausalLM.from_pretrained(Path(config.out) / "base")
    expected = logits_of(peft.PeftModel.from_pretrained(base, only))
    assert (logits_of(plain) - expected).abs().max() <= 1e-5 * expected.abs().max()
    load_model(folder)


def test_stopped_and_resumed_equals_undisturbed(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    broken = replace(config, out=str(tmp_path / "broken"))
    for stop in (1, None):
        train(broken, stop_after=stop)
    assert_same_run(config.out, broken.out)


def test_a_checkpoint_holds_what_trains_and_nothing_else(config: TrainConfig) -> None:
    train(config, stop_after=1)
    last = max((Path(config.out) / "checkpoints").glob("step-*"))
    assert not (last / "model").exists()
    adapter, average = tensors_of(config.out, "model"), tensors_of(config.out, "ema")
    assert adapter.keys() == average.keys()
    assert all("lora_" in name or "trainable_tokens" in name for name in adapter)
    assert len([name for name in adapter if "trainable_tokens" in name]) == 1  # tied tables
    assert len(adapter) == 1 + 2 * 7 * 2
    states = [name for name in tensors_of(config.out, "optimizer") if "model." in name]
    assert len(states) == 3 * len(adapter)


def test_a_painter_that_needs_no_growing_is_its_own_base(
    config: TrainConfig, tmp_path: Path
) -> None:
    whole = replace(without_ema(config), lora=LoraConfig(), out=str(tmp_path / "whole"))
    train(whole)
    painter = export(ExportConfig(whole.out, str(tmp_path / "painter")))
    again = replace(without_ema(config), model_path=str(painter), out=str(tmp_path / "again"))
    train(again, stop_after=3)
    assert not (tmp_path / "again" / "base").exists()
    record = read_json(tmp_path / "again" / "pipeline.json")["adapter"]
    assert record == {"base": str((painter / "model").resolve()), "four_bits": None}
    load_model(again.out)
    from_run = replace(again, model_path=again.out, out=str(tmp_path / "more"))
    train(from_run, stop_after=1)
    assert (tmp_path / "more" / "base" / "config.json").is_file()
    painter.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the base of the adapter in .* is gone"):
        load_model(again.out)


def test_a_run_folder_may_move(config: TrainConfig, tmp_path: Path) -> None:
    config = without_ema(config)
    train(config, stop_after=3)
    expected = logits_of(load_model(config.out).model)
    moved = Path(config.out).rename(tmp_path / "elsewhere")
    assert torch.equal(logits_of(load_model(moved).model), expected)
    train(replace(config, out=str(moved)))
    last = max((moved / "checkpoints").glob("step-*"))
    pointed = read_json(last / "adapter_config.json")["base_model_name_or_path"]
    assert Path(pointed) == (moved / "base").resolve()


def test_runs_are_painted_and_measured(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    painted = generate(
        GenerateConfig(
            model=config.out, prompts=("a red circle",), out=str(tmp_path / "p"), num=2, cfg=1.5
        )
    )
    assert len(list(Path(painted).rglob("*.png"))) >= 2
    steps = [f"step-{step:08d}" for step in (2, 4)]
    job = WorkerJob(
        run=config.out,
        slots=2,
        device="cpu",
        paintings=[Painting(step, ["a line"], 1.0, str(tmp_path / step)) for step in steps],
        losses=[
            Losses(step, config.data_folder, "val", 4, str(tmp_path / f"{step}.json"))
            for step in steps
        ],
    )
    answer(job)
    assert job.pending() == 0
    losses = [read_json(tmp_path / f"{step}.json") for step in steps]
    assert losses[0] != losses[1], "both checkpoints gave the same losses"
    prose = tmp_path / "prose.txt"
    prose.write_text("two blue squares and a line\n", encoding="utf-8")
    assert text_perplexity(load_model(config.out), read_documents(prose)).perplexity > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": LoraConfig(rank=2, targets=("nothing",))}, "nothing: the blocks have no such"),
        ({"lora": LoraConfig(rank=-1)}, "--lora.rank must be at least 0"),
        ({"lora": LoraConfig(rank=2, dropout=1.0)}, r"--lora.dropout must be in \[0, 1\)"),
        ({"lora": LoraConfig(quantize="4bit")}, "give it an adapter, --lora.rank"),
        ({"model_path": None}, "name a model with --model"),
    ],
)
def test_impossible_settings_are_refused(config: TrainConfig, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(replace(config, **change))


def test_a_whole_run_has_no_adapter_to_write(config: TrainConfig, tmp_path: Path) -> None:
    whole = replace(without_ema(config), lora=LoraConfig())
    train(whole, stop_after=1)
    with pytest.raises(ValueError, match="trained the whole model"):
        export(ExportConfig(whole.out, str(tmp_path / "x"), adapter_only=True))


def test_new_rows_are_stored_as_the_start_is(config: TrainConfig, tmp_path: Path) -> None:
    start = tmp_path / "half"
    model = AutoModelForCausalLM.from_pretrained(config.model_path, dtype=torch.bfloat16)
    model.save_pretrained(start)
    for file in Path(config.model_path).glob("*token*"):
        (start / file.name).write_bytes(file.read_bytes())
    train(without_ema(replace(config, model_path=str(start))), stop_after=2)
    base = load_file(Path(config.out) / "base" / "model.safetensors")
    assert {t.dtype for t in base.values()} == {torch.bfloat16}
    kept = replace(
        without_ema(config),
        model_path=str(start),
        out=str(tmp_path / "kept"),
        dtype="bfloat16",
        model=ModelConfig(dtype="auto"),
    )
    train(kept, stop_after=2)
    assert {t.dtype for t in tensors_of(kept.out, "model").values()} == {torch.float32}
    load_model(kept.out)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_four_bit_run_resumes_exactly_and_is_merged_as_it_was_trained(
    config: TrainConfig, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=4, quantize="4bit")
    config = replace(config, lora=lora, optim=replace(config.optim, ema=0.0, bits=8))
    train(config)
    broken = replace(config, out=str(tmp_path / "broken"))
    for stop in (1, None):
        train(broken, stop_after=stop)
    for part in ("adapter_model", "optimizer"):
        assert_same(tensors_of(config.out, part), tensors_of(broken.out, part))
    assert {
        t.dtype for t in load_file(Path(config.out) / "base" / "model.safetensors").values()
    } == {torch.float32}
    found = logits_of(load_model(config.out).model)
    folder = export(ExportConfig(config.out, str(tmp_path / "out")))
    assert "quantization_config" not in read_json(folder / "model" / "config.json")
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert (logits_of(plain) - found).abs().max() <= 1e-5 * found.abs().max()


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is there"
)
def test_a_four_bit_run_without_the_library_says_what_to_install(config: TrainConfig) -> None:
    config = replace(config, lora=LoraConfig(rank=4, quantize="4bit"))
    with pytest.raises(ValueError, match=r"--lora.quantize 4bit: .*pip install 'arra\[quantize\]'"):
        train(config)


@pytest.mark.gpu
def test_four_bits_on_a_gpu(config: TrainConfig) -> None:
    pytest.importorskip("bitsandbytes")
    lora, optim = LoraConfig(rank=4, quantize="4bit"), replace(config.optim, bits=8)
    config = replace(config, device="cuda", dtype="bfloat16", lora=lora, optim=optim)
    train(config, stop_after=2)
    train(config)
    load_model(config.out, "cuda")
