"""Decoding in other processes: an image that crashes or hangs its decoder becomes a reject.

Each process serves whoever borrows it, one group of rows at a time, over a pipe; nothing else is
shared, so no limit of /dev/shm matters. Whichever end goes away closes the pipe: a process whose
parent was killed ends, and a parent whose process was killed learns of it at once. (PyTorch's
DataLoader looks for either only every few seconds, and cannot say which row it was.)
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pickle import PicklingError
from queue import SimpleQueue

import torch
from torch import Tensor

from arra.data.decode import Decoded, Decoder
from arra.data.images import ignore_pillow
from arra.data.sources import Record, Reject

SECONDS = 120
"""What decoding an image may take. The largest that is allowed (images.MAX_PIXELS) takes a few."""

_OF_AN_IMAGE = {
    signal.SIGSEGV: "crashes the decoder (SIGSEGV)",
    signal.SIGBUS: "crashes the decoder (SIGBUS)",
    signal.SIGABRT: "crashes the decoder (SIGABRT)",
    signal.SIGFPE: "crashes the decoder (SIGFPE)",
    signal.SIGILL: "crashes the decoder (SIGILL)",
    signal.SIGALRM: "takes too long to decode",
}
"""Ends of a process that its image has brought about. Other ends come from outside."""

_starting = threading.Lock()
"""multiprocessing looks after all its children whenever one is started: one thread at a time."""


class DecodeProcesses:
    """Processes that decode; called from as many threads as there are processes.

    Use as a context. Equal rows give equal bytes, whichever process or thread decodes them.

    Args:
        decoders: by split.
        processes: how many.
        seconds: what decoding may take. A group of rows that takes longer is decoded row by row.
    """

    def __init__(
        self, decoders: Mapping[str, Decoder], processes: int, seconds: int = SECONDS
    ) -> None:
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._all = [_Process(decoders, seconds) for _ in range(processes)]
        for process in self._all:
            self._idle.put(process)

    def __enter__(self) -> "DecodeProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.stop()

    def __call__(self, split: str, rows: Sequence[Record | Reject]) -> list[Decoded | Reject]:
        """One item per row of a split, in order.

        Raises:
            ChildProcessError: a process was killed from outside.
        """
        process = self._idle.get()
        try:
            return process(split, rows)
        finally:
            self._idle.put(process)


def why_not(decoder: Decoder) -> str | None:
    """Which encoder's pixels cannot be sent to another process, and why; None if all can."""
    for name, pixels in decoder.preprocessing.items():
        try:
            ForkingPickler.dumps(pixels)
        except (PicklingError, AttributeError, TypeError) as error:
            return f"the pixels of encoder {name!r} cannot be sent to another process ({error})"
    return None


class _Ended(Exception):
    """The process at the other end is no more."""


class _Process:
    """One process, started when first asked, and again when an image has ended it."""

    def __init__(self, decoders: Mapping[str, Decoder], seconds: int) -> None:
        self._given = (decoders, seconds)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._stopped = False

    def __call__(self, split: str, rows: Sequence[Record | Reject]) -> list[Decoded | Reject]:
        try:
            return self._ask(split, rows)
        except _Ended:
            reason = self._reason()
        if len(rows) == 1:
            return [Reject(rows[0].row, rows[0].id, f"the image {reason}")]
        return [item for row in rows for item in self(split, [row])]

    def _ask(self, split: str, rows: Sequence[Record | Reject]) -> list[Decoded | Reject]:
        if self._process is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((split, rows))
            answer = self._pipe.recv()
            if isinstance(answer, Exception):
                raise answer
            return [
                _changed(item, self._received) if isinstance(item, Decoded) else item
                for item in answer
            ]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise _Ended from None

    def _received(self, empty: Tensor) -> Tensor:
        """The values of a tensor of which `empty` says shape and type."""
        assert self._pipe is not None
        whole = torch.empty(empty.shape, dtype=empty.dtype)
        bytes_, got = whole.reshape(-1).view(torch.uint8).numpy().data, 0
        while got < len(bytes_):
            count = os.readv(self._pipe.fileno(), [bytes_[got:]])
            if count == 0:
                raise EOFError
            got += count
        return whole

    def _start(self) -> None:
        # Neither fork, for torch has threads, nor a new interpreter for each, which would import
        # torch again: one server imports it and forks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["arra.data.decode"])
        with _starting:
            if self._stopped:
                raise _Ended
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, *self._given), name="arra decode", daemon=True
            )
            self._process.start()
            theirs.close()

    def _reason(self) -> str:
        """Why the process has ended, if an image is the reason."""
        process = self._process
        with _starting:
            if process is not None:
                process.join()
        self._process = None
        code = None if process is None else process.exitcode
        if code is not None and -code in _OF_AN_IMAGE and not self._stopped:
            return _OF_AN_IMAGE[signal.Signals(-code)]
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            raise ChildProcessError(
                f"a decoding process was killed ({name}), as systems do where memory runs out: run "
                f"the same command again to go on; fewer --workers need less memory, and "
                f"--workers 0 starts no processes"
            )
        raise ChildProcessError(
            f"a decoding process has ended by itself (exit code {code}), its reason is above. In a "
            f"script of your own, call prepare under `if __name__ == '__main__':`; --workers 0 "
            f"starts no processes"
        )

    def stop(self) -> None:
        """Ends the process at once; it holds nothing that could be lost."""
        with _starting:
            self._stopped = True
            if self._process is not None:
                self._process.kill()
                self._process.join()


def _changed(item: Decoded, change: Callable[[Tensor], Tensor]) -> Decoded:
    """The same item with each of its tensors changed, always in the same order."""
    return replace(
        item,
        pixels_CHW=change(item.pixels_CHW),
        seen={name: change(value) for name, value in item.seen.items()},
        views=tuple(_changed(view, change) for view in item.views),
    )


# ---- in the other process ------------------------------------------------------------------------


def _serve(pipe: Connection, decoders: Mapping[str, Decoder], seconds: int) -> None:
    """Decodes what comes until the other end goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes the pipe
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even where C code hangs
    torch.set_num_threads(1)
    ignore_pillow()
    try:
        while True:
            split, rows = pipe.recv()
            signal.alarm(seconds)
            answer = _decoded(decoders[split], rows)
            signal.alarm(0)
            _send(pipe, answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _decoded(
    decoder: Decoder, rows: Sequence[Record | Reject]
) -> list[Decoded | Reject] | Exception:
    try:
        return decoder(rows)
    except (ValueError, OSError, RuntimeError, TypeError, LookupError, ArithmeticError) as error:
        # Raised again by whoever asked. Other classes may not survive the way: their text does.
        kind = type(error) if type(error) in (ValueError, OSError, TypeError) else RuntimeError
        return kind(*error.args) if kind is OSError else kind(str(error))


def _send(pipe: Connection, answer: list[Decoded | Reject] | Exception) -> None:
    """First everything but the values of tensors, then those, one after another."""
    values: list[Tensor] = []

    def emptied(value: Tensor) -> Tensor:
        values.append(value)
        return value.to("meta")

    if isinstance(answer, Exception):
        pipe.send(answer)
        return
    pipe.send([_changed(i, emptied) if isinstance(i, Decoded) else i for i in answer])
    for value in values:
        bytes_ = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        sent = 0
        while sent < len(bytes_):
            sent += os.write(pipe.fileno(), bytes_[sent:])
