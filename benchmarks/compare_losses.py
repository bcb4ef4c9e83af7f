"""Do two commits train alike? 100 steps of each tiny recipe at both, compared step by step.

    .venv/bin/python benchmarks/compare_losses.py main HEAD
    .venv/bin/python benchmarks/compare_losses.py v0.1 HEAD --only scenes llm

Each commit is taken out of git into a temporary folder and runs its own tests/golden/loss_runs.py
with this environment. A table says where each term first differs in its last bit and by how much at
most; the last line is JSON. Exit code 1: a difference beyond what another machine makes, or a term
that only one of them has.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = Path("tests") / "golden"
sys.path.insert(0, str(ROOT / GOLDEN))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs=2, metavar="COMMIT", help="whatever git names a commit by")
    parser.add_argument("--only", nargs="*", default=[], metavar="RECIPE", help="none = all")
    options = parser.parse_args()
    commits = [_git("rev-parse", "--short", f"{name}^{{commit}}") for name in options.commits]
    found = [_losses(commit, options.only) for commit in commits]
    rows = _compared(*found)
    print(f"\n{'recipe':16}{'term':14}{'first differs':>14}{'largest':>12}{'beyond at':>12}")
    for row in rows:
        first, beyond = (f"step {row[k]}" if row[k] else "-" for k in ("first", "beyond"))
        print(f"{row['recipe']:16}{row['term']:14}{first:>14}{row['largest']:12.1e}{beyond:>12}")
    have = [
        {f"{recipe} {term}" for recipe, terms in each.items() for term in terms} for each in found
    ]
    only_one = sorted(have[0] ^ have[1])
    if only_one:
        print(f"only one of the commits has: {', '.join(only_one)}")
    alike = not only_one and not any(row["beyond"] for row in rows)
    print(json.dumps({"commits": commits, "alike": alike, "only_one": only_one, "terms": rows}))
    return 0 if alike else 1


def _compared(
    one: dict[str, dict[str, list[float]]], other: dict[str, dict[str, list[float]]]
) -> list[dict[str, object]]:
    from loss_runs import compare

    return [
        {
            "recipe": recipe,
            "term": term,
            **asdict(compare(one[recipe][term], other[recipe][term], term)),
        }
        for recipe in one
        for term in one[recipe]
        if term in other.get(recipe, {})
    ]


def _losses(commit: str, only: list[str]) -> dict[str, dict[str, list[float]]]:
    """Recipe -> term -> its value at each step, trained by a commit's own code."""
    print(f"training at {commit}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as place:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit, "src", str(GOLDEN)],
            capture_output=True,
            check=True,
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(place, filter="data")
        script = Path(place) / GOLDEN / "loss_runs.py"
        if not script.exists():
            sys.exit(f"{commit} has no {GOLDEN / 'loss_runs.py'}: it is older than the comparison")
        command = [sys.executable, str(script), "--out", f"{place}/out"]
        done = subprocess.run(
            [*command, *(["--only", *only] if only else [])],
            cwd=place,
            env={**os.environ, "PYTHONPATH": f"{place}/src", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            sys.exit(f"{commit} cannot train (see above)")
        files = sorted(Path(place, "out").glob("*.json"))
        return {file.stem: json.loads(file.read_text()) for file in files}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr.strip())
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
