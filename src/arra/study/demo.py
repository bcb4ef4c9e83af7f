"""`arra demo`: drawn scenes, two painters, a report; sized for a laptop's two cores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arra.export import ExportConfig, export
from arra.files import read_json, write_json
from arra.models.loading import PIPELINE
from arra.resolve import BUNDLED
from arra.study.arms import StudyConfig, run_study
from arra.study.results import ARMS

DEPTH = BUNDLED / "scenes-depth.json"
"""What other alignment layers gave in experiments/demo, in the form of results.py's `depth`."""

GUIDANCES = (1.0, 1.5, 2.0, 3.0)
"""Scales that each arm chooses from; at 5 both arms' pictures fell apart (experiments/demo)."""


@dataclass(frozen=True)
class DemoConfig:
    """Draw scenes, train a plain and an aligned painter, paint, measure, write a report."""

    out: str = "runs/demo"
    """Folder for everything; the same command again goes on where it was."""
    steps: int = 800
    """Optimizer steps of each arm, 32 images each."""
    train_images: int = 16_000
    """Scenes that are drawn for training."""
    prompts: int = 512
    """Test captions that both arms paint; half as many that no training image has, and half as many
    of combinations never trained on."""
    seed: int = 0
    """Of weights and order, the same for both arms."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """More options of `arra train` for both arms as NAME=VALUE, such as align.layer=1."""
    threads: int = 1
    """CPU threads of each of the two processes."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""


def run_demo(config: DemoConfig) -> Path:
    """Runs what is not finished; returns the path of report.html."""
    study = StudyConfig(
        data="builtin:scenes",
        out=config.out,
        recipe="scenes",
        settings=(f"steps={config.steps}", *config.settings),
        image_tokenizer="builtin:scenes",
        encoder=("clip=builtin:scenes-clip",),
        size=64,
        limit=config.train_images,
        judge="builtin:scenes-judge",
        distances=("fd",),
        seeds=(config.seed,),
        split="test",
        prompts=config.prompts,
        unseen=config.prompts // 2,
        guidances=GUIDANCES,
        more_splits=("compositional",),
        threads=config.threads,
        device=config.device,
        title="Does looking at the whole picture help a small painter?",
    )
    depth = read_json(DEPTH) if DEPTH.is_file() else None
    report = run_study(study, data_label="captioned scenes of coloured shapes", depth=depth)
    _export(Path(config.out))
    return report


def _export(out: Path) -> None:
    """Both painters as ordinary checkpoints, with their own best guidance as the default."""
    guidance = read_json(out / "guidance.json")
    for arm in ARMS:
        folder = out / arm / "export"
        if folder.exists():
            continue
        export(ExportConfig(run=str(out / arm), out=str(folder)))
        pipeline = read_json(folder / PIPELINE)
        pipeline["sampling"]["cfg"] = guidance[arm]["chosen"]
        write_json(folder / PIPELINE, pipeline)
