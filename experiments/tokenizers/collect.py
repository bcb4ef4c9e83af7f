"""Gathers the reports that run.sh wrote into results.json and the pictures beside this file.

python experiments/tokenizers/collect.py runs/tokenizers
"""

import json
import sys
from pathlib import Path

from PIL import Image

from arra.files import read_json, write_json

HERE = Path(__file__).parent
KEPT = ("source", "metrics", "reasons", "images_per_s", "threads", "tokenizer", "encoder")


def last_line(folder: Path) -> dict | None:
    """The end of a fit's log, if the fit was run here."""
    log = folder / "log.jsonl"
    return json.loads(log.read_text().splitlines()[-1]) if log.exists() else None


def main(out: Path) -> None:
    curves = read_json(HERE / "results.json").get("curves")  # curve.py writes that part
    results = {"curves": curves} if curves else {}
    for report_path in sorted(out.glob("measured-*/report.json")):
        name = report_path.parent.name.removeprefix("measured-")
        report = read_json(report_path)
        report["source"]["name"] = Path(report["source"]["name"]).name
        results[name] = {key: report[key] for key in KEPT}
        results[name]["fit"] = last_line(out / name.split("-")[0])
        with Image.open(report_path.parent / "reconstructions.png") as picture:
            picture.convert("RGB").quantize(128).save(HERE / f"{name}.png", optimize=True)
    write_json(HERE / "results.json", results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
