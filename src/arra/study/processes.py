"""Several commands at a time, each in a process of its own with its own number of threads."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POLL = 0.2  # seconds between looks at the processes
GRACE = 10.0  # seconds that a process gets to end before it is killed


@dataclass(frozen=True)
class Job:
    """One command. `progress` is one short phrase about how far it is, asked now and then."""

    name: str
    argv: tuple[str, ...]
    log: Path  # what it prints, errors too
    progress: Callable[[], str]


def run_jobs(
    jobs: Sequence[Job],
    *,
    parallel: int,
    threads: int,
    say: Callable[[str], None],
    every: float = 15.0,
) -> None:
    """Runs all jobs, at most `parallel` at a time, in order; says their progress now and then.

    When one fails the others are ended too (all of them can be resumed) and ValueError names the
    job, its last words and its log. The same happens when this process is interrupted.
    """
    waiting = list(jobs)
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    last_said = time.monotonic()
    with _stoppable(), _ending(running):
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                running[job.name] = (job, _start(job, threads))
            time.sleep(POLL)
            for name, (job, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code != 0:
                    raise ValueError(
                        f"{job.name} failed (exit code {code}): {_last_words(job.log)}. All that "
                        f"it printed is in {job.log}; the same command goes on where it was."
                    )
            if running and time.monotonic() - last_said >= every:
                last_said = time.monotonic()
                say("   " + "   ".join(f"{j.name}: {j.progress()}" for j, _ in running.values()))


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs `module` with this interpreter."""
    return (sys.executable, "-m", module, *arguments)


def environment(threads: int) -> Mapping[str, str]:
    """This process's environment with the number of threads set for every library that asks."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def _start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            job.argv,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment(threads)),
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end this process like an error, so that its jobs are ended too.

    An orphaned training process would go on writing to a run that the next command resumes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ending(running: Mapping[str, tuple[Job, subprocess.Popen[bytes]]]) -> Iterator[None]:
    """On the way out, by whatever way, ends what still runs."""
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    spoken = [line.strip() for line in lines if line.strip()]
    return spoken[-1].removeprefix("arra: ").rstrip(".") if spoken else "it printed nothing"
