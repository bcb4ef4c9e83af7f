"""Where a run's curves and pictures go besides log.jsonl: TensorBoard always, Weights & Biases and
trackio where asked for (--log.trackers).

What they keep locally lies in the run folder. Which run of theirs it is stands in trackers.json, so
that a resumed run goes on in the same one. One of the extras that fails is given up with a warning:
a network must not end a training run.
"""

import importlib.util
import json
import os
import sqlite3
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from arra.config import TrainConfig
from arra.config_json import to_json
from arra.files import read_json, write_json

FILE = "trackers.json"
PROJECT = "arra"
"""Of both extras, unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise."""


class Tracker(Protocol):
    """One place that curves and pictures go to.

    Attributes:
        failures: what it raises when it cannot go on; other errors are mistakes of ours.
    """

    name: str
    failures: tuple[type[Exception], ...]

    def scalars(self, fields: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, picture: Image.Image, step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class Trackers:
    """All trackers of a run.

    Args:
        folder: the run's.
        first_step: optimizer steps done before; TensorBoard forgets what came after.
    """

    def __init__(self, folder: Path, config: TrainConfig, first_step: int) -> None:
        self._all: list[Tracker] = [TensorBoard(folder, config, first_step)]
        kinds: dict[str, type[WeightsAndBiases] | type[Trackio]]
        kinds = {"wandb": WeightsAndBiases, "trackio": Trackio}
        for name in config.log.trackers:
            kind = kinds[name]
            try:
                self._all.append(kind(folder, config))
            except kind.failures as error:
                _warn(name, error)

    def scalars(self, fields: Mapping[str, float], step: int) -> None:
        """Numbers by name after `step` optimizer steps."""
        self._each(lambda tracker: tracker.scalars(fields, step))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture by name after `step` optimizer steps."""
        self._each(lambda tracker: tracker.picture(name, picture, step))

    def close(self, failed: bool = False) -> None:
        """Sends what is left. `failed`: the run ends with an error."""
        self._each(lambda tracker: tracker.close(failed))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._all):
            try:
                act(tracker)
            except tracker.failures as error:
                _warn(tracker.name, error)
                self._all.remove(tracker)


def require_trackers(names: Sequence[str]) -> None:
    """Checks that the libraries are there, before anything is loaded.

    Raises:
        ValueError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log.trackers {name} needs pip install 'arra[{name}]'")


class TensorBoard:
    """RUN/tensorboard: `tensorboard --logdir RUN`."""

    name = "tensorboard"
    failures: tuple[type[Exception], ...] = ()

    def __init__(self, folder: Path, config: TrainConfig, first_step: int) -> None:
        purge = first_step + 1 if first_step else None
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        if not first_step:
            text = json.dumps(to_json(config), indent=1)
            self._board.add_text("config", f"```json\n{text}\n```")

    def scalars(self, fields: Mapping[str, float], step: int) -> None:
        for name, value in fields.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._board.close()


class WeightsAndBiases:
    """wandb, in RUN/wandb. WANDB_MODE=offline, WANDB_PROJECT and the rest of its environment are
    respected."""

    name = "wandb"
    failures: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError)

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            os.environ.setdefault(variable, str((folder / "wandb" / "cache").resolve()))
        import wandb

        self.failures = (*self.failures, wandb.errors.Error)
        (folder / "wandb").mkdir(exist_ok=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=_identity(folder, self.name),
                name=folder.name,
                dir=str(folder),
                config=to_json(config),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise OSError(str(error)) from error
        # Steps of our own: a resumed run may say a step again, which wandb's own counter refuses.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._picture = wandb.Image

    def scalars(self, fields: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **fields})

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({"step": step, name: self._picture(picture)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """trackio, in RUN/trackio unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says
    otherwise."""

    name = "trackio"
    failures: tuple[type[Exception], ...] = (
        *(OSError, RuntimeError, ValueError, sqlite3.Error),
        HfHubHTTPError,
    )

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{folder.name}-{_identity(folder, self.name)}",
            config=to_json(config),
            resume="allow",
            embed=False,
        )
        self._picture = trackio.Image

    def scalars(self, fields: Mapping[str, float], step: int) -> None:
        self._run.log(dict(fields), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._picture(picture)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


def _identity(folder: Path, name: str) -> str:
    """The id of this run at a tracker, made at the first start."""
    file = folder / FILE
    known = read_json(file) if file.exists() else {}
    if name not in known:
        known[name] = uuid.uuid4().hex[:8]
        write_json(file, known)
    return known[name]


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"warning: {name} is given up, training goes on ({reason})", file=sys.stderr, flush=True)
