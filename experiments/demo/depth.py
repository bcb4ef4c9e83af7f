"""Which block to align in the demo's painter: trained on seeds that the demo's report never uses.

    arra prepare builtin:scenes --image-tokenizer builtin:scenes \
        --encoder clip=builtin:scenes-clip --size 64 --splits train val --limit 16000 \
        --out runs/depth/data --threads 1
    python experiments/demo/depth.py --data runs/depth/data --out runs/depth

Trains one arm per layer (none = plain) and seed, two processes at a time, one thread each; paints
captions of the validation split; writes results.json here and what the demo's report quotes into
src/arra/bundled/scenes-depth.json.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arra.data.shards import open_dataset
from arra.evaluate.scenes import scene_accuracy
from arra.files import read_json, write_json
from arra.generate.pipeline import Pipeline
from arra.resolve import BUNDLED

HERE = Path(__file__).parent


def train(data: str, out: Path, layer: int | None, seed: int, steps: int) -> Path:
    """One arm; the same call again resumes or skips it."""
    run = out / f"layer-{layer or 'none'}-seed-{seed}"
    command = [sys.executable, "-m", "arra.cli", "train", "scenes", "--data", data]
    command += ["--out", str(run), "--seed", str(seed), "--steps", str(steps), "--threads", "1"]
    command += ["--align.weight", "0"] if layer is None else ["--align.layer", str(layer)]
    with open(f"{run}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return run


def measure(run: Path, prompts: list[str]) -> dict[str, float]:
    """Scene accuracy of what the run paints, and its validation loss."""
    last = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    images = Pipeline.from_pretrained(run)(prompts, seeds=list(range(len(prompts))), cfg=1.0)
    found = scene_accuracy(images, prompts)
    names = ("all_right", "colour", "shape", "size", "relation")
    accuracy = {name: found[name]["mean"] for name in names}
    (run / "last.json").write_text(last, encoding="utf-8")
    return {"val_loss_ar": read_json(run / "last.json")["val_loss_ar"], **accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3], help="0 = plain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--used", type=int, default=2, help="the layer that the recipe taps")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [(layer or None, seed) for seed in arguments.seeds for layer in arguments.layers]
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(lambda job: train(arguments.data, arguments.out, *job, arguments.steps), jobs)
        )
    prompts = open_dataset(arguments.data, "val", features=()).texts[: arguments.prompts]
    found = [
        {"layer": layer, "seed": seed, "metrics": measure(run, prompts)}
        for (layer, seed), run in zip(jobs, runs, strict=True)
    ]
    rows = [{"layer": layer or None, "metrics": mean(found, layer)} for layer in arguments.layers]
    settings = {"steps": arguments.steps, "seeds": arguments.seeds, "prompts": arguments.prompts}
    write_json(HERE / "depth.json", {**settings, "runs": found, "means": rows})
    seeds = ", ".join(map(str, arguments.seeds))
    source = (
        f"From experiments/demo/depth.json: {arguments.steps} steps, seeds {seeds}, "
        f"{arguments.prompts} captions of the validation split, no guidance."
    )
    depth = {"layers": 4, "used": arguments.used, "source": source, "rows": rows}
    write_json(BUNDLED / "scenes-depth.json", depth)
    print(rows)


def mean(found: list[dict], layer: int) -> dict[str, float]:
    """Mean over seeds of every measure of one layer."""
    chosen = [f["metrics"] for f in found if f["layer"] == (layer or None)]
    return {name: sum(m[name] for m in chosen) / len(chosen) for name in chosen[0]}


if __name__ == "__main__":
    main()
