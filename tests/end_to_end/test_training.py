"""Training end to end on a tiny prepared dataset: exactness, resume, refusals, export."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from saved_runs import assert_same, assert_same_run, file_of, log_of, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from arra.config import (
    AlignConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from arra.config_json import from_json
from arra.data.loader import Loader
from arra.data.shards import open_dataset
from arra.export import ExportConfig, export
from arra.files import read_json
from arra.models import load_model
from arra.models.loading import load_for_training
from arra.train.loop import train
from arra.train.optim import learning_rate

STEPS = 8


@pytest.fixture
def config(tiny_dataset: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data_folder=str(tiny_dataset),
        out=str(tmp_path / "run"),
        steps=STEPS,
        batch_size=4,
        threads=1,
        model=ModelConfig(layers=3, hidden_size=24, heads=2, mlp_size=32, text_vocabulary=280),
        align=AlignConfig(layer=(2,)),
        data=DataConfig(prompt_dropout=0.25),
        optim=OptimConfig(lr=3e-3, warmup=0.2, ema=0.9),
        checkpoint=CheckpointConfig(every=3, keep=0),
        log=LogConfig(every=2, validate_images=4),
    )


def test_lambda_zero_is_the_plain_loop_in_twenty_lines(config: TrainConfig) -> None:
    config = replace(config, align=AlignConfig(weight=0.0, layer=(2,)))
    train(config)
    data = open_dataset(config.data_folder, "train", features=())
    codebook = torch.zeros(data.manifest.tokenizer.codebook_size, 0)
    backbone = load_for_training(
        None, config.model, codebook_KC=codebook, captions=data.texts, seed=config.seed
    )
    model = backbone.model.train()
    tables = {id(model.get_input_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in tables]
    rest = [p for p in model.parameters() if p.ndim <= 1 or id(p) in tables]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    loader = Loader(data, backbone, batch_size=4, seed=0, prompt_dropout=0.25)
    losses = []
    for step in range(STEPS):
        batch = loader.step(step)[0].batch
        logits = model(batch.ids_BT, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config.optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logged = log_of(config.out)
    assert all("loss_gva" not in line for line in logged)
    for line, pair in zip(logged, zip(losses[::2], losses[1::2], strict=True), strict=True):
        assert abs(line["loss_ar"] - sum(pair) / 2) < 1e-6


def test_lambda_zero_is_bit_equal_to_no_targets(
    config: TrainConfig, bare_dataset: Path, tmp_path: Path
) -> None:
    zero = replace(config, align=AlignConfig(weight=0.0), out=str(tmp_path / "zero"))
    none = replace(zero, out=str(tmp_path / "none"), data_folder=str(bare_dataset))
    train(zero)
    train(none)
    assert_same(tensors_of(zero.out), tensors_of(none.out))
    assert log_of(zero.out) == log_of(none.out)


def test_both_arms_start_alike_and_only_the_aligned_one_has_a_projector(
    config: TrainConfig, tmp_path: Path
) -> None:
    plain = replace(config, align=AlignConfig(weight=0.0), out=str(tmp_path / "plain"))
    first = [
        log_of(train(replace(c, log=LogConfig(every=1)), stop_after=1))[0] for c in (plain, config)
    ]
    assert first[0]["loss_ar"] == first[1]["loss_ar"]
    assert tensors_of(plain.out, "objective") == {}
    assert all(name.startswith("projectors.") for name in tensors_of(config.out, "objective"))


def test_accumulation_follows_the_same_trajectory(config: TrainConfig, tmp_path: Path) -> None:
    whole = log_of(train(config))
    parts = log_of(train(replace(config, micro_batch=1, out=str(tmp_path / "parts"))))
    for a, b in zip(whole, parts, strict=True):
        for key in ("loss_ar", "loss_gva", "gva_constant", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), key


def test_stopped_and_resumed_equals_undisturbed(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    broken = replace(config, out=str(tmp_path / "broken"))
    for stop in (2, 5, None):
        train(broken, stop_after=stop)
    assert_same_run(config.out, broken.out)


def test_a_run_is_not_continued_with_other_settings(
    config: TrainConfig, bare_dataset: Path
) -> None:
    train(config, stop_after=2)
    with pytest.raises(ValueError, match=r"--optim\.lr: 0\.003 -> 0\.1"):
        train(replace(config, optim=replace(config.optim, lr=0.1)))
    with pytest.raises(ValueError, match="another dataset"):
        train(replace(config, data_folder=str(bare_dataset)))
    train(replace(config, log=replace(config.log, every=1)))
    written = read_json(Path(config.out) / "config.json")
    written.pop("run")
    assert from_json(TrainConfig, written) == config
    assert log_of(config.out)[-1]["step"] == STEPS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"align": AlignConfig(targets=("dino",))}, "no feature 'dino' .it has: clip"),
        ({"align": AlignConfig(layer=(9,))}, "layer 9 does not exist"),
        ({"align": AlignConfig(positions="rep")}, "needs --model.rep"),
        ({"loss": LossConfig(vocab="image", text=True)}, "cannot be trained"),
        ({"data": DataConfig(text="/no/such/file", text_fraction=0.5)}, "does not exist"),
    ],
)
def test_impossible_settings_are_refused(config: TrainConfig, change: dict, words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train(replace(config, **change))
    assert not Path(config.out).exists(), "the corrected command must not be another run's"


def test_a_mistake_while_resuming_takes_nothing_back(config: TrainConfig) -> None:
    train(config, stop_after=3)
    file = file_of(config.out, "model")
    hidden = file.rename(Path(config.out) / "away")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(.* is missing\)"):
        train(config)
    hidden.rename(file)
    train(config)
    assert log_of(config.out)[-1]["step"] == STEPS


def test_a_dataset_without_features_needs_weight_zero(
    config: TrainConfig, bare_dataset: Path
) -> None:
    with pytest.raises(ValueError, match=r"prepare it with --encoder, or .* --align\.weight 0"):
        train(replace(config, data_folder=str(bare_dataset)))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    config: TrainConfig,
) -> None:
    train(config, stop_after=3)
    last = file_of(config.out, "model")
    before = last.read_bytes()
    poisoned = replace(config, optim=replace(config.optim, lr=1e30))
    settings = Path(config.out) / "config.json"
    settings.write_text(settings.read_text().replace('"lr": 0.003', '"lr": 1e+30'))
    with pytest.raises(FloatingPointError, match=r"lower --optim\.lr"):
        train(poisoned)
    assert last.read_bytes() == before
    assert file_of(config.out, "model") == last


def test_text_rows_keep_the_alignment_and_are_counted(config: TrainConfig, tmp_path: Path) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text("a line of prose\n\nanother one\n", encoding="utf-8")
    mixed = replace(config, data=DataConfig(text=str(prose), text_fraction=0.5))
    line = log_of(train(mixed))[-1]
    assert line["loss_gva"] > 0


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_export_is_an_ordinary_checkpoint(
    config: TrainConfig, tmp_path: Path, weights: str
) -> None:
    train(config)
    folder = export(ExportConfig(run=config.out, out=str(tmp_path / "out"), weights=weights))
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert not [n for n in names if n.endswith((".pt", ".bin", ".pkl", ".ckpt"))]
    keys = load_file(folder / "model" / "model.safetensors")
    assert not [k for k in keys if "proj" in k and "_proj" not in k]
    trained = tensors_of(config.out, "model" if weights == "raw" else "ema")
    plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    run_model = AutoModelForCausalLM.from_config(plain.config).eval()
    run_model.load_state_dict(trained)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, run_model(ids).logits)
    backbone = load_model(folder)
    assert backbone.layout == load_model(config.out).layout
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.convert_ids_to_tokens(backbone.layout.code_ids[3]).startswith("<|code_")
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(folder / 'model')!r})\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'arra']"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_export_is_trained_further(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    folder = export(ExportConfig(run=config.out, out=str(tmp_path / "out")))
    again = replace(config, model_path=str(folder), out=str(tmp_path / "again"))
    first = log_of(train(again))[0]["loss_ar"]
    assert first < log_of(config.out)[0]["loss_ar"]
