"""Writes the lists of what others use: every flag of the command line, every public Python name.

.venv/bin/python tests/golden/write.py            after a deliberate change
.venv/bin/python tests/golden/write.py --check    what the test runs
"""

import contextlib
import difflib
import io
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMANDS = (
    *("demo", "prepare", "tokenizer train", "tokenizer evaluate", "train scenes"),
    *("generate", "evaluate", "study", "export", "convert", "doctor"),
    *("evaluate arrange", "evaluate compare", "evaluate scored", "evaluate sweep"),
    *("bench prepare", "bench train", "bench generate", "bench loader"),
)


def flags_of(command: str) -> list[str]:
    """`command --flag` for every flag that `arra command --help` lists."""
    from arra import cli

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    flags = set()
    for line in printed.getvalue().splitlines():
        left = line.lstrip("│ ")
        if left.startswith("-"):
            flags |= set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", left.split("  ")[0]))
    assert flags, f"`arra {command} --help` lists no flags:\n{printed.getvalue()}"
    return [f"{command} {flag}" for flag in sorted(flags)]


def surfaces() -> dict[str, list[str]]:
    import arra
    from arra import cli

    assert {command.split()[0] for command in COMMANDS} == set(cli.VERBS)
    for name in arra.__all__:
        getattr(arra, name)
    return {
        "cli.txt": [flag for command in COMMANDS for flag in flags_of(command)],
        "public_names.txt": sorted(arra.__all__),
    }


def main() -> int:
    os.environ["COLUMNS"] = "100"
    status = 0
    for name, lines in surfaces().items():
        path = HERE / name
        if "--check" not in sys.argv:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            continue
        frozen = path.read_text(encoding="utf-8").splitlines()
        for line in difflib.unified_diff(frozen, lines, name, "now", n=0, lineterm=""):
            print(line)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
