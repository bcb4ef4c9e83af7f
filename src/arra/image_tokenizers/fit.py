"""Fits an image tokenizer on any source of images, from new weights or from published ones.

Loss = l1 |x - y| + l2 (x - y)^2 + commitment |z - e|^2 + feature * (distance to a frozen encoder)
     + gan * (what a patch discriminator takes for real) + teacher * (1 - cos to its features)

with y the reconstruction of x through the codes e nearest to the latents z; the gradient of e is
passed straight to z (van den Oord et al. 2017, arXiv 1711.00937, eq. 3). The codebook follows
moving averages (codebook.py). Settings are in fit_config.py and fit_recipes.py, a step in
fit_run.py, the terms in fit_terms.py.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch

from arra.files import atomic_write, read_json, write_json
from arra.image_tokenizers.fit_config import MAY_CHANGE, TokenizerConfig
from arra.image_tokenizers.fit_run import Run
from arra.image_tokenizers.fit_state import latest, restore, save
from arra.image_tokenizers.loading import load_folder
from arra.image_tokenizers.semantic import SemanticVQModel
from arra.image_tokenizers.vq import VQModel


def fit_tokenizer(config: TokenizerConfig, *, stop_after: int | None = None) -> Path:
    """Fits a tokenizer and writes it to `config.out`; returns that folder.

    An interrupted fit goes on from its last checkpoint; a finished one is returned as it is.

    Args:
        config: what to fit, on what.
        stop_after: checkpoint and return after this many steps of the whole run.

    Raises:
        ValueError: flags differ from those that the folder was begun with, or nothing is readable.
        FloatingPointError: the loss is no longer finite.
    """
    out = Path(config.out)
    _same_fit(out, config)
    if (out / "model.safetensors").is_file():
        load_folder(out)  # says so if it is damaged
        print(f"{out} is finished already")
        return out
    run = Run(config)  # what it refuses must not mark the folder as begun
    write_json(out / "fit.json", dataclasses.asdict(config))
    if (checkpoint := latest(out)) is not None:
        run.step = restore(checkpoint, run.state)
        print(f"going on from step {run.step} of {config.steps}", flush=True)
    _trim_log(out, run.step)
    last = min(config.steps, stop_after or config.steps)
    while run.step < last:
        run.advance()
        if run.step % config.checkpoint_every == 0 or run.step == last:
            save(out, run.step, run.state)
        if config.snapshot_every and run.step % config.snapshot_every == 0:
            _snapshot(out / "snapshots" / f"step-{run.step:08d}", run)
    if run.step == config.steps:
        _finish(out, run)
    return out


def _same_fit(out: Path, config: TokenizerConfig) -> None:
    """Refuses a folder that was begun with other flags, or by somebody else."""
    path = out / "fit.json"
    # through JSON, so that tuples compare as lists
    now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        before = read_json(path)
        changed = [
            f"--{name.replace('_', '-')}: {before.get(name)} -> {value}"
            for name, value in now.items()
            if name not in MAY_CHANGE and before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{out} was begun with other flags ({', '.join(changed)}): use them again, or "
                f"another --out"
            )
    elif (out / "model.safetensors").exists():
        raise ValueError(f"{out} holds a model that was not fitted here: choose another --out")


def _trim_log(out: Path, step: int) -> None:
    """Drops log lines after a restored step."""
    path = out / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break  # cut off by a crash
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _finish(out: Path, run: Run) -> None:
    if run.pool.rejected:
        lines = [json.dumps({"row": r, "reason": why}) for r, why in run.pool.rejected.items()]
        with atomic_write(out / "rejects.jsonl") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{len(lines)} images could not be read: see {out / 'rejects.jsonl'}")
    write_tokenizer(_as_stored(run), out)
    print(f"{out}: fingerprint {load_folder(out).fingerprint}")


def _snapshot(folder: Path, run: Run) -> None:
    """A copy of the tokenizer as it is now, which can be measured like a finished one."""
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(_as_stored(run), folder)


def _as_stored(run: Run) -> VQModel:
    model = copy.deepcopy(run.finished()).eval()
    return model.half() if run.config.save_dtype == "float16" else model


def write_tokenizer(model: VQModel, folder: Path) -> None:
    """Writes config.json and model.safetensors into an existing folder, weights last."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    if isinstance(model, SemanticVQModel):
        model.store_encoder(folder)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
