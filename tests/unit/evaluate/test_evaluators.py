"""Measures of given features against the evaluators that published numbers were made with.

Golden numbers: torch-fidelity 0.4.0, clean-fid and ADM's evaluator, each by its own functions.
"""

import json
from pathlib import Path

import formula
import pytest
from formula import fill

from arra.evaluate.distances import frechet, kernel_distance
from arra.evaluate.inception_score import inception_score
from arra.evaluate.prdc import prdc

GOLDEN = json.loads(Path(formula.__file__).with_name("evaluators.json").read_text("utf-8"))
REAL = fill("metrics.real", (300, 24), 1.0).numpy()
GENERATED = fill("metrics.generated", (240, 24), 0.9).numpy() + 0.15
LOGITS = fill("metrics.logits", (400, 11), 2.0).numpy()


def measured():
    of_three = prdc(REAL, GENERATED)[3]
    return {
        "fd": frechet(REAL, GENERATED),
        "kid": kernel_distance(REAL[:240], GENERATED, subsets=1, subset_size=240).mean,
        "is": inception_score(LOGITS, split_size=100).value,
        "precision": of_three.precision.value,
        "recall": of_three.recall.value,
    }


@pytest.mark.parametrize("evaluator", ["torch-fidelity", "clean-fid", "adm"])
def test_measures_equal_those_of(evaluator):
    golden = {name: value for name, value in GOLDEN[evaluator].items() if name != "source"}
    found = {name: value for name, value in measured().items() if name in golden}
    assert found == pytest.approx(golden, rel=1e-6)
