"""Gathers the studies that run.sh made into results.json and one picture a pack.

    python experiments/packs/collect.py runs/packs

Picture: rows of real test images, their reconstructions' painters' answers: real, plain, ARRA.
"""

import sys
from pathlib import Path

from PIL import Image

from arra.data.images import grid, load_rgb, square
from arra.data.sources import Record, open_source
from arra.files import read_json, write_json

HERE = Path(__file__).parent
COUNT = 12


def main(out: Path, packs: Path) -> None:
    results = {}
    for name in ("emoji", "chestxray"):
        study = out / name
        if not (study / "results.json").is_file():
            continue
        found = read_json(study / "results.json")
        results[name] = {
            "arms": {
                arm: {"metrics": value["metrics"], "guidance": value["guidance"]}
                for arm, value in found["pairs"][0]["arms"].items()
            },
            "differences": found["pairs"][0]["differences"],
            "ceiling": found["ceiling"],
            "run": {name: bare(fact) for name, fact in found["run"]["facts"].items()},
        }
        picture(study, packs / name).save(HERE / f"{name}.png", optimize=True)
    write_json(HERE / "results.json", results)


def bare(fact: str) -> str:
    """A fact without the folders of the machine it was found on."""
    for folder in (Path.cwd(), Path.cwd().parent / "shared" / "data"):
        fact = fact.replace(f"{folder}/", "")
    return fact


def picture(study: Path, pack: Path) -> Image.Image:
    """Real test images above what each arm painted for their captions."""
    source = open_source(str(pack), split="test")
    records = [r for r in source.read(0, COUNT) if isinstance(r, Record)]
    rows = [[square(load_rgb(record.image), 64) for record in records]]
    for arm in ("plain", "aligned"):
        folder = study / "painted" / arm / "test"
        rows.append([Image.open(file) for file in sorted(folder.glob("*.png"))[:COUNT]])
    return grid([image for row in rows for image in row], COUNT).quantize(128)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
