"""From answers to results.json and report.html."""

import json
import math
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from arra.data.images import to_pil
from arra.data.shards import Dataset, open_dataset
from arra.evaluate.paired import over_seeds
from arra.evaluate.report import versions
from arra.files import atomic_dir, read_json, write_json
from arra.image_tokenizers import load_image_tokenizer
from arra.models.run_folder import step_name, stored_tensors, weights_folder
from arra.study.arms import Arm, checkpoint_steps
from arra.study.measuring import (
    Answers,
    Judge,
    compare,
    compare_losses,
    examine,
    note,
    summary,
)
from arra.study.questions import VALIDATION, Asked, of_scenes, painted
from arra.study.report import Film, Sample, write_report
from arra.study.results import ARMS, FORMAT_VERSION, in_order

SHOWN = 24  # pairs of pictures on the page
FILMS = 4  # prompts that are shown as training goes on
DECODED_AT_ONCE = 64


class Writer:
    """Measures the answers of a study and writes what was found."""

    def __init__(
        self, asked: Asked, data_label: str | None = None, depth: dict[str, Any] | None = None
    ) -> None:
        self.asked, self.config, self.depth = asked, asked.config, depth
        self.out = Path(asked.config.out)
        self.scenes = of_scenes(asked.manifest)
        self.data_label = data_label or Path(str(asked.manifest.source["name"])).name
        self.file = self.out / "results.json"

    @property
    def measured(self) -> bool:
        return self.file.exists()

    def pair(self, seed: int) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.asked.arms if arm.seed == seed}

    # ---- measuring ------------------------------------------------------------------------------

    def measure(self) -> None:
        """Writes results.json."""
        judges = {group: self.asked.judge(group) for group in self.asked.prompts}
        pairs = [self._measure_pair(seed, judges) for seed in self.config.seeds]
        samples = pairs[0].pop("samples")
        for pair in pairs[1:]:
            del pair["samples"]
        write_json(
            self.file,
            {
                "format_version": FORMAT_VERSION,
                "kind": "scenes" if self.scenes else "images",
                "title": self.config.title or f"{self.data_label}: with and without alignment",
                "data": {"label": self.data_label},
                "guidance_chosen": len(self.config.guidances) > 1,
                "groups": self._groups(),
                "pairs": pairs,
                "over_seeds": _over_seeds(pairs) if len(pairs) > 1 else None,
                "ceiling": {group: self._ceiling(group, judges[group]) for group in judges},
                "reasons": {
                    f"{group}: {name}": reason
                    for group, judge in judges.items()
                    for name, reason in judge.caution(len(self.asked.prompts[group])).items()
                },
                "samples": samples,
                "depth": self.depth,
                "run": {"facts": self._facts(judges), "commands": self._commands()},
            },
        )

    def _measure_pair(self, seed: int, judges: dict[str, Judge]) -> dict[str, Any]:
        pair = self.pair(seed)
        metrics: dict[str, dict[str, Any]] = {name: {} for name in ARMS}
        differences: dict[str, Any] = {}
        found: dict[str, dict[str, Answers]] = {}
        for group, judge in judges.items():
            found[group] = {
                name: examine(judge, *painted(arm.painted / group)) for name, arm in pair.items()
            }
            both, differences[group] = compare(judge, *(found[group][name] for name in ARMS))
            for name in ARMS:
                metrics[name][group] = both[name]
        losses = [read_json(pair[name].painted / "losses.json") for name in ARMS]
        both, differences[VALIDATION_LOSS] = compare_losses(*losses)
        for name in ARMS:
            metrics[name][VALIDATION_LOSS] = both[name]
        main, judge = found[self.config.split], judges[self.config.split]
        return {
            "seed": seed,
            "arms": {
                name: self._arm(arm, judge, main[name], metrics[name]) for name, arm in pair.items()
            },
            "differences": differences,
            "samples": [
                {"prompt": prompt, **{name: note(main[name].verdicts, i) for name in ARMS}}
                for i, prompt in enumerate(self.asked.prompts[self.config.split].texts[:SHOWN])
            ],
        }

    def _arm(
        self, arm: Arm, judge: Judge, final: Answers, metrics: dict[str, Any]
    ) -> dict[str, Any]:
        points = []
        steps = checkpoint_steps(self.config, arm.config)
        for step in steps:
            if step == steps[-1]:  # the same prompts as at the other points
                answers = final.first(len(self.asked.point_prompts()))
            else:
                answers = examine(judge, *painted(arm.painted / step_name(step)))
            points.append(
                {
                    "step": step,
                    "images_seen": step * arm.config.batch_size,
                    "metrics": _told_over_time(summary(judge, answers)),
                }
            )
        return {
            "log": arm.log_lines(),
            "points": points,
            "metrics": metrics,
            "guidance": self.asked.guidance(arm.name),
            "batch_size": arm.config.batch_size,
            "seconds": _seconds(arm),
            "command": "arra " + " ".join(arm.argv),
            "config": read_json(arm.run / "config.json"),
        }

    def _ceiling(self, group: str, judge: Judge) -> dict[str, float]:
        """What the image tokenizer's reconstructions of the real images score."""
        folder = self._reconstructed(group)
        answers = examine(judge, *painted(folder))
        return {name: value["mean"] for name, value in summary(judge, answers).items()}

    def _reconstructed(self, group: str) -> Path:
        """A folder with the real images of the group's prompts, as their codes keep them."""
        folder = self.out / "painted" / f"real-{group}"
        if folder.exists():
            return folder
        dataset = open_dataset(self.asked.data, self.asked.split_of(group), features=())
        chosen = self.asked.prompts[group].rows
        spec = self.asked.manifest.tokenizer.spec
        tokenizer = load_image_tokenizer(spec, device=self.config.device_name)
        with atomic_dir(folder) as temporary:
            lines: list[str] = []
            for part in _of_one_grid(dataset, chosen):
                images = to_pil(tokenizer.decode(_codes(dataset, part, self.config.device_name)))
                for row, image in zip(part, images, strict=True):
                    name = f"{len(lines):05d}.png"
                    image.save(temporary / name)
                    lines.append(json.dumps({"file": name, "prompt": dataset.texts[row]}) + "\n")
            (temporary / "images.jsonl").write_text("".join(lines), encoding="utf-8")
        return folder

    # ---- what is said of the run ----------------------------------------------------------------

    def _groups(self) -> dict[str, str]:
        """How each group of measures is called."""
        groups = {}
        for group, chosen in self.asked.prompts.items():
            what = " with combinations never trained on" if group == "compositional" else ""
            split, known = self.asked.split_of(group), self.asked.share_known(group)
            kind = "captions" if known else "unseen captions"
            note = f"; {known:.0%} of them also in training" if known else ""
            groups[group] = f"{len(chosen)} {kind}{what} ({split}{note})"
        count = min(self.config.validation_images, self.asked.manifest.splits[VALIDATION].rows)
        groups[VALIDATION_LOSS] = f"{count} validation images"
        return groups

    def _facts(self, judges: dict[str, Judge]) -> dict[str, str]:
        pair = self.pair(self.config.seeds[0])
        train, run = pair["aligned"].config, pair["aligned"].run
        card, resolved = read_json(run / "run_card.json"), read_json(run / "config.json")
        manifest, judge = self.asked.manifest, judges[self.config.split]
        teachers = train.align.targets or tuple(manifest.aligned())
        described = {
            name: f"{info.spec}@{info.pooling} ({info.encoder[:12]})"
            for name, info in manifest.aligned().items()
        }
        judged = judge.encoder
        guidance = {name: self.asked.guidance(name) for name in ARMS}
        rows = {name: info.rows for name, info in manifest.splits.items()}
        return {
            "data": f"{manifest.source['name']}, {manifest.size} pixels, rows: {_counts(rows)}",
            "image tokenizer": f"{manifest.tokenizer.spec} ({manifest.tokenizer.fingerprint[:12]}),"
            f" {manifest.tokenizer.codebook_size} codes",
            "model": _model(pair["aligned"]),
            "aligned to": ", ".join(described[name] for name in teachers),
            "alignment": f"weight {train.align.weight:g} at layer "
            f"{', '.join(map(str, train.align.layer))}, {train.align.positions} positions, "
            f"{'centred' if train.align.centred else 'raw'} features",
            "judged by": f"{judged.spec}@{judged.pooling} ({judged.fingerprint[:12]})"
            if judged
            else "",
            "training": f"recipe {train.recipe}, {train.steps} steps of {train.batch_size} images, "
            f"learning rate {train.optim.lr:g}, {resolved['dtype']}, seed"
            f"{'s' if len(self.config.seeds) > 1 else ''} "
            f"{', '.join(map(str, self.config.seeds))}",
            "guidance": f"plain {guidance['plain']:g}, ARRA {guidance['aligned']:g}, each the best "
            f"of {', '.join(f'{g:g}' for g in self.config.guidances)} on "
            f"{len(self.asked.for_guidance)} validation captions"
            if len(self.config.guidances) > 1
            else f"{self.config.guidances[0]:g}",
            "commit": card["commit"] or "unknown (not run from a checkout)",
            "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
            "hardware": _hardware(card["hardware"]),
            "seconds of training": ", ".join(
                f"{name} {_seconds(arm):.0f}" for name, arm in pair.items()
            ),
        }

    def _commands(self) -> list[str]:
        return ["arra " + " ".join(arm.argv) for arm in self.asked.arms]

    # ---- the report -----------------------------------------------------------------------------

    def report(self, seconds: dict[str, float]) -> Path:
        """Writes report.html from results.json and the painted folders."""
        results = read_json(self.file)
        results["run"]["stages"] = seconds
        if self.depth is not None:
            results["depth"] = self.depth
        if self.config.title:
            results["title"] = self.config.title
        pair = self.pair(self.config.seeds[0])
        return write_report(
            self.out / "report.html", results, self._samples(results, pair), self._films(pair)
        )

    def _samples(self, results: dict[str, Any], pair: dict[str, Arm]) -> list[Sample]:
        split = self.config.split
        plain, aligned = (painted(pair[name].painted / split)[0] for name in ARMS)
        real: list[Image.Image | None] = [None] * len(results["samples"])
        if not self.scenes:  # a scene's caption says what to see; other captions need the picture
            real = list(painted(self._reconstructed(split))[0])
        return [
            Sample(said["prompt"], plain[i], aligned[i], real[i], said["plain"], said["aligned"])
            for i, said in enumerate(results["samples"])
        ]

    def _films(self, pair: dict[str, Arm]) -> list[Film]:
        steps = checkpoint_steps(self.config, pair["plain"].config)
        if len(steps) < 2:
            return []
        frames: dict[str, list[list[Image.Image]]] = {}
        for name, arm in pair.items():
            folders = [arm.painted / step_name(step) for step in steps[:-1]]
            folders.append(arm.painted / self.config.split)
            frames[name] = [painted(folder)[0][:FILMS] for folder in folders]
        seen = tuple(step * pair["plain"].config.batch_size for step in steps)
        prompts = self.asked.point_prompts()[:FILMS]
        return [
            Film(prompt, seen, *(tuple(frame[i] for frame in frames[name]) for name in ARMS))
            for i, prompt in enumerate(prompts)
        ]


VALIDATION_LOSS = f"{VALIDATION} loss"
"""The group of measures that needs no pictures."""


def _told_over_time(metrics: dict[str, Any]) -> dict[str, Any]:
    """Few curves say more than many: all right, colour, fragments and the distances."""
    wanted = ("all_right", "colour", "fragments")
    return {name: metrics[name] for name in in_order(metrics) if name in wanted or "@" in name}


def _of_one_grid(dataset: Dataset, rows: list[int]) -> Iterator[list[int]]:
    """Neighbouring rows that share one grid, at most DECODED_AT_ONCE."""
    for _, same in groupby(rows, key=lambda row: tuple(dataset.grids[row])):
        while part := list(islice(same, DECODED_AT_ONCE)):
            yield part


def _codes(dataset: Dataset, rows: list[int], device: str) -> torch.Tensor:
    """Codes (n, h, w) of rows that share one grid."""
    height, width = (int(side) for side in dataset.grids[rows[0]])
    codes = np.stack([dataset.image_ids[row] for row in rows]).astype(np.int64)
    return torch.from_numpy(codes).view(len(rows), height, width).to(device)


def _seconds(arm: Arm) -> float:
    return read_json(arm.run / "run_card.json")["progress"]["seconds"]


def _hardware(known: dict[str, Any]) -> str:
    threads = known["threads"]
    return (
        f"{known['accelerator'] or known['processor'] or 'unknown processor'}, {threads} "
        f"thread{'s' if threads > 1 else ''} for each arm, {known['system']}"
    )


def _model(arm: Arm) -> str:
    """Where the model came from and how large it is, by its last checkpoint."""
    checkpoint = arm.run / "checkpoints" / step_name(arm.config.steps)
    stored = stored_tensors(weights_folder(checkpoint))
    size = sum(math.prod(tensor.size) for tensor in stored.values())
    model = arm.config.model
    origin = arm.config.model_path or (
        f"{model.layers} blocks of width {model.hidden_size}, from random weights"
    )
    return f"{origin}, {size / 1e6:.3g} M parameters"


def _counts(rows: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in rows.items())


def _over_seeds(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences of whole runs, for every measure that each pair has."""
    found: dict[str, Any] = {}
    for group, differences in pairs[0]["differences"].items():
        found[group] = {}
        for name in differences:
            if all(name in pair["differences"][group] for pair in pairs):
                plain, aligned = (
                    [pair["arms"][arm]["metrics"][group][name]["mean"] for pair in pairs]
                    for arm in ARMS
                )
                found[group][name] = over_seeds(plain, aligned)
    return found
