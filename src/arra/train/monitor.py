"""What a run says of itself while it lasts: log.jsonl, trackers, progress on the terminal."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from PIL import Image

from arra.files import atomic_write
from arra.train.progress import Live
from arra.train.throughput import Throughput
from arra.train.trackers import Trackers

if TYPE_CHECKING:
    from arra.train.setup import Run


def log_line(means: Mapping[str, float]) -> dict[str, float]:
    """The fields of a log line: `loss_ar`, `loss_gva`, ... ; several targets are named apart.

    `loss` is the mean of what was minimised, so it stays right while lambda moves.
    """
    line = {"loss": means["loss"]} if "loss" in means else {}
    if "ar" in means:  # not so where every step since the last line was refused
        line["loss_ar"] = means["ar"]
    if "cca" in means:
        line["loss_cca"] = means["cca"]
    if "reward_own" in means:  # not so where no image had another's prompt
        own, other = means["reward_own"], means["reward_other"]
        line |= {"reward_own": own, "reward_other": other, "reward_margin": own - other}
        line["ranked"] = means["ranked"]
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
    """Writes the log's lines; a resumed run drops those after the step that it resumes from.

    A context; all processes of a run hold one, process 0 writes and shows.

    Args:
        run: whose folder it writes to.
        first_step: optimizer steps done before this session.
        logged: lines after this step are dropped: they come again.
    """

    def __init__(self, run: "Run", first_step: int, logged: int) -> None:
        self.run, self.path = run, run.folder / "log.jsonl"
        self.throughput = Throughput(run, first_step)
        self._live: Live | None = None
        self._trackers: Trackers | None = None
        if run.world.is_main:
            self._keep_until(logged)
            self._trackers = Trackers(run.folder, run.config, first_step)
            self._live = Live(run.config.steps, first_step)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.close()
        if self._trackers is not None:
            self._trackers.close(failed=error is not None)

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def measured(self, step: int, means: Mapping[str, float]) -> dict[str, float]:
        """Speed and memory since the last log line; all processes call it."""
        return self.throughput.since_last(step, means)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no training: validation, painting, checkpoints."""
        with self.throughput.apart():
            yield

    def step(self, step: int) -> None:
        """So many optimizer steps are done."""
        if self._live is not None:
            self._live.step(step)

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
        if self._trackers is None or self._live is None:
            return
        line = {"step": step, "images_seen": step * self.run.config.batch_size, **fields}
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        self._trackers.scalars(fields, step)
        self._live.line(step, fields)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Hands a picture to the trackers."""
        if self._trackers is not None:
            self._trackers.picture(name, picture, step)
