"""The report of an evaluation: its JSON, and its values in a terminal."""

import platform
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import arra
from arra.evaluate.finding import Finding

FORMAT_VERSION = 2


def begun(seed: int) -> dict[str, Any]:
    """A report without values."""
    return {
        "format_version": FORMAT_VERSION,
        "metrics": {},
        "intervals": {},
        "counts": {},
        "details": {},
        "reasons": {},
        "warnings": [],
        "seed": seed,
        "versions": versions(),
    }


def put(report: dict[str, Any], findings: dict[str, Finding], real_count: int | None) -> None:
    """Writes findings into a report."""
    for key, found in findings.items():
        report["metrics"][key] = found.value
        report["counts"][key] = [real_count, found.n]
        if found.low is not None:
            report["intervals"][key] = {
                "low": found.low,
                "high": found.high,
                "method": found.method,
            }
        if found.reason is not None:
            report["reasons"][key] = found.reason
        if found.details:
            report["details"][key] = dict(found.details)


def told(report: dict[str, Any]) -> str:
    """The report's values for a terminal: one line a measure, with its reason where it has one."""
    lines = []
    width = max(map(len, report["metrics"]), default=0)
    for name, value in report["metrics"].items():
        reason = report["reasons"].get(name)
        interval = report["intervals"].get(name)
        shown = "null" if value is None else f"{value:.6g}"
        between = f"  ({interval['low']:.6g} to {interval['high']:.6g})" if interval else ""
        lines.append(f"{name:<{width}}  {shown}{between}" + (f"  ({reason})" if reason else ""))
    for name, over in report.get("over_seeds", {}).items():
        if over["mean"] is not None:
            between = f"({over['low']:.6g} to {over['high']:.6g})"
            lines.append(f"{name} over {over['seeds']} seeds  {over['mean']:.6g}  {between}")
    return "\n".join([*lines, *(f"warning: {text}" for text in report["warnings"])])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "arra": arra.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "pillow": Image.__version__,
        "python": platform.python_version(),
    }
