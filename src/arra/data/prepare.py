"""`arra prepare`: images and captions, once, to shards of codes and features.

Training then needs neither the images nor an encoder. One crop feeds the image tokenizer and every
encoder. The work can be stopped at any time: finished shards stay, the same command goes on.

The way of one image: source -> decode.py (pixels) -> encode.py (codes, features) -> shards.py.
job.py knows what is to be made and what is finished; an engine makes it.
"""

import errno
from pathlib import Path

from arra.data.engine_local import make_units
from arra.data.job import PROGRESS, Job, open_job
from arra.data.prepare_config import PrepareConfig
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
    job = open_job(config, image_tokenizer)
    _clear(job)
    waiting = job.waiting()
    try:
        make_units(job, waiting)
        if waiting or not job.is_complete():
            job.complete()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        done = len(job.units) - len(job.waiting())
        raise OSError(
            errno.ENOSPC,
            f"no space left on the disk: {done} of {len(job.units)} shards are finished and kept, "
            f"free some space and run the same command again",
            str(config.out),
        ) from None
    return config.out


def _clear(job: Job) -> None:
    """Removes what a killed run had not yet renamed into place."""
    for leftover in [*job.out.glob(".*.partial"), *job.out.glob(f"{PROGRESS}/.*.partial")]:
        leftover.unlink(missing_ok=True)
