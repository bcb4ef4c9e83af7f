"""`arra demo` from the command line, small: every stage really runs, and again costs nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_demo_runs_small_and_repeats_nothing(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "arra", "demo", "--out", "demo", "--steps", "4"]
    command += ["--train-images", "64", "--prompts", "8", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished: list[dict[Path, int]] = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        weights = (tmp_path / "demo").rglob("*.safetensors")
        finished.append({file: file.stat().st_mtime_ns for file in weights})
    assert finished[0] == finished[1], "what was finished was done again"
    html = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in html
    links = re.findall(r"(?:src|href)=[\"']?(?!data:|#)([^\"' >]+)", html)
    assert not links, f"the report is not self-contained: {links[:3]}"
    assert (tmp_path / "demo" / "aligned" / "export" / "pipeline.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo"], "something else was written"
