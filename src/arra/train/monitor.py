"""What a run writes for people: log.jsonl, TensorBoard, progress on the terminal."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from arra.config import TrainConfig
from arra.files import atomic_write


def log_line(means: Mapping[str, float]) -> dict[str, float]:
    """The fields of a log line: `loss_ar`, `loss_gva`, ... ; several targets are named apart.

    `loss` is the mean of what was minimised, so it stays right while lambda moves.
    """
    line = {"loss": means["loss"]} if "loss" in means else {}
    line["loss_ar"] = means["ar"]
    if "z" in means:
        line["loss_z"] = means["z"]
    targets = [name.removeprefix("gva/") for name in means if name.startswith("gva/")]
    for target in targets:
        suffix = f"/{target}" if len(targets) > 1 else ""
        line[f"loss_gva{suffix}"] = means[f"gva/{target}"]
        for key in ("gva_constant", "retrieval"):
            line[f"{key}{suffix}"] = means[f"{key}/{target}"]
    return line


class Monitor:
    """Writes log lines; a resumed run drops those after the step that it resumes from."""

    def __init__(self, run: Path, config: TrainConfig, first_step: int) -> None:
        self.path = run / "log.jsonl"
        self.config = config
        self._keep_until(first_step)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)
        self.started, self.first_step = time.monotonic(), first_step
        self.last = (self.started, first_step)

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, step: int, fields: Mapping[str, float]) -> None:
        """Appends one line for `step` optimizer steps done.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        bad = [name for name, value in fields.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{bad[0]} is {fields[bad[0]]} at step {step}: lower --optim.lr, or use --dtype "
                f"float32; the last checkpoint before it is kept in {self.path.parent}"
            )
        line = {"step": step, "images_seen": step * self.config.batch_size, **fields}
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        for name, value in fields.items():
            self.board.add_scalar(name, value, step)

    def images_per_second(self, step: int) -> float:
        """Since the last call."""
        now = time.monotonic()
        rate = (step - self.last[1]) * self.config.batch_size / max(now - self.last[0], 1e-9)
        self.last = (now, step)
        return rate

    def remaining(self, step: int) -> str:
        """Time to the last step at this run's mean speed, as m:ss."""
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) / max(done, 1) * (self.config.steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def close(self) -> None:
        self.board.close()


def print_line(step: int, steps: int, fields: Mapping[str, float], remaining: str) -> None:
    """One readable line a log interval."""
    shown = ("loss_ar", "loss_gva", "gva_constant", "val_loss_ar", "images_per_s")
    parts = [f"{name} {fields[name]:.4g}" for name in shown if name in fields]
    print(f"step {step}/{steps}  {'  '.join(parts)}  {remaining} left", flush=True)
