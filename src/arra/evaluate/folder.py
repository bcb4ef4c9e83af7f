"""The folder of an evaluation: everything that its report is made of, written at once.

report.json holds the values and the protocol, report.md and report.html say the same to readers,
scores.jsonl has a line for each judged picture, and the *.png are sample grids.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arra.evaluate.gallery import Gallery, galleries, write_samples
from arra.evaluate.image_set import ImageSet
from arra.evaluate.markdown import markdown
from arra.evaluate.outputs import REPORT, SCORES, check_out, is_file
from arra.evaluate.page import page
from arra.files import atomic_dir, write_json
from arra.pages.frame import write_page
from arra.pages.sheet import sheet


@dataclass
class Measured:
    """What an evaluation found, and what it looked at.

    Attributes:
        report: JSON-ready.
        scores: of each generated picture, by index: {name: (N,)}, NaN where there is no answer.
        real, generated: the sets, where images were judged.
        size: pixels per side that both were cropped to.
        galleries: pictures to show beside the best and worst by each score.
    """

    report: dict[str, Any]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    real: ImageSet | None = None
    generated: ImageSet | None = None
    size: int = 0
    galleries: list[Gallery] = field(default_factory=list)


def write_evaluation(out: Path, measured: Measured) -> None:
    """Writes the JSON alone, where `out` ends in .json, or the whole folder.

    A folder that holds an evaluation is replaced.
    """
    if is_file(out):
        write_json(out, measured.report)
        return
    check_out(out)
    with atomic_dir(out, replaces=True) as folder:
        write_json(folder / REPORT, measured.report)
        shown: list[Gallery] = []
        if measured.generated is not None:
            rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in score_rows(measured))
            with (folder / SCORES).open("w", encoding="utf-8") as file:
                file.writelines(rows)
            shown = galleries(measured.generated, measured.real, measured.scores, measured.size)
            write_samples(folder, shown[0])
            shown += measured.galleries
        for each in shown:
            sheet(each.cells).save(folder / f"{each.name}.png", "PNG", optimize=True)
        (folder / "report.md").write_text(markdown(measured.report, shown), encoding="utf-8")
        title, body = page(measured.report, measured.scores, shown)
        write_page(folder / "report.html", title, body)


def score_rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """A line for each judged picture: index, name, caption, seed, scores (null: no answer)."""
    generated = measured.generated
    assert generated is not None
    for index, name in enumerate(generated.names):
        yield {
            "index": index,
            "name": name,
            "caption": None if generated.captions is None else generated.captions[index],
            "seed": None if generated.seeds is None else generated.seeds[index],
            "scores": {
                key: None if np.isnan(values_N[index]) else float(values_N[index])
                for key, values_N in measured.scores.items()
            },
        }
