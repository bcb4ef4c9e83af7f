"""Does CCA make guidance unnecessary for the bundled painter of scenes?

    arra prepare builtin:scenes --image-tokenizer builtin:scenes --size 64 --limit 16000 \
        --out runs/cca/data --threads 1
    python experiments/cca/run.py --data runs/cca/data --out runs/cca

Fine-tunes `builtin:scenes` by `arra train cca`, one arm for each beta and lambda, two processes
at a time, one thread each; paints captions of the test split with the start at several guidance
scales and with each arm at cfg 1, same prompts and seeds; judges the pictures by reading them back.
Writes results.json and pictures.png here after each arm; the same command again goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from arra.data.images import grid
from arra.data.shards import open_dataset
from arra.evaluate.intervals import bootstrap_mean
from arra.evaluate.scenes import scene_verdicts, summarise
from arra.files import read_json, write_json
from arra.generate.pipeline import Pipeline

HERE = Path(__file__).parent
SCALES = (1.0, 1.5, 3.0)
ARMS = ("1,1,1e-4", "0.02,1000,1e-4", "0.1,1,1e-4", "0.02,1,1e-4", "0.02,1000,1e-5")
FIELDS = ("all_right", "colour", "shape", "fragments")


def train(arguments: argparse.Namespace, beta: float, weight: float, lr: float) -> Path:
    """One arm; the same call again resumes or skips it."""
    run = arguments.out / f"beta-{beta:g}-lambda-{weight:g}-lr-{lr:g}"
    command = [sys.executable, "-m", "arra.cli", "train", "cca", "--model", "builtin:scenes"]
    command += ["--data", arguments.data, "--out", str(run), "--threads", "1"]
    command += ["--cca.beta", str(beta), "--cca.weight", str(weight), "--optim.lr", str(lr)]
    command += ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch)]
    command += ["--model.attention", "eager", "--log.every", "10", "--checkpoint.every", "25"]
    command += ["--log.validate-images", "128"]
    with open(f"{run}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return run


def painted(model: str, folder: Path, prompts: list[str], cfg: float) -> list[np.ndarray]:
    """The pictures of a model, painted once."""
    file = folder / f"painted-{cfg:g}-{len(prompts)}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pipe = Pipeline.from_pretrained(model)
        images = pipe(prompts, seeds=list(range(len(prompts))), cfg=cfg)
        np.save(file, np.stack([np.asarray(image) for image in images]))
    return list(np.load(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--arms", nargs="+", default=ARMS, help="beta,lambda,learning rate")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    prompts = list(open_dataset(arguments.data, "test").texts[: arguments.prompts])
    file = HERE / "results.json"
    results = read_json(file) if file.exists() else {}
    verdicts: dict[str, dict[str, np.ndarray]] = {}
    rows: dict[str, list[np.ndarray]] = {}

    def judged() -> None:
        for name, found in verdicts.items():
            before = results.get(name, {})
            results[name] = before | {k: v for k, v in summarise(found).items() if k in FIELDS}
            if name.startswith("start"):
                continue
            for scale in SCALES:
                against = verdicts[f"start, cfg {scale:g}"]
                results[name][f"minus start at cfg {scale:g}"] = {
                    field: difference(found[field], against[field]) for field in FIELDS
                }
        write_json(file, results)
        shown = [Image.fromarray(p) for pictures in rows.values() for p in pictures[:8]]
        grid(shown, 8).save(HERE / "pictures.png")

    arms = [tuple(float(v) for v in arm.split(",")) for arm in arguments.arms]

    def arm(values: tuple[float, ...]) -> tuple[str, Path, float]:
        began = time.monotonic()
        run = train(arguments, *values)
        return run.name, run, time.monotonic() - began

    with ThreadPoolExecutor(2) as pool:
        trained = [pool.submit(arm, values) for values in arms]
        for scale in SCALES:
            name = f"start, cfg {scale:g}"
            pictures = painted("builtin:scenes", arguments.out / "start", prompts, scale)
            verdicts[name], rows[name] = scene_verdicts(pictures, prompts), pictures
            judged()
        for future in trained:
            name, run, seconds = future.result()
            pictures = painted(str(run), run / "painted", prompts, 1.0)
            lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
            told = [json.loads(line) for line in lines]
            keep = ("step", "loss_cca", "reward_own", "reward_other", "reward_margin", "ranked")
            keep += tuple(f"val_{name}" for name in keep)
            log = [{k: round(v, 5) for k, v in line.items() if k in keep} for line in told]
            results[name] = {"steps": arguments.steps, "batch": arguments.batch, "log": log}
            results[name]["seconds"] = round(seconds, 1)
            verdicts[name], rows[name] = scene_verdicts(pictures, prompts), pictures
            judged()


def difference(own: np.ndarray, other: np.ndarray) -> dict[str, float] | None:
    """Mean difference over captions, with its 95 % interval."""
    interval = bootstrap_mean(own - other)
    return interval.to_json() if interval else None


if __name__ == "__main__":
    main()
