"""The script of docs/hf-trainer.md is run as it stands, on tiny things."""

import json
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import arra
from arra.models.loading import fit_text_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "hf-trainer.md"


def test_the_page_trains_a_painter(tiny_dataset: Path, tmp_path: Path) -> None:
    settings, script = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len([line for line in script.splitlines() if line.strip()]) <= 32
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("llama", vocab_size=300, **sizes, **heads, **tokens)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    fit_text_tokenizer(["a red circle"], 280).save_pretrained(tmp_path / "start")
    tokenizer = json.loads((tiny_dataset / "manifest.json").read_text())["tokenizer"]["spec"]
    space: dict = {}
    exec(compile(settings, str(PAGE), "exec"), space)
    space |= {"DATA": str(tiny_dataset), "TOKENIZER": tokenizer, "MODEL": str(tmp_path / "start")}
    space |= {"NAME": "clip", "DIM": 6, "LAYER": 1, "STEPS": 10}
    space |= {"RUN": str(tmp_path / "run"), "PAINTER": str(tmp_path / "painter")}
    exec(compile(script, str(PAGE), "exec"), space)
    (line,) = [line for line in space["trainer"].state.log_history if "loss_gva" in line]
    assert {"loss", "loss_ar", "gva_constant", "retrieval", "lambda"} <= line.keys()
    pipe = arra.Pipeline.from_pretrained(str(tmp_path / "painter"))
    (image,) = pipe(["a red circle"], seeds=[7], cfg=2.0)
    assert image.size == (6, 4)
    files = [file.name for file in (tmp_path / "painter").rglob("*")]
    assert "pipeline.json" in files
    assert "projectors.safetensors" not in files
