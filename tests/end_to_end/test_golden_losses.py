"""100 steps of each recipe: the losses are those of tests/golden/losses, to a stated tolerance."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loss_runs import RUNS, WRITTEN, compare, losses

FAST = ("scenes", "base-classes")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.long) for n in RUNS]
)
def test_losses_of_a_recipe(name: str, tmp_path: Path) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    found = losses(name, tmp_path)
    written = json.loads((WRITTEN / f"{name}.json").read_text())
    assert found.keys() == written.keys()
    apart = {term: compare(found[term], written[term], term) for term in found}
    assert not [term for term, difference in apart.items() if difference.beyond], (
        f"{apart}: if that was meant, write them anew (tests/golden/loss_runs.py) and say why"
    )


def test_what_was_written_learns() -> None:
    """A file of noise or of a run that stands still would hold nothing."""
    for file in sorted(WRITTEN.glob("*.json")):
        loss = json.loads(file.read_text())["loss_ar"]
        assert sum(loss[-10:]) < 0.95 * sum(loss[:10]), file


def test_a_difference_is_found_where_it_begins() -> None:
    one = [1.0] * 100
    assert compare(one, one, "loss") == compare(one, list(one), "loss")
    assert compare(one, one, "loss").first is None
    late = [*one[:50], *[1.0005] * 50]
    assert (compare(one, late, "loss").first, compare(one, late, "loss").beyond) == (51, None)
    early = [*one[:20], 1.0005, *one[21:]]
    assert compare(one, early, "loss").beyond == 21
    assert compare(one, early, "grad_norm").beyond == 21
    assert compare(one, [float("nan"), *one[1:]], "loss").beyond == 1


ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository's history")
def test_a_commit_trains_like_itself() -> None:
    command = [sys.executable, "benchmarks/compare_losses.py", "HEAD", "HEAD", "--only", "scenes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["alike"]
    assert {row["term"] for row in said["terms"]} == {"loss", "loss_ar", "loss_gva", "grad_norm"}
    assert not any(row["first"] for row in said["terms"])
