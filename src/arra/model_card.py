"""README.md of an exported painter: a Hugging Face model card, from what the run says of itself.

It is meant for strangers: names, counts and hashes, but no place on a disk, no caption and no name
of a class. The licence is the author's to say, and the card says how.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml

from arra.config import TrainConfig
from arra.config_json import from_json
from arra.data.manifest import FILE as MANIFEST
from arra.data.manifest import FeatureInfo, read_manifest
from arra.files import place, read_json, sha256_of
from arra.train.run_card import FILE as RUN_CARD
from arra.train.run_card import public_name

PAPER = "https://arxiv.org/abs/2503.07334"
CCA = "https://arxiv.org/abs/2410.09347"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        run: the run folder.
        step: optimizer steps that its weights have seen.
        weights: raw or ema.
        dtype: of the stored weights.
        pipeline: the content of pipeline.json.
        adapter_only: a peft folder, in place of the whole model.
    """

    run: Path
    step: int
    weights: str
    dtype: str
    pipeline: Mapping[str, Any]
    adapter_only: bool = False


def model_card(exported: Exported, title: str) -> str:
    """The text of README.md."""
    written = read_json(exported.run / "config.json")
    run = written.pop("run")
    config = from_json(TrainConfig, written)
    card = read_json(exported.run / RUN_CARD)
    parts = [
        _header(exported, card),
        f"# {title}",
        _what(exported, config, card),
        _use(exported, card, title),
        "## What it learned from\n\n" + _table(_data(exported, config, card, run["dataset"])),
        "## How it was trained\n\n" + _table(_training(exported, config, card)),
        _results(exported),
        "## Where it comes from\n\n" + _table(_origin(card)),
        _limits(),
        _licence(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- the header, which the hub reads -------------------------------------------------------------


def _header(exported: Exported, card: Mapping[str, Any]) -> str:
    words = _prompted_by(exported) != "class"
    fields: dict[str, Any] = {
        "library_name": "peft" if exported.adapter_only else "transformers",
        "pipeline_tag": "text-to-image" if words else "unconditional-image-generation",
        "tags": ["arra", "autoregressive", "image-generation"],
    }
    base, source = card["model"]["name"], card["data"]["source"]
    if base and _is_hub_id(base):
        fields["base_model"] = base
        fields["base_model_relation"] = "adapter" if exported.adapter_only else "finetune"
    if _is_hub_id(source):
        fields["datasets"] = [source]
    header = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n# license: say yours here, see the end of this page\n{header}---"


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and ":" not in name


def _prompted_by(exported: Exported) -> str:
    if exported.pipeline.get("text_encoder"):
        return "features"
    return "text" if (exported.run / "tokenizer").is_dir() else "class"


# ---- what it is and how to use it ----------------------------------------------------------------


def _what(exported: Exported, config: TrainConfig, card: Mapping[str, Any]) -> str:
    model, (height, width) = card["model"], exported.pipeline["grid"]
    prompt = {
        "text": "a text",
        "class": "a class",
        "features": "a text, as the features of a frozen text encoder",
    }[_prompted_by(exported)]
    start = f"started from {model['name']}" if model["name"] else "started from random weights"
    how = "a LoRA adapter for a model" if exported.adapter_only else "a model"
    aligned = config.align.weight > 0
    method = (
        f"It was trained with ARRA ([arXiv 2503.07334]({PAPER})): beside next-token prediction, "
        f"the hidden states that predict an image's codes were aligned with what a frozen vision "
        f"encoder sees in the whole image. **Nothing of that is left at inference**: projector and "
        f"encoder are not part of what is here, and painting is ordinary next-token sampling."
        if aligned
        else f"It is a plain next-token baseline: nothing was aligned (lambda = 0 of "
        f"[ARRA]({PAPER}))."
    )
    if config.objective == "cca":
        method = (
            f"Guidance was distilled into its weights by condition contrastive alignment "
            f"([arXiv 2410.09347]({CCA})): **paint with it at cfg 1**, which needs one forward "
            f"pass a token where guidance needs two. Guidance on top of it counts twice."
        )
    return (
        f"This is {how} that paints: from {prompt} it writes the {height} x {width} codes of an "
        f"image, one after the other, and an image tokenizer makes the picture of them. "
        f"{model['architecture']}, {model['parameters']:,} parameters, {start}.\n\n{method}"
    )


def _use(exported: Exported, card: Mapping[str, Any], title: str) -> str:
    architecture = card["model"]["architecture"]
    if exported.adapter_only:
        return (
            "## How to use it\n\nThe folder is one that peft opens; `adapter_config.json` names "
            "the frozen base, and must name a place where you have it.\n\n"
            "```python\nfrom peft import PeftModel\n\n"
            f'model = PeftModel.from_pretrained(base, "{title}")\n```'
        )
    prompt = "0" if _prompted_by(exported) == "class" else "what to paint"
    lines = [
        "## How to use it\n",
        f'```\narra generate {shlex.quote(title)} "{prompt}" --out pictures\n```\n',
        "```python\nimport arra\n",
        f'pipe = arra.Pipeline.from_pretrained("{title}")',
        f'images = pipe(["{prompt}"], seeds=[7])  # PIL images\n```\n',
    ]
    if architecture in dir(transformers):
        lines += [
            "`model/` is an ordinary transformers folder, which needs none of our code:\n",
            f"```python\nfrom transformers import {architecture}\n",
            f'model = {architecture}.from_pretrained("{title}/model")\n```',
        ]
    else:
        lines += [
            f'`arra.load_model("{title}")` opens the model alone; `arra convert --help` lists the '
            f"layouts of other projects that it can be written in."
        ]
    settings = ", ".join(f"{k} {v:g}" for k, v in exported.pipeline["sampling"].items())
    return "\n".join([*lines, f"\nDefault sampling (`pipeline.json`): {settings}."])


# ---- the tables ----------------------------------------------------------------------------------

Rows = list[tuple[str, str]]


def _table(rows: Rows) -> str:
    shown = [(name, value.replace("|", "\\|")) for name, value in rows if value]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {n} | {v} |" for n, v in shown)])


def _data(exported: Exported, config: TrainConfig, card: Mapping[str, Any], dataset: str) -> Rows:
    rows, hashes = card["data"]["rows"], card["hashes"]
    known = _known_features(config, dataset)
    encoders = []
    for name, fingerprint in hashes["encoders"].items():
        info = known.get(name)
        said = f"{public_name(info.spec)} ({info.pooling}, {info.dim} values), " if info else ""
        used = not config.align.targets or name in config.align.targets
        told = said if used else said + "not aligned to, "
        encoders.append(f"`{name}`: {told}fingerprint `{fingerprint[:12]}`")
    tokenizer = exported.pipeline["image_tokenizer"]
    spec = "" if tokenizer["spec"] == "image_tokenizer" else public_name(tokenizer["spec"]) + ", "
    text_encoder = exported.pipeline.get("text_encoder")
    return [
        ("Data", card["data"]["source"] or card["data"]["name"]),
        ("Images", ", ".join(f"{count:,} {split}" for split, count in rows.items())),
        ("Image tokenizer", f"{spec}fingerprint `{tokenizer['fingerprint'][:12]}`"),
        ("Text encoder", public_name(text_encoder["spec"]) if text_encoder else ""),
        ("Encoders of the data", "; ".join(encoders) or "none"),
    ]


def _known_features(config: TrainConfig, dataset: str) -> Mapping[str, FeatureInfo]:
    """The encoders' names, where the dataset is still in its place."""
    manifest = place(config.data_folder) / MANIFEST
    if not manifest.is_file() or sha256_of(manifest) != dataset:
        return {}
    return read_manifest(config.data_folder).aligned()


def _training(exported: Exported, config: TrainConfig, card: Mapping[str, Any]) -> Rows:
    align, loss, optim, progress = config.align, config.loss, config.optim, card["progress"]
    online = [f"{n}={public_name(e)}" for n, e in align.online_encoders.items()]
    blocks = ", ".join(str(layer) for layer in align.layer)
    terms = [
        f"next-token cross entropy over {'all tokens' if loss.vocab == 'all' else 'image tokens'}"
    ]
    if config.objective == "cca":
        terms = [f"condition contrastive, beta {config.cca.beta:g}, lambda {config.cca.weight:g}"]
    terms += ["prompts trained as well"] if loss.text else []
    terms += [f"z-loss {loss.z:g}"] if loss.z else []
    aligned = ""
    if align.weight:
        shape = (
            "" if align.schedule == "constant" else f" ({align.schedule}, until {align.until:g})"
        )
        aligned = (
            f"lambda {align.weight:g}{shape}, block {blocks}, positions `{align.positions}`, "
            f"{'centred' if align.centred else 'raw'} features"
        )
    lora = config.lora
    adapter = f"rank {lora.rank}, base in {lora.quantize}" if lora.rank else ""
    seen = exported.step * config.batch_size
    averaged = f", averaged weights (decay {optim.ema:g})" if exported.weights == "ema" else ""
    return [
        ("Recipe", f"`{config.recipe}`"),
        ("Loss", ", ".join(terms)),
        ("Alignment", aligned or "none"),
        ("Encoders while training", ", ".join(online)),
        ("LoRA", adapter),
        ("Prompt dropout", f"{config.data.prompt_dropout:g}"),
        ("Steps", f"{exported.step:,} of {config.steps:,}{averaged}"),
        ("Samples seen", f"{seen:,} ({config.batch_size} a step)"),
        ("Optimizer", f"AdamW, peak learning rate {optim.lr:g}, {optim.schedule}"),
        ("Precision", f"{config.dtype} while training, {exported.dtype} here"),
        ("Time", _time(progress)),
        ("Hardware", _hardware(card["hardware"])),
    ]


def _time(progress: Mapping[str, Any]) -> str:
    busy = [
        f"{progress[f'{kind}_hours']:.3g} {kind} hours"
        for kind in ("gpu", "processor")
        if progress[f"{kind}_hours"]
    ]
    return f"{progress['hours']:.3g} hours ({', '.join(busy)}), to step {progress['step']:,}"


def _hardware(hardware: Mapping[str, Any]) -> str:
    device = hardware["accelerator"] or hardware["processor"] or hardware["system"]
    return f"{device}; {hardware['processes']} process(es) on {hardware['machines']} machine(s)"


def _results(exported: Exported) -> str:
    """The last validation losses at or before the exported step."""
    log = exported.run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    fields = [json.loads(line) for line in lines if line.endswith("}")]
    told = [f for f in fields if f["step"] <= exported.step]
    told = [f for f in told if "val_loss_ar" in f or "val_loss_cca" in f]
    if not told:
        return ""
    values = [(name, value) for name, value in told[-1].items() if name.startswith("val_")]
    rows = [(f"`{name.removeprefix('val_')}`", f"{value:.4g}") for name, value in values]
    raw = " They are those of the weights of that step, not of the average." * (
        exported.weights == "ema"
    )
    return (
        f"## Validation losses\n\nMeans over the first images of the split `val`, after "
        f"{told[-1]['step']:,} steps.{raw} They say nothing of how well it paints: that was not "
        f"measured here (`arra evaluate` does).\n\n{_table(rows)}"
    )


def _origin(card: Mapping[str, Any]) -> Rows:
    versions = {name: value for name, value in card["versions"].items() if value}
    hashes = card["hashes"]
    return [
        ("arra", f"{card['arra']}, commit {card['commit'] or 'unknown'}"),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
        ("SHA-256 of the settings", f"`{hashes['config']}`"),
        ("SHA-256 of the dataset's manifest", f"`{hashes['dataset_manifest']}`"),
    ]


# ---- limits and licence --------------------------------------------------------------------------


def _limits() -> str:
    return (
        "## Intended use and limits\n\n"
        "For research on image generation. What it paints is made up: it shows nothing that "
        "exists, it repeats what its training data has too much of, and it may repeat single "
        "training images.\n\n"
        "If it was trained on medical images: **not for diagnosis**, and not for any decision "
        "about a patient. Its pictures belong to no patient and may show findings that the prompt "
        "does not say, or lack those that it says. Before you publish it, make sure that the "
        "data's terms allow it."
    )


def _licence(card: Mapping[str, Any]) -> str:
    base = f"those of its start ({card['model']['name']})" if card["model"]["name"] else ""
    data = f"those of the data ({card['data']['source'] or card['data']['name']})"
    image = "that of the image tokenizer"
    terms = ", ".join(part for part in (base, data, image) if part)
    return (
        f"## Licence\n\nNot said yet: it must fit {terms}. To say it, replace the comment in the "
        f"first lines of this file by, for instance, `license: apache-2.0`."
    )
