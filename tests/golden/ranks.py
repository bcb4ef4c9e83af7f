"""Runs a function, or an `arra` command, in several processes that form one gloo group.

    losses = in_ranks(2, train_a_bit, folder)        # [what rank 0 returned, what rank 1 returned]
    done = torchrun(2, ["train", "scenes", ...])     # a subprocess.CompletedProcess

The processes of `in_ranks` are forks: nothing is imported again, so two ranks cost milliseconds.
The function finds the environment of torchrun (RANK, WORLD_SIZE, ...) and joins the group itself,
by `open_world("cpu")` or by what it calls. It may be a closure; what it returns travels by a pipe
(by plain pickle: tensors by value, not as torch's shared memory, which would die with the rank).
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TextIO, TypeVar

Result = TypeVar("Result")


class RankFailed(AssertionError):
    """A rank raised, died or did not return in time; its message has the rank's traceback."""


def in_ranks(
    count: int, act: Callable[..., Result], *arguments: Any, timeout: float = 60.0
) -> list[Result]:
    """What `act(*arguments)` returns on each of `count` ranks.

    All ranks are killed as soon as one of them fails, or after `timeout` seconds; shortly before
    that a rank writes down where each of its threads stands, for the error's message.
    """
    fork = multiprocessing.get_context("fork")
    port = free_port()
    pipes, ranks = [], []
    with tempfile.TemporaryFile("w+") as late:
        for rank in range(count):
            ours, theirs = fork.Pipe(duplex=False)
            place = (rank, count, port)
            last_words = (0.95 * timeout, late)
            child = (place, theirs, last_words, act, arguments)
            process = fork.Process(target=_child, args=child, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            ranks.append(process)
        try:
            return _results(pipes, time.monotonic() + timeout)
        except RankFailed as failed:
            late.seek(0)
            raise RankFailed(f"{failed}\n{late.read()}") from None
        finally:
            for process in ranks:
                process.kill()
                process.join()


def torchrun(
    count: int, arguments: Sequence[str], timeout: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`arra ARGUMENTS` under torchrun on this machine; output as text, the exit code unchecked."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    launcher += ["--master-port", str(free_port()), "-m", "arra.cli"]
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    place: tuple[int, int, int],
    pipe: Connection,
    last_words: tuple[float, TextIO],
    act: Callable[..., Any],
    arguments: Any,
) -> None:
    rank, count, port = place
    faulthandler.dump_traceback_later(last_words[0], file=last_words[1])
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        pipe.send_bytes(pickle.dumps((True, act(*arguments))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        sys.stdout.flush()
        os._exit(0)  # past whatever the test session would do at its exit


def _results(pipes: Sequence[Connection], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(set(range(len(pipes))) - set(found))
            raise RankFailed(f"ranks {late} did not return in time")
        failed = []
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                good, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                good, value = False, "it died without a word"
            found[rank] = value
            failed += [] if good else [f"rank {rank}:\n{value}"]
        if failed:
            raise RankFailed("\n".join(failed))
    return [found[rank] for rank in range(len(pipes))]
