"""GenEval's and DPG-Bench's prompt sets: painted folders arranged as their scorers read them, and
what the scorers wrote read back.

Both formats are described by the scorers' own code: github.com/djghosh13/geneval (evaluation/
evaluate_images.py, summary_scores.py) and github.com/TencentQQGYLab/ELLA (dpg_bench/
compute_dpg_bench.py). A DPG-Bench prompt is a file ITEM.txt, its pictures are one ITEM.png, and the
scorer leaves out a picture that it fails on without saying so in its mean: reading back counts.

Legend: P prompts, R bootstrap resamples.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from arra.data.images import load_rgb
from arra.data.source_tables import bad_path
from arra.evaluate.finding import Finding
from arra.files import atomic_dir, write_json
from arra.generate.pictures import LISTING, prompt_files

RESAMPLES = 2000
GRID = 2  # DPG-Bench's pictures per side of a grid


@dataclass(frozen=True)
class ArrangeConfig:
    """Arrange what `arra generate` painted as the official scorer of a prompt set reads it."""

    benchmark: Annotated[Literal["geneval", "dpg"], tyro.conf.Positional]
    """geneval or dpg."""
    painted: Annotated[str, tyro.conf.Positional]
    """Folder that `arra generate --prompts` wrote."""
    prompts: str
    """The prompt set: GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of ITEM.txt."""
    out: str
    """Folder to write; it must not exist."""


@dataclass(frozen=True)
class ScoredConfig:
    """Read what the official scorer of a prompt set wrote, with intervals over prompts."""

    benchmark: Annotated[Literal["geneval", "dpg"], tyro.conf.Positional]
    """geneval or dpg."""
    results: Annotated[str, tyro.conf.Positional]
    """GenEval's results.jsonl, or DPG-Bench's ..._results.txt."""
    prompts: str | None = None
    """The prompt set; given, prompts that were not scored are an error."""
    out: str | None = None
    """Write the scores to this JSON file."""


# ---- before scoring ------------------------------------------------------------------------------


def read_geneval(file: Path) -> list[dict[str, Any]]:
    """The prompts of an evaluation_metadata.jsonl: tag, include, prompt and more, one a line."""
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        entry = _object(line)
        if not all(isinstance(entry.get(name), str) for name in ("tag", "prompt")):
            raise ValueError(
                f"{file} line {number} is no JSON object with a tag and a prompt: give GenEval's "
                f"evaluation_metadata.jsonl"
            )
        entries.append(entry)
    if not entries:
        raise ValueError(f"{file} holds no prompts: give GenEval's evaluation_metadata.jsonl")
    return entries


def arrange(config: ArrangeConfig) -> str:
    """Writes `config.out`; returns what to run next."""
    painted, out = Path(config.painted), Path(config.out)
    if config.benchmark == "geneval":
        return arrange_geneval(painted, Path(config.prompts), out)
    return arrange_dpg(painted, Path(config.prompts), out)


def arrange_geneval(painted: Path, prompts: Path, out: Path) -> str:
    """OUT/00000/metadata.jsonl and OUT/00000/samples/00000.png, ... for every prompt.

    Raises:
        ValueError: the folder does not hold the same number of pictures of each of these prompts.
        FileExistsError: `out` is there.
    """
    entries = read_geneval(prompts)
    pictures = _by_prompt(painted, [entry["prompt"] for entry in entries], prompts)
    with atomic_dir(out) as folder:
        for number, (entry, files) in enumerate(zip(entries, pictures, strict=True)):
            samples = folder / f"{number:05d}" / "samples"
            samples.mkdir(parents=True)
            text = json.dumps(entry, ensure_ascii=False)
            (samples.parent / "metadata.jsonl").write_text(text, encoding="utf-8")
            for image, file in enumerate(files):
                shutil.copyfile(file, samples / f"{image:05d}.png")
    return (
        f"{out}: {len(entries)} prompts, {len(pictures[0])} pictures each; score them with "
        f"evaluate_images.py {out} --outfile results.jsonl --model-path DETECTOR"
    )


def arrange_dpg(painted: Path, prompts: Path, out: Path) -> str:
    """OUT/ITEM.png for every ITEM.txt: the pictures of a prompt in a grid of two by two.

    A single picture a prompt stands alone. Nothing else is written there, as the scorer takes every
    file for a picture.

    Raises:
        ValueError: as of `arrange_geneval`, or more than four pictures a prompt, or pictures that
            are not square or not of one size, which the scorer's crops would cut.
        FileExistsError: `out` is there.
    """
    items = prompt_files(prompts)
    for item in items:
        if "." in item:
            raise ValueError(f"{item}.txt: the scorer cuts names at the first dot, rename it")
    pictures = _by_prompt(painted, list(items.values()), prompts)
    num = len(pictures[0])
    if num > GRID * GRID:
        raise ValueError(f"{painted} has {num} pictures a prompt, the scorer reads at most 4")
    side: int | None = None
    with atomic_dir(out) as folder:
        for item, files in zip(items, pictures, strict=True):
            images = [load_rgb(file) for file in files]
            side = images[0].width if side is None else side
            for file, image in zip(files, images, strict=True):
                if image.size != (side, side):
                    raise ValueError(
                        f"{file} has {image.width}x{image.height} pixels; the scorer cuts squares "
                        f"of one size ({side}x{side} here): paint all of them at one square size"
                    )
            _grid(images).save(folder / f"{item}.png")
    return (
        f"{out}: {len(items)} prompts, {num} pictures each; score them with "
        f"PIC_NUM={num} bash dpg_bench/dist_eval.sh {out} {side}"
    )


def _grid(images: Sequence[Image.Image]) -> Image.Image:
    """Left to right, then down, with no gap; one image stays as it is."""
    if len(images) == 1:
        return images[0]
    side = images[0].width
    sheet = Image.new("RGB", (GRID * side, GRID * side))
    for number, image in enumerate(images):
        sheet.paste(image, (number % GRID * side, number // GRID * side))
    return sheet


def _by_prompt(painted: Path, prompts: Sequence[str], where: Path) -> list[list[Path]]:
    """The picture files of each prompt, in the order that `arra generate` lists them."""
    listing = painted / LISTING
    if not listing.is_file():
        raise ValueError(
            f"{painted} has no {LISTING}, which `arra generate` writes when all is painted: "
            f"run it with --prompts {where}"
        )
    rows = [_object(line) for line in listing.read_text(encoding="utf-8").split("\n") if line]
    num, odd = divmod(len(rows), len(prompts))
    if num == 0 or odd:
        raise ValueError(
            f"{painted} holds {len(rows)} pictures, which is no multiple of the {len(prompts)} "
            f"prompts of {where}: paint it with --prompts {where}"
        )
    for number, row in enumerate(rows):
        if row.get("prompt") != prompts[number // num]:
            raise ValueError(
                f"picture {number} of {painted} shows {row.get('prompt')!r}, prompt "
                f"{number // num} of {where} is {prompts[number // num]!r}: paint it with "
                f"--prompts {where}"
            )
    for number, row in enumerate(rows):
        wrong = bad_path(row.get("file"))
        if wrong is not None:
            raise ValueError(f"picture {number} of {painted} cannot be used: {wrong}")
    files = [painted / row["file"] for row in rows]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise ValueError(f"{missing} is listed but not there: run `arra generate` again")
    return [files[start : start + num] for start in range(0, len(files), num)]


# ---- after scoring -------------------------------------------------------------------------------


def read_scored(config: ScoredConfig) -> dict[str, Finding]:
    """The scores of a results file, by name, the overall one first; written to `config.out`."""
    results = Path(config.results)
    if not results.is_file():
        raise ValueError(f"{results}: there is no such file")
    prompts = None if config.prompts is None else Path(config.prompts)
    read = geneval_scores if config.benchmark == "geneval" else dpg_scores
    found = read(results, prompts)
    if config.out is not None:
        values = {name: _json(finding) for name, finding in found.items()}
        write_json(config.out, {"benchmark": config.benchmark, "scores": values})
    return found


def told(found: Mapping[str, Finding]) -> str:
    """One line a score."""
    lines = []
    for name, finding in found.items():
        interval = "" if finding.low is None else f"  ({finding.low:.4f} to {finding.high:.4f})"
        note = "" if finding.reason is None else f"  {finding.reason}"
        lines.append(f"{name:<28} {finding.value:.5f}{interval}  n {finding.n}{note}")
    return "\n".join(lines)


def geneval_scores(results: Path, prompts: Path | None = None) -> dict[str, Finding]:
    """{"geneval": mean over tags of the share of correct images, "geneval/TAG": of one tag, ...}

    As evaluation/summary_scores.py computes them, which weighs tags equally, whatever their number
    of images. Intervals are of a bootstrap over prompts within each tag, as pictures of one prompt
    are right or wrong together.

    Raises:
        ValueError: a line is none of the scorer's; with `prompts`: some were not scored.
    """
    answers: dict[str, dict[str, list[float]]] = {}  # by tag, by the prompt's metadata
    for number, line in enumerate(results.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        row = _object(line)
        tag, metadata, correct = (row.get(name) for name in ("tag", "metadata", "correct"))
        if not (isinstance(tag, str) and isinstance(metadata, str) and correct in (True, False)):
            raise ValueError(
                f"{results} line {number} has no tag, metadata and correct: give the results.jsonl "
                f"of GenEval's evaluate_images.py"
            )
        answers.setdefault(tag, {}).setdefault(metadata, []).append(float(correct))
    if not answers:
        raise ValueError(f"{results} holds no scored image: run GenEval's evaluate_images.py again")
    if prompts is not None:
        scored = {_object(metadata).get("prompt") for each in answers.values() for metadata in each}
        _refuse_unscored([entry["prompt"] for entry in read_geneval(prompts)], scored, results)
    by_tag = {tag: _clustered(list(each.values())) for tag, each in answers.items()}
    values = [float(finding.value or 0.0) for finding, _ in by_tag.values()]
    resampled_R = np.mean([means_R for _, means_R in by_tag.values()], axis=0)
    images = sum(finding.n for finding, _ in by_tag.values())
    overall = _finding(float(np.mean(values)), images, resampled_R)
    return {"geneval": overall} | {f"geneval/{tag}": f for tag, (f, _) in by_tag.items()}


_ITEM = re.compile(r"(?P<path>.+\.png)(?P<scores>(?:, [0-9.eE+-]+)+)")
_SUMMARY = re.compile(r"(?P<name>\t.+|DPG-Bench score): (?P<value>[0-9.eE+-]+|nan)")


def dpg_scores(results: Path, prompts: Path | None = None) -> dict[str, Finding]:
    """{"dpg": the mean over items in percent, "dpg/CATEGORY": as the scorer printed it, ...}

    The score is computed from the item lines, with a bootstrap over items, and must agree with the
    one at the file's end. Categories have no interval: the file has no answers by item, and the
    scorer computes them from the last picture of each prompt alone.

    Raises:
        ValueError: no item is there, the file's own score is another, or, with `prompts`, items
            were not scored.
    """
    means: dict[str, float] = {}
    printed: dict[str, float] = {}
    for line in results.read_text(encoding="utf-8").split("\n"):
        item, summary = _ITEM.fullmatch(line.strip()), _SUMMARY.fullmatch(line.rstrip())
        if item is not None:
            means[Path(item["path"]).name.split(".")[0]] = float(item["scores"].split(", ")[-1])
        elif summary is not None:
            printed[summary["name"].strip()] = float(summary["value"])
    if not means:
        raise ValueError(
            f"{results} has no scored item: give the ..._results.txt of DPG-Bench's "
            f"compute_dpg_bench.py (not its ..._detail.txt)"
        )
    if prompts is not None:
        _refuse_unscored(list(prompt_files(prompts)), set(means), results)
    finding, _ = _clustered([[100 * mean] for mean in means.values()])
    total = printed.pop("DPG-Bench score", None)
    if total is None:
        raise ValueError(f"{results} has no score at its end: the scorer was stopped, run it again")
    if abs(total - float(finding.value or 0.0)) > 1e-6 * max(total, 1.0):
        raise ValueError(
            f"{results} says {total}, its {len(means)} items give {finding.value}: it holds lines "
            f"of several runs"
        )
    reason = "as the scorer printed it, from the last picture of each prompt"
    return {"dpg": finding} | {
        f"dpg/{name}": Finding(value, len(means), reason=reason) for name, value in printed.items()
    }


def _refuse_unscored(wanted: Sequence[str], scored: set[Any], results: Path) -> None:
    left = [name for name in wanted if name not in scored]
    if left:
        raise ValueError(
            f"{len(left)} of {len(wanted)} prompts are not scored in {results} (first: "
            f"{left[0]!r}): a mean over fewer would be a different measurement; score them too"
        )


def _clustered(answers: Sequence[Sequence[float]]) -> tuple[Finding, np.ndarray]:
    """(mean over all answers, its resampled values (R,)), drawing whole prompts."""
    sum_P = np.array([sum(each) for each in answers])
    count_P = np.array([len(each) for each in answers])
    prompts = len(answers)
    generator = np.random.default_rng(0)
    drawn_RP = generator.integers(0, prompts, (RESAMPLES, prompts))
    resampled_R = sum_P[drawn_RP].sum(1) / count_P[drawn_RP].sum(1)
    return _finding(
        float(sum_P.sum() / count_P.sum()), int(count_P.sum()), resampled_R
    ), resampled_R


def _finding(value: float, n: int, resampled_R: np.ndarray) -> Finding:
    low, high = (float(limit) for limit in np.quantile(resampled_R, [0.025, 0.975]))
    return Finding(value, n, low, high, "bootstrap over prompts")


def _json(finding: Finding) -> dict[str, Any]:
    named = ("value", "n", "low", "high", "method", "reason")
    return {name: getattr(finding, name) for name in named}


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
