"""Where networks are scored: in this process, or in processes of their own that can be given up.

Both take networks by number and tell what comes of them as Scored, Finished, Failed or Died, and wait for an answer, `go_on` or
`stop`, after each Scored.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from triscale.architecture import Arch
from triscale.search.events import Score, SearchError

LOADING = 600.0  # seconds that a process with a timeout may take to begin


@dataclass(frozen=True)
class Scored:
    """A value on the way."""

    number: int
    value: float


@dataclass(frozen=True)
class Finished:
    """seconds: that the whole score took."""

    number: int
    seconds: float


@dataclass(frozen=True)
class Failed:
    """The score raised, or gave no number, or took too long; trace: of what it raised."""

    number: int
    why: str
    trace: str = ""


@dataclass(frozen=True)
class Died:
    """The process that scored it ended; loaded: after the score had been there."""

    number: int
    why: str
    loaded: bool = True


@dataclass(frozen=True)
class Loaded:
    """The score is there and begins now; what its process took to start doesn't count as its time."""

    number: int


Message = Scored | Finished | Failed | Died


class Scoring(Protocol):
    """Scores up to `slots` networks at a time."""

    slots: int

    def begin(self, number: int, arch: Arch) -> None: ...
    def messages(self, timeout: float) -> list[Message]: ...
    def go_on(self, number: int) -> None: ...
    def stop(self, number: int) -> None: ...
    def close(self) -> None: ...


def scoring(score: Score, workers: int, timeout: float) -> Scoring:
    """workers 0: in this process. Raises SearchError for a score that can't be sent to another process."""
    return Processes(score, workers, timeout) if workers else Here(score)


def values_of(score: Score, arch: Arch) -> Generator[float, None, None]:
    """What a score gives, one value at a time. Raises ValueError for what is no finite number, and for none at all."""
    found: Any = score(arch)
    some = False
    for value in found if hasattr(found, "__next__") else [found]:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"the score is no number: {value!r}"[:200]) from None
        if not math.isfinite(number):
            raise ValueError(f"the score is {number}")
        some = True
        yield number
    if not some:
        raise ValueError("the score gave no value")


def why(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"[:300]


class Here:
    """One network at a time in this process."""

    slots = 1

    def __init__(self, score: Score) -> None:
        self._score = score
        self._number, self._seconds = -1, 0.0
        self._values: Generator[float, None, None] | None = None

    def begin(self, number: int, arch: Arch) -> None:
        self._number, self._values, self._seconds = number, values_of(self._score, arch), 0.0

    def messages(self, timeout: float) -> list[Message]:
        began, number = time.perf_counter(), self._number
        try:
            assert self._values is not None
            return [Scored(number, next(self._values))]
        except StopIteration:
            return [Finished(number, self._seconds + time.perf_counter() - began)]
        except Exception as error:
            return [Failed(number, why(error), traceback.format_exc())]
        finally:
            self._seconds += time.perf_counter() - began

    def go_on(self, number: int) -> None:
        """The next `messages` goes on by itself."""

    def stop(self, number: int) -> None:
        self.close()

    def close(self) -> None:
        if self._values is not None:
            self._values.close()
            self._values = None


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    number: int | None = None
    deadline: float = math.inf
    left: float = math.inf  # of the time that the score may take
    loaded: bool = False


class Processes:
    """A process a slot, each with a pipe; one that hangs or ends is replaced."""

    def __init__(self, score: Score, workers: int, timeout: float) -> None:
        try:
            self._score = pickle.dumps(score)
        except Exception as error:  # each object has its own reason
            reason = " ".join(str(error).split())[:200]
            raise SearchError(f"score: can't be sent to worker processes ({reason}); define it in a module, or take workers 0") from None
        self.slots, self._timeout = workers, timeout
        self._context = multiprocessing.get_context("spawn")
        self._workers = list[_Worker]()

    def begin(self, number: int, arch: Arch) -> None:
        worker = next((w for w in self._workers if w.number is None and w.process.is_alive()), None)
        if worker is None:
            worker = self._new()
        worker.number, worker.left = number, self._timeout or math.inf
        worker.deadline = time.monotonic() + (LOADING if self._timeout else math.inf)
        with contextlib.suppress(OSError):  # one that has just ended is met by `messages`
            worker.pipe.send((number, arch))

    def _new(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._score, theirs, os.getpid()), daemon=True)
        with _without_interrupt():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def messages(self, timeout: float) -> list[Message]:
        busy = [w for w in self._workers if w.number is not None]
        until = min([time.monotonic() + timeout, *(w.deadline for w in busy)])
        ready = set(wait([w.pipe for w in busy], max(0.0, until - time.monotonic())))
        out: list[Message] = []
        for worker in busy:
            number = worker.number
            assert number is not None
            if worker.pipe in ready:
                message = self._receive(worker, number)
                if isinstance(message, Loaded):
                    worker.loaded, worker.deadline = True, time.monotonic() + worker.left
                else:
                    out.append(message)
            elif time.monotonic() >= worker.deadline:
                text = f"gave no score within {self._timeout:g} s" if worker.loaded else f"its process did not begin within {LOADING:g} s"
                self._end(worker)
                out.append(Failed(number, text))
        return out

    def _receive(self, worker: _Worker, number: int) -> Message | Loaded:
        try:
            message: Message | Loaded = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            code = worker.process.exitcode
            self._end(worker)
            told = f"by signal {signal.Signals(-code).name}" if code and code < 0 else f"with status {code}"
            return Died(number, f"the process that scored it ended {told}", worker.loaded)
        if isinstance(message, (Finished, Failed)):
            worker.number, worker.deadline = None, math.inf
        elif isinstance(message, Scored):  # until it is answered the time is not the score's
            worker.left, worker.deadline = worker.deadline - time.monotonic(), math.inf
        return message

    def go_on(self, number: int) -> None:
        self._answer(number, True)

    def stop(self, number: int) -> None:
        """The score is left at its last value; the process goes on to another network."""
        self._answer(number, False)
        for worker in self._workers:
            if worker.number == number:
                worker.number, worker.deadline = None, math.inf

    def _answer(self, number: int, on: bool) -> None:
        for worker in self._workers:
            if worker.number == number:
                worker.deadline = time.monotonic() + worker.left
                with contextlib.suppress(OSError):
                    worker.pipe.send(on)

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()

    def close(self) -> None:
        for worker in list(self._workers):
            self._end(worker)


@contextlib.contextmanager
def _without_interrupt() -> Iterator[None]:
    """A process that is started meanwhile takes no notice of Ctrl-C, not even before its own code begins."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits, and is not lost; the child inherits the block
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pickled: bytes, pipe: Connection, parent: int) -> None:
    """A worker process: scores what comes through the pipe until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    loaded: list[Score] = []
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            number, arch = pipe.recv()
            last = _score(pickled, loaded, number, arch, pipe)
            if last is not None:
                pipe.send(last)


def _score(pickled: bytes, loaded: list[Score], number: int, arch: Arch, pipe: Connection) -> Message | None:
    """Sends each value and waits for the answer; returns the last message, None where it was told to stop."""
    try:
        if not loaded:
            loaded.append(pickle.loads(pickled))
    except Exception as error:
        return Failed(number, why(error), traceback.format_exc())
    pipe.send(Loaded(number))
    began, values = time.perf_counter(), values_of(loaded[0], arch)
    while True:
        try:
            value = next(values)
        except StopIteration:
            return Finished(number, time.perf_counter() - began)
        except Exception as error:
            return Failed(number, why(error), traceback.format_exc())
        pipe.send(Scored(number, value))
        if not pipe.recv():
            values.close()
            return None


def _end_with(parent: int) -> None:
    """A worker whose parent was killed in the middle of a score would go on to its end."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
