"""Fits an image tokenizer on any source of images.

Loss = l1 |x - y| + l2 (x - y)^2 + commitment |z - e|^2 + feature * (distance to a frozen encoder)
with y the reconstruction of x through the codes e nearest to the latents z; the gradient of e is
passed straight to z (van den Oord et al. 2017, arXiv 1711.00937, eq. 3). The codebook follows
moving averages (codebook.py). What happens at a step depends on (seed, step) only.

Legend: N images, D code width, R latents of a batch, H and W pixels.
"""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from arra.data.sources import open_source
from arra.files import atomic_write, read_json, write_json
from arra.image_tokenizers.codebook import CodebookAverage
from arra.image_tokenizers.feature_loss import FeatureLoss
from arra.image_tokenizers.fit_config import MAY_CHANGE, TokenizerConfig, learning_rate
from arra.image_tokenizers.fit_state import FitState, latest, restore, save
from arra.image_tokenizers.loading import load_folder
from arra.image_tokenizers.pixels import PixelPool
from arra.image_tokenizers.vq import VQModel, to_floats


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
    run = Run(config)
    if (checkpoint := latest(out)) is not None:
        run.step = restore(checkpoint, run.state)
        print(f"going on from step {run.step} of {config.steps}", flush=True)
    _trim_log(out, run.step)
    last = min(config.steps, stop_after or config.steps)
    while run.step < last:
        run.advance()
        if run.step % config.checkpoint_every == 0 or run.step == last:
            save(out, run.step, run.state)
    if run.step == config.steps:
        _finish(out, run)
    return out


class Run:
    """One fit in progress."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.config, self.step = config, 0
        self.device = torch.device(config.device)
        source = open_source(
            config.source,
            split=config.split,
            text_column=config.text_column,
            image_column=config.image_column,
            limit=config.limit,
        )
        self.pool = PixelPool(source, config.size, seed=config.seed, memory_gb=config.memory_gb)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = VQModel(config.model_config()).train()
        model.to(self.device)  # type: ignore[arg-type]
        model.codes.weight.requires_grad_(False)
        self.model = model
        self.average = CodebookAverage(model, config.code_decay)
        self.optimizer = _optimizer(model, config)
        self.state = FitState(source.fingerprint, model, self.optimizer, self.average)
        self.features: FeatureLoss | None = None
        if config.feature_encoder is not None:
            self.features = FeatureLoss(config.feature_encoder, self.device)
        self.tally: dict[str, list[float]] = {}
        self.since = time.perf_counter()

    def advance(self) -> None:
        """One optimizer step, and a log line where one is due."""
        config = self.config
        pixels_NCHW = self.pool.batch(self.step, config.batch_size).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        sums = self._backward(to_floats(pixels_NCHW))
        norm = nn.utils.clip_grad_norm_(self.state.trained(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for name, value in {**sums, "grad_norm": float(norm)}.items():
            self.tally.setdefault(name, []).append(value)
        if self.step % config.log_every == 0 or self.step == config.steps:
            self._log()

    def _backward(self, x_NCHW: Tensor) -> dict[str, float]:
        config, model = self.config, self.model
        bfloat16 = config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            z_NDHW = model.latents(x_NCHW).float()
        flat_RD = z_NDHW.detach().permute(0, 2, 3, 1).flatten(0, 2)
        revived = self._revive(flat_RD)
        codes_NHW = model.nearest(z_NDHW)
        e_NDHW = z_NDHW.detach() if self._continuous() else model.embed(codes_NHW).detach()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            y_NCHW = model.render(z_NDHW + (e_NDHW - z_NDHW).detach()).float()
            losses = {
                "l1": (y_NCHW - x_NCHW).abs().mean(),
                "l2": (y_NCHW - x_NCHW).square().mean(),
                "commitment": (z_NDHW - e_NDHW).square().sum(dim=1).mean(),
            }
            if self.features is not None:
                losses["feature"] = self.features(y_NCHW, x_NCHW)
        weights = {
            "l1": config.l1,
            "l2": config.l2,
            "commitment": config.commitment,
            "feature": config.feature_weight,
        }
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.step} is {float(loss.detach())}: lower --lr; the last "
                f"checkpoint in {config.out} is intact"
            )
        loss.backward()
        self.average.update(flat_RD, codes_NHW.flatten())
        return {n: float(v.detach()) for n, v in {"loss": loss, **losses}.items()} | {
            "revived": float(revived)
        }

    def _continuous(self) -> bool:
        return self.step < round(self.config.quantize_from * self.config.steps)

    def _revive(self, flat_RD: Tensor) -> int:
        config, step = self.config, self.step
        late = step > config.revive_until * config.steps
        due = config.revive_every > 0 and step % config.revive_every == 0 and not late
        first = step == round(config.quantize_from * config.steps)
        if not (first or due):
            return 0
        if first:
            self.average.count_K.zero_()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        return self.average.revive(flat_RD, config.revive_share, generator)

    def _log(self) -> None:
        config = self.config
        seconds = time.perf_counter() - self.since
        steps = len(self.tally["loss"])
        means = {name: sum(values) / len(values) for name, values in self.tally.items()}
        means["revived"] = sum(self.tally["revived"])
        share_K = self.average.count_K / self.average.count_K.sum()
        entropy = float(-(share_K * share_K.clamp(min=1e-12).log()).sum())
        line = {
            "step": self.step,
            "images_seen": self.step * config.batch_size,
            **{name: round(value, 6) for name, value in means.items()},
            "perplexity": round(math.exp(entropy), 2),
            "lr": learning_rate(self.step - 1, config),
            "rejected": len(self.pool.rejected),
            "images_per_s": round(steps * config.batch_size / seconds, 1),
        }
        path = Path(config.out) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        left = (config.steps - self.step) * seconds / steps
        print(
            f"step {self.step}/{config.steps}  l1 {line['l1']:.4f}  perplexity "
            f"{line['perplexity']:.0f}  {line['images_per_s']:.0f} images/s  {left:.0f} s left",
            flush=True,
        )
        self.tally, self.since = {}, time.perf_counter()


def _optimizer(model: VQModel, config: TokenizerConfig) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)


def _same_fit(out: Path, config: TokenizerConfig) -> None:
    """Writes fit.json, or refuses a folder that was begun with other flags."""
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
    else:
        write_json(path, now)


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
    model = run.model.eval()
    if run.config.save_dtype == "float16":
        model.half()
    write_tokenizer(model, out)
    print(f"{out}: fingerprint {load_folder(out).fingerprint}")


def write_tokenizer(model: VQModel, folder: Path) -> None:
    """Writes config.json and model.safetensors into an existing folder, weights last."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
