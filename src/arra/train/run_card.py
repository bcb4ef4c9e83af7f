"""run_card.json: what a stranger needs in order to judge whether a run can be repeated."""

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import arra
from arra.files import write_json


def write_run_card(
    run: Path, dataset_hash: str, features: Mapping[str, Any], seconds: float
) -> None:
    """run_card.json: what a stranger needs in order to judge whether this run can be repeated."""
    write_json(
        run / "run_card.json",
        {
            "arra": arra.__version__,
            "commit": _commit(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "processor": _processor(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "dataset_manifest_sha256": dataset_hash,
            "encoders": features,
            "seconds": round(seconds, 1),
        },
    )


def _commit() -> str | None:
    """The package's commit, if it runs from a git checkout."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return None
    return platform.processor() or None
