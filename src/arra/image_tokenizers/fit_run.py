"""A fit in progress: what learns, one step of it, and its log.

A step: images go through the model (`reconstruct`), the terms of the loss look at what came of
them (fit_terms.py), the discriminator pushes, if there is one (discriminator.py), the weights
move, then the discriminator learns from the same images, and the average of the weights follows.
What happens at a step depends on (seed, step) only.

Legend: N images, D code width, R latents of a batch, H and W pixels, C channels, h and w cells.
"""

import copy
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from arra.data.sources import open_source
from arra.device import pick_device
from arra.image_tokenizers.codebook import CodebookAverage
from arra.image_tokenizers.discriminator import PatchDiscriminator, hinge, push
from arra.image_tokenizers.fit_config import TokenizerConfig, schedule
from arra.image_tokenizers.fit_model import fitted_model
from arra.image_tokenizers.fit_state import FitState
from arra.image_tokenizers.fit_terms import Seen, loss_terms
from arra.image_tokenizers.pixels import PixelPool
from arra.image_tokenizers.vq import VQModel, to_floats


class Run:
    """One fit.

    Attributes:
        step: optimizer steps done.
        model: what learns. `finished()` is what it has become so far.
        state: all that a checkpoint holds.
        pool: the images.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        self.config, self.step = config, 0
        self.device = torch.device(pick_device(config.device))
        source = open_source(
            config.source,
            split=config.split,
            text_column=config.text_column,
            image_column=config.image_column,
            limit=config.limit,
        )
        self.pool = PixelPool(
            source,
            config.size,
            seed=config.seed,
            memory_gb=config.memory_gb,
            crop_from=config.crop_from,
            flip=config.flip,
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = fitted_model(config).to(self.device)  # type: ignore[arg-type]
            self.terms = loss_terms(config, self.model, self.device)
            self.discriminator: PatchDiscriminator | None = None
            if config.gan_weight > 0:
                made = PatchDiscriminator(config.gan_channels, config.gan_layers)
                self.discriminator = made.train().to(self.device)
        self.average = CodebookAverage(self.model, config.code_decay, moves=config.train_codes)
        if config.init is not None:
            cells = config.batch_size * (config.size // self.model.factor) ** 2
            self.average.start_from_codes(cells)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if config.ema_decay else None
        learned = {
            name: term.loss.to(self.device)
            for name, term in self.terms.items()
            if isinstance(term.loss, nn.Module)
        }
        self.trained = [
            p for m in (self.model, *learned.values()) for p in m.parameters() if p.requires_grad
        ]
        self.optimizer = _optimizer(self.trained, config)
        modules: dict[str, nn.Module] = {"model": self.model, **learned}
        optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        if self.ema is not None:
            modules["ema"] = self.ema
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
            self.judging = torch.optim.AdamW(
                self.discriminator.parameters(),
                lr=config.gan_lr,
                betas=(0.5, 0.9),
                weight_decay=0.0,
                fused=True,
            )
            optimizers.append(self.judging)
        self.state = FitState(source.fingerprint, modules, tuple(optimizers), self.average)
        self.tally: dict[str, list[float]] = {}
        self.since = time.perf_counter()

    def finished(self) -> VQModel:
        """The tokenizer as it would be saved now: averaged, if weights are."""
        return self.model if self.ema is None else self.ema

    def advance(self) -> None:
        """One optimizer step, and a log line where one is due."""
        config = self.config
        x_NCHW = to_floats(self.pool.batch(self.step, config.batch_size).to(self.device))
        share = schedule(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = share * config.lr
        seen, revived = self._reconstruct(x_NCHW)
        said = self._backward(seen)
        said["grad_norm"] = float(nn.utils.clip_grad_norm_(self.trained, config.clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._judged():
            said |= self._judge(seen, share)
        self._follow()
        self.step += 1
        for name, value in {**said, "revived": float(revived)}.items():
            self.tally.setdefault(name, []).append(value)
        if self.step % config.log_every == 0 or self.step == config.steps:
            self._log()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"
        )

    def _reconstruct(self, x_NCHW: Tensor) -> tuple[Seen, int]:
        """The model's answer to images, with its graph, and how many codes were revived."""
        model = self.model
        with self._autocast():
            given = model.given(x_NCHW)
            z_NDHW = model.latents_of(given).float()
        flat_RD = z_NDHW.detach().permute(0, 2, 3, 1).flatten(0, 2)
        revived = self._revive(flat_RD)
        codes_NHW = model.nearest(z_NDHW)
        continuous = self.step < round(self.config.quantize_from * self.config.steps)
        e_NDHW = z_NDHW.detach() if continuous else model.embed(codes_NHW).detach()
        q_NDHW = z_NDHW + (e_NDHW - z_NDHW).detach()
        with self._autocast():
            trunk_NChw = model.trunk(q_NDHW)
            y_NCHW = model.decoder.paint(trunk_NChw).float()
        self.average.update(flat_RD, codes_NHW.flatten())
        return Seen(x_NCHW, y_NCHW, z_NDHW, e_NDHW, q_NDHW, trunk_NChw, given), revived

    def _backward(self, seen: Seen) -> dict[str, float]:
        config = self.config
        with self._autocast():
            values = {name: term.loss(seen) for name, term in self.terms.items()}
        weighted = {name: self.terms[name].weight * value for name, value in values.items()}
        loss = torch.stack(list(weighted.values())).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.step} is {float(loss.detach())}: lower --lr; the last "
                f"checkpoint in {config.out} is intact"
            )
        said = {n: float(v.detach()) for n, v in {"loss": loss, **values}.items()}
        if self._judged():
            assert self.discriminator is not None
            rebuilt = torch.stack([weighted[n] for n, t in self.terms.items() if t.of_pixels]).sum()
            last_layer = self.model.decoder.conv_out.weight
            with self._autocast():
                pushed, pushing = push(self.discriminator, seen.y_NCHW, rebuilt, last_layer)
            loss = loss + config.gan_weight * pushed
            said |= pushing
        loss.backward()
        return said

    def _judged(self) -> bool:
        begin = round(self.config.gan_from * self.config.steps)
        return self.discriminator is not None and self.step >= begin

    def _judge(self, seen: Seen, share: float) -> dict[str, float]:
        """One step of the discriminator; `share` of its peak rate."""
        assert self.discriminator is not None
        for group in self.judging.param_groups:
            group["lr"] = share * self.config.gan_lr
        with self._autocast():
            real_Nhw = self.discriminator(seen.x_NCHW)
            fake_Nhw = self.discriminator(seen.y_NCHW.detach())
        loss = hinge(real_Nhw, fake_Nhw)
        loss.backward()
        self.judging.step()
        self.judging.zero_grad(set_to_none=True)
        right = (real_Nhw > 0).float().mean() + (fake_Nhw < 0).float().mean()
        return {"discriminator": float(loss.detach()), "judged_right": float(right) / 2}

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the averaged weights; a short memory at first, so that the start is forgotten."""
        if self.ema is None:
            return
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for kept, now in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            kept.lerp_(now, 1 - decay)

    def _revive(self, flat_RD: Tensor) -> int:
        config, step = self.config, self.step
        late = step > config.revive_until * config.steps
        due = config.revive_every > 0 and step % config.revive_every == 0 and not late
        first = config.init is None and step == round(config.quantize_from * config.steps)
        if not config.train_codes or not (first or due):
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
            "lr": schedule(self.step - 1, config) * config.lr,
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


def _optimizer(trained: list[nn.Parameter], config: TokenizerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)
