"""Distance against steps: measures every snapshot of the fits of fit_packs.sh on the test split.

    python experiments/tokenizers/curve.py runs/tokenizers/gan PACKS

Two distances, both by the bundled judge. `fd_128` is that of experiments/packs: the first 128
reconstructions to all test images, as painters were measured there with their 128 pictures. `fd`
is that of `arra tokenizer evaluate`: all reconstructions to all test images. Writes the part
`curves` of results.json, curves.png and PACK-gan.png beside this file.
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
    results["curves"] = {}
    for pack in PAINTERS:
        runs = sorted(folder for folder in fits.glob(f"{pack}-*") if folder.is_dir())
        if not runs:
            continue
        images = test_images(packs / pack)
        real_ND = image_features(images, judge)
        curves = {
            "images": len(images),
            "fd_128 of the images themselves": frechet(real_ND, real_ND[:PAINTED]),
            "before": measure(fits.parent / pack, images, real_ND, judge)[0],
        }
        rows = [images[:SHOWN], measure(fits.parent / pack, images, real_ND, judge)[1]]
        for run in runs:
            settings = read_json(run / "fit.json")
            points = []
            for snapshot in sorted((run / "snapshots").iterdir()):
                found, shown = measure(snapshot, images, real_ND, judge)
                step = int(snapshot.name.removeprefix("step-"))
                points.append({"step": step, "images_seen": step * settings["batch_size"], **found})
                print(run.name, points[-1], flush=True)
            curves[run.name.removeprefix(f"{pack}-")] = points
            rows.append(shown)
        results["curves"][pack] = curves
        pictures = [
            picture.resize((96, 96), Image.Resampling.NEAREST) for row in rows for picture in row
        ]
        grid(pictures, SHOWN).quantize(128).save(HERE / f"{pack}-gan.png", optimize=True)
    write_json(HERE / "results.json", results)
    plot(results["curves"])


def test_images(pack: Path) -> list[Image.Image]:
    source = open_source(str(pack), split="test")
    rows = [r for r in source.read(0, len(source)) if isinstance(r, Record)]
    assert len(rows) == len(source)
    return [square(load_rgb(row.image), SIZE) for row in rows]


def measure(
    folder: Path, images: list[Image.Image], real_ND: np.ndarray, judge: Encoder
) -> tuple[dict[str, float], list[Image.Image]]:
    """Its numbers, and its first reconstructions."""
    tokenizer = load_image_tokenizer(folder)
    rebuilt: list[Image.Image] = []
    sums = {"psnr": 0.0, "ssim": 0.0}
    for start in range(0, len(images), 32):
        pixels_NCHW = to_uint8(images[start : start + 32])
        rebuilt_NCHW = tokenizer.decode(tokenizer.encode(pixels_NCHW))
        sums["psnr"] += float(psnr(rebuilt_NCHW, pixels_NCHW).sum())
        sums["ssim"] += float(ssim(rebuilt_NCHW, pixels_NCHW).sum())
        rebuilt += to_pil(rebuilt_NCHW)
    found_ND = image_features(rebuilt, judge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank deficient: equal numbers are compared
        distances = {
            "fd_128": frechet(real_ND, found_ND[:PAINTED]),
            "fd": frechet(real_ND, found_ND),
        }
    means = {name: total / len(images) for name, total in sums.items()}
    return {k: round(v, 4) for k, v in {**distances, **means}.items()}, rebuilt[:SHOWN]


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
