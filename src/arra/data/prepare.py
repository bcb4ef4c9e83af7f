"""`arra prepare`: images and captions, once, to shards of codes and features.

Training then needs neither the images nor an encoder. One crop feeds the image tokenizer and every
encoder. The work can be stopped at any time: finished shards stay, the same command goes on.

The way of one image: source -> decode.py (pixels) -> encode.py (codes, features) -> shard_file.py.
job.py knows what is to be made and what is finished; an engine makes it.
"""

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from arra.data import engine_local
from arra.data.framing import not_mirrored
from arra.data.job import PROGRESS, Job, open_job
from arra.data.manifest import read_manifest
from arra.data.plan import Unit
from arra.data.prepare_config import PrepareConfig
from arra.data.rejects import REJECTS, told
from arra.files import is_abandoned
from arra.image_tokenizers.interface import ImageTokenizer


def prepare(config: PrepareConfig, image_tokenizer: ImageTokenizer | None = None) -> Path:
    """Prepares a dataset, or goes on with one, and returns its folder.

    Args:
        config: what to do.
        image_tokenizer: used instead of loading `config.image_tokenizer`.

    Raises:
        ValueError: wrong or changed settings, nothing usable in the source.
        OSError: the disk is full; finished shards stay and the same command goes on.
    """
    if config.engine == "ray":
        from arra.data.engine_ray import RayEngine

        with RayEngine(config) as engine:
            return _go_on(engine.open(image_tokenizer), engine.make_units)
    return _go_on(open_job(config, image_tokenizer), engine_local.make_units)


def _go_on(job: Job, make_units: Callable[[Job, Sequence[Unit]], None]) -> Path:
    """Makes what is missing."""
    _clear(job)
    waiting = job.waiting()
    try:
        make_units(job, waiting)
        if waiting or not job.is_complete():
            _complete(job)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        done = len(job.units) - len(job.waiting())
        raise OSError(
            errno.ENOSPC,
            f"no space left on the disk: {done} of {len(job.units)} shards are finished and kept, "
            f"free some space and run the same command again",
            str(job.out),
        ) from None
    return job.out


def _complete(job: Job) -> None:
    """The machine that is last completes the dataset; two that are last write the same bytes."""
    left = job.left_to_others()
    if not left:
        job.complete()
        _clear(job)  # of workers that were killed while the others went on
        _tell_of_views(job)
        for line in told(job.out / REJECTS):
            print(f"prepare: {line}", file=sys.stderr)
        return
    print(
        f"prepare: this machine's shards are finished, {len(left)} of {len(job.units)} are not yet "
        f"there. Whoever is last completes the dataset, or the same command without --shard",
        file=sys.stderr,
    )


def _tell_of_views(job: Job) -> None:
    train = read_manifest(job.out).splits.get("train")
    if job.framing.views == "none" or train is None:
        return
    rows = train.rows - train.views
    left = not_mirrored(job.framing.views, rows, train.views)
    print(
        f"prepare: {train.views} views of {rows} pictures; the captions of {left} say left or "
        f"right, so these have no mirrored ones. Where sides matter without a word (X-rays, "
        f"writing), prepare without --views",
        file=sys.stderr,
    )


def _clear(job: Job) -> None:
    """Removes what a killed process had not renamed into place, but nothing of a live neighbour."""
    for leftover in [*job.out.glob(".*.partial"), *job.out.glob(f"{PROGRESS}/.*.partial")]:
        if is_abandoned(leftover):
            leftover.unlink(missing_ok=True)
