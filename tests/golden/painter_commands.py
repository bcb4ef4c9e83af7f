"""One small round of the real commands, for the test of any family that paints."""

from pathlib import Path

from arra.cli import main


def run(*arguments: object) -> None:
    """One `arra` command, which must succeed."""
    code = main([str(argument) for argument in arguments])
    assert code == 0, f"arra {' '.join(map(str, arguments))} exited with {code}"


def adapt(published: Path, folder: Path, size: int, *options: object, steps: int = 20) -> Path:
    """Prepares a few images with a published checkpoint's own tokenizer, trains it on them with
    alignment, and returns the exported folder (`folder / "export"`; the run is `folder / "run"`).
    """
    data, run_folder, export = folder / "data", folder / "run", folder / "export"
    run(
        *("prepare", "builtin:scenes", "--limit", 3, "--size", size, "--out", data),
        *("--image-tokenizer", published, "--encoder", "builtin:scenes-clip"),
    )
    run(
        *("train", "adapt", "--data", data, "--out", run_folder, "--model", published),
        *("--steps", steps, "--batch-size", 1, "--align.layer", 2, "--device", "cpu"),
        *("--dtype", "float32", "--optim.lr", 1e-3, *options),
    )
    run("export", run_folder, "--out", export)
    return export
