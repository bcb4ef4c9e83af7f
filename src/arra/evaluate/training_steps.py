"""After how many steps of which run a painter was written."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arra.files import read_json
from arra.models.loading import PIPELINE
from arra.models.run_folder import latest_checkpoint, read_state
from arra.resolve import resolve_folder

RUN = ("recipe", "objective", "alignment", "weights")
"""What exports of one run have in common."""


@dataclass(frozen=True)
class History:
    """Attributes:
    run: what exports of one run have in common, and of another have not.
    steps: of the optimizer.
    """

    run: str
    steps: int


def history_of(model: str) -> History | None:
    """Of an export or a run folder (its newest checkpoint); None where it is not written down."""
    path = Path(model).expanduser()
    if path.exists() and not path.is_dir():
        return None
    folder = resolve_folder(model, "model", weights=False)
    if not (folder / PIPELINE).is_file():
        return None
    origin = read_json(folder / PIPELINE).get("origin") or {}
    if "step" in origin:
        return History(_identity(origin), int(origin["step"]))
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return None
    config = read_json(folder / "config.json")
    described = {
        "recipe": config["recipe"],
        "objective": config["objective"],
        "alignment": config["align"],
        "weights": "raw",
    }
    return History(_identity(described), int(read_state(checkpoint)["step"]))


def _identity(described: dict[str, Any]) -> str:
    return json.dumps({name: described.get(name) for name in RUN}, sort_keys=True)
