"""Distance against steps: measures every snapshot of the fits of fit_packs.sh on the test split.

    python experiments/tokenizers/curve.py runs/tokenizers/gan PACKS

Two distances, both by the bundled judge. `fd_128` is that of experiments/packs: the first 128
reconstructions to all test images, as painters were measured there with their 128 pictures. `fd`
is that of `arra tokenizer evaluate`: all reconstructions to all test images. Writes the part
`curves` of results.json, curves.png and PACK-gan.png beside this file. What is in results.json
already is not measured again: remove `curves` there after another fit.
"""

import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import ScalarFormatter
from PIL import Image

from arra.data.images import grid, load_rgb, square, to_pil, to_uint8
from arra.data.sources import Record, open_source
from arra.encoders import Encoder, load_encoder
from arra.evaluate.distances import frechet
from arra.evaluate.features import image_features
from arra.files import read_json, write_json
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.measure import psnr, ssim

HERE = Path(__file__).parent
PAINTERS = {"emoji": (7.9, 11.2), "chestxray": (4.08, 3.22)}
"""fd_128 of the plain and the aligned painter: experiments/packs/LOG.md."""
SIZE, PAINTED, SHOWN = 64, 128, 10


def main(fits: Path, packs: Path) -> None:
    judge = load_encoder("builtin:scenes-judge")
    results = read_json(HERE / "results.json")
    before = results.get("curves", {})
    results["curves"] = {}
    for pack in PAINTERS:
        runs = sorted(folder for folder in fits.glob(f"{pack}-*") if folder.is_dir())
        images = test_images(packs / pack)
        real_ND = image_features(images, judge)
        known = before.get(pack, {})
        curves = {
            "images": len(images),
            "fd_128 of the images themselves": frechet(real_ND, real_ND[:PAINTED]),
            "before": known.get("before") or measure(fits.parent / pack, images, real_ND, judge),
        }
        shown = [fits.parent / pack]
        for run in runs:
            settings = read_json(run / "fit.json")
            name = run.name.removeprefix(f"{pack}-")
            done = {point["step"]: point for point in known.get(name, [])}
            points = []
            for snapshot in sorted((run / "snapshots").iterdir()):
                step = int(snapshot.name.removeprefix("step-"))
                seen = {"step": step, "images_seen": step * settings["batch_size"]}
                found = done.get(step) or measure(snapshot, images, real_ND, judge)
                points.append(seen | found)
                print(run.name, points[-1], flush=True)
            curves[name] = points
            shown.append(run / "snapshots" / f"step-{points[-1]['step']:08d}")
        results["curves"][pack] = curves
        rows = [images[:SHOWN], *(reconstructed(folder, images[:SHOWN]) for folder in shown)]
        pictures = [p.resize((96, 96), Image.Resampling.NEAREST) for row in rows for p in row]
        grid(pictures, SHOWN).quantize(128).save(HERE / f"{pack}-gan.png", optimize=True)
    write_json(HERE / "results.json", results)
    plot(results["curves"])


def test_images(pack: Path) -> list[Image.Image]:
    source = open_source(str(pack), split="test")
    rows = [r for r in source.read(0, len(source)) if isinstance(r, Record)]
    assert len(rows) == len(source)
    return [square(load_rgb(row.image), SIZE) for row in rows]


def reconstructed(folder: Path, images: list[Image.Image]) -> list[Image.Image]:
    tokenizer = load_image_tokenizer(folder)
    parts = [to_uint8(images[start : start + 32]) for start in range(0, len(images), 32)]
    return [image for part in parts for image in to_pil(tokenizer.decode(tokenizer.encode(part)))]


def measure(
    folder: Path, images: list[Image.Image], real_ND: np.ndarray, judge: Encoder
) -> dict[str, float]:
    rebuilt = reconstructed(folder, images)
    found_ND = image_features(rebuilt, judge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank deficient: equal numbers are compared
        distances = {
            "fd_128": frechet(real_ND, found_ND[:PAINTED]),
            "fd": frechet(real_ND, found_ND),
        }
    pixels_NCHW, rebuilt_NCHW = to_uint8(images), to_uint8(rebuilt)
    means = {
        "psnr": float(psnr(rebuilt_NCHW, pixels_NCHW).mean()),
        "ssim": float(ssim(rebuilt_NCHW, pixels_NCHW).mean()),
    }
    return {k: round(v, 4) for k, v in {**distances, **means}.items()}


def plot(curves: dict) -> None:
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False)
    for axis, (pack, found) in zip(axes[0], curves.items(), strict=True):
        for name, points in found.items():
            if isinstance(points, list):
                x = [p["step"] for p in points]
                label = f"{name} (discriminator in the second half)" if name == "gan" else name
                axis.plot(x, [p["fd_128"] for p in points], marker="o", ms=3, label=label)
        third = min(PAINTERS[pack]) / 3
        axis.axhline(third, color="black", lw=1, ls="--", label="a third of the better painter")
        axis.axhline(
            found["before"]["fd_128"], color="grey", lw=1, ls=":", label="tokenizer before"
        )
        floor = found["fd_128 of the images themselves"]
        axis.axhline(floor, color="grey", lw=1, label="128 of the images themselves")
        axis.set(title=pack, xlabel="steps of 16 images", yscale="log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.set_ylabel("fd@scenes-judge, 128 to all test images")
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
