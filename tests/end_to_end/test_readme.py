"""README.md is run: every command block in order, in one folder, with a dozen tiny pictures.

A comment before each block says how: `run`, `run with A => B; C => D` (replacements that make it
small or offline), or `skip, REASON`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(
    r"(?:<!-- test: (?P<how>.*?) -->\n)?```(?P<kind>bash|python)\n(?P<code>.*?)```", re.S
)


def _blocks() -> list[tuple[str, str, str]]:
    found = BLOCK.finditer(README.read_text(encoding="utf-8"))
    return [(m["how"] or "", m["kind"], m["code"]) for m in found]


def _pictures(folder: Path, count: int = 12) -> None:
    folder.mkdir()
    colours = ("red", "green", "blue", "white")
    lines = []
    for n in range(count):
        picture = Image.new("RGB", (72, 64), colours[n % 4])
        ImageDraw.Draw(picture).ellipse((10, 10 + n, 40, 40 + n), fill=colours[(n + 1) % 4])
        picture.save(folder / f"{n:04}.png")
        text = f"a {colours[(n + 1) % 4]} ball on {colours[n % 4]}"
        lines.append(json.dumps({"file_name": f"{n:04}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_every_block_says_how_it_is_tested() -> None:
    blocks = _blocks()
    assert len(blocks) >= 6
    for how, _, code in blocks:
        assert re.match(r"run$|run with .+ => .+|skip, .+", how), f"{how!r} before\n{code}"


def test_the_commands_run(tmp_path: Path) -> None:
    _pictures(tmp_path / "pictures")
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for how, kind, code in _blocks():
        if how.startswith("skip"):
            continue
        for change in filter(None, how.removeprefix("run").removeprefix(" with ").split("; ")):
            old, new = change.split(" => ")
            assert old in code, f"{old!r} is not in\n{code}"
            code = code.replace(old, new)
        command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-ec", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    painted = sorted((tmp_path / "painted").rglob("*.png"))
    assert painted, "no pictures were painted"
    for file in painted:
        Image.open(file).verify()
    assert json.loads((tmp_path / "report" / "report.json").read_text())
