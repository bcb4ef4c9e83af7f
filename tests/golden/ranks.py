"""Runs a function, or an `arra` command, in several processes that form one gloo group.

    losses = in_ranks(2, train_a_bit, folder)        # [what rank 0 returned, what rank 1 returned]
    done = torchrun(2, ["train", "scenes", ...])     # a subprocess.CompletedProcess

The processes of `in_ranks` are forks of a process that has only imported what they need, so two
ranks cost milliseconds. They are not forks of the test's own process: that has computed before,
with threads whose locks a fork would find as they were (a rank then hangs, or dies by a signal).
The function finds the environment of torchrun (RANK, WORLD_SIZE, ...) and joins the group itself,
by `open_world("cpu")` or by what it calls. It may be a closure: it and its arguments travel by
value, but for what a module defines, which is imported; what it returns travels by a pipe (by
plain pickle: tensors by value, not as torch's shared memory, which would die with the rank).
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
from pathlib import Path
from typing import Any, TypeVar

import dill
import torch

Result = TypeVar("Result")

_HERE = Path(__file__).resolve().parent
_ranks = multiprocessing.get_context("forkserver")
_ranks.set_forkserver_preload(  # what the ranks would otherwise each import, for seconds
    [
        "arra.cli",
        "arra.train.loop",
        "dill",
        "pandas",
        "peft",
        "peft.tuners.lora",
        "pytest",
        "torch._inductor.compile_fx",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "accelerate",
        "transformers.trainer",
        "transformers.models.auto.modeling_auto",
        "transformers.models.chameleon.modeling_chameleon",
        "transformers.models.emu3.modeling_emu3",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.janus.modeling_janus",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)


class RankFailed(AssertionError):
    """A rank raised, died or did not return in time; its message has the rank's traceback."""


def in_ranks(
    count: int, act: Callable[..., Result], *arguments: Any, timeout: float = 60.0
) -> list[Result]:
    """What `act(*arguments)` returns on each of `count` ranks.

    All ranks are killed as soon as one of them fails, or after `timeout` seconds; shortly before
    that a rank writes down where each of its threads stands, for the error's message.
    """
    port = free_port()
    task = dill.dumps((act, arguments, torch.get_default_dtype()))
    pipes, ranks = [], []
    with tempfile.NamedTemporaryFile("w+") as late:
        for rank in range(count):
            ours, theirs = _ranks.Pipe(duplex=False)
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            child = ({**os.environ, **place}, theirs, (0.95 * timeout, late.name), task)
            process = _ranks.Process(target=_child, args=child, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            ranks.append(process)
        try:
            return _results(pipes, time.monotonic() + timeout)
        except RankFailed as failed:
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
    environment: dict[str, str], pipe: Connection, last_words: tuple[float, str], task: bytes
) -> None:
    seconds, path = last_words
    late = open(path, "a")  # noqa: SIM115  the process ends with it
    faulthandler.enable(late)
    faulthandler.dump_traceback_later(seconds, file=late)
    os.environ.clear()
    os.environ.update(environment)
    # As pytest finds them (pyproject.toml): golden/ by name, the tests as tests.unit...
    sys.path[:0] = [str(_HERE), str(_HERE.parents[1])]
    torch.manual_seed(0)
    try:
        act, arguments, dtype = dill.loads(task)
        torch.set_default_dtype(dtype)
        pipe.send_bytes(pickle.dumps((True, act(*arguments))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        sys.stdout.flush()
        os._exit(0)  # past whatever the server would do at its exit


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
