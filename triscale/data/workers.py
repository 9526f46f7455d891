"""Worker processes that fill the slots of a ring. Without torch, in this process and in theirs.

A worker is a fresh interpreter, not a fork: torch's threads, CUDA and the caller's `__main__` stay out of it (46 MB and 0.2 s
each instead of 400 MB and 3 s). Tasks go through one pipe that all workers read, records of fixed size, so that the first task
is always the next to be done, by whoever is free; what is done comes back through another. Pixels stay in shared memory that
has no name: the kernel frees it with the last process. One socket a worker carries its orders, and tells each side of the
other's death.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from triscale.data.work import BROKEN, PENDING, Ring, Shape, Work, do, mark, ring_bytes
from triscale.data.worker_main import TASK, Order, nameless, pickled

CHUNK = 8  # samples a task, at most: 3 to 15 ms of work
AT_ONCE = 256 * TASK.size  # 4096: what a pipe takes whole or not at all
DEATHS = 5  # of worker processes in an epoch that are made good
CRASHES = 40  # as many more over samples that crash what decodes them: no want of memory
STRIKES = 2  # deaths in an epoch over one sample before it counts as broken, from then on
STALL = 60.0  # seconds over one sample before the user is told
_START = (
    "import pickle,socket,sys;s=socket.socket(fileno=int(sys.argv[1]));f=s.makefile('rb');sys.path[:]=pickle.load(f);"
    "from triscale.data.worker_main import serve;serve(s,f)"
)


class WorkerError(ChildProcessError):
    """Worker processes that keep dying, or an error in them that is no image's fault."""


class _Worker(NamedTuple):
    process: subprocess.Popen[bytes]
    socket: socket.socket


class Pool:
    """Slots of samples, filled by `shape.workers` processes that last until `close`, or by this one where that is 0.

    `submit` a slot, `wait` for it, read `ring`. tell: gets what the user should know, a line at a time.
    """

    def __init__(self, work: Work, shape: Shape, tell: Callable[[str], None]) -> None:
        self.work, self.shape, self.tell = work, shape, tell
        self.left = [0] * shape.slots  # tasks of each slot that aren't done
        self.count = [0] * shape.slots  # samples of each slot
        self.turn = 0  # counts cancellations
        self._undone: dict[bytes, None] = {}  # in order of submission
        self._unsent: deque[bytes] = deque()
        self._deaths = self._crashes = 0
        self._strikes, self._killers = dict[int, int](), dict[int, str]()  # by sample: deaths; why it counts as broken
        self._astray = False  # interrupted between what was read and what was noted of it
        self._told: set[tuple[int, float]] = set()
        self._open: dict[str, int] = {}
        if not shape.workers:
            self.ring = Ring(shape)
            self.ring.current[:] = -1
            return
        self._file = nameless(ring_bytes(shape))
        self.ring = Ring(shape, mmap.mmap(self._file, ring_bytes(shape)))
        self.ring.current[:] = -1
        self._orders, self._sizes, self._arrays = pickled(work)
        self._workers: list[_Worker] = []
        self._end = weakref.finalize(self, _end, os.getpid(), self._workers, self._open, [self._file, self._arrays])
        self._start()

    def submit(self, slot: int, numbers: np.ndarray, epoch: int) -> None:
        """Asks for these samples, as `epoch` sees them, in a slot that nobody waits for."""
        n, workers = len(numbers), max(1, self.shape.workers)
        ring = self.ring
        ring.numbers[slot, :n], ring.status[slot, :n], ring.epochs[slot] = numbers, PENDING, epoch
        chunk = max(1, min(CHUNK, n // (2 * workers)))
        tasks = [TASK.pack(int(ring.generation[0]), slot, first, min(chunk, n - first)) for first in range(0, n, chunk)]
        self.left[slot], self.count[slot] = len(tasks), n
        if self._killers:
            self._condemn(slot, 0, n)
        self._undone.update(dict.fromkeys(tasks))
        self._unsent.extend(tasks)
        if self.shape.workers:
            self._send()

    def wait(self, slot: int) -> None:
        """Until the slot's samples are all done. Raises WorkerError."""
        if not self.shape.workers:
            self._alone(slot)
        while self.left[slot]:
            self._step()

    def cancel(self) -> None:
        """Gives up what was submitted, before an epoch. Returns once nobody writes to any slot."""
        self.turn += 1
        self._deaths = self._crashes = 0
        self._strikes.clear()
        self.ring.generation[0] = self.turn
        if not self.shape.workers:
            self._undone.clear()
            self._unsent.clear()
        while self._undone:
            self._step()
        self.left = [0] * self.shape.slots

    @property
    def closed(self) -> bool:
        return bool(self.shape.workers) and not self._end.alive

    def close(self) -> None:
        """Ends the worker processes, and whoever waits for a slot."""
        self.turn += 1
        if self.shape.workers:
            self._end()

    def _alone(self, slot: int) -> None:
        """The slot's tasks in this process; a thread sees to it that a stalled read doesn't go untold."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(STALL / 4):
                self._look_for_stalls()

        watcher = threading.Thread(target=watch, name="stalls", daemon=True)
        watcher.start()
        try:
            for task in [t for t in self._undone if TASK.unpack(t)[1] == slot]:
                do(self.work, self.ring, 0, TASK.unpack(task))
                self._finish(task)
        finally:
            over.set()

    def _step(self) -> None:
        """Hands out tasks, takes in what is done, and sees to the dead; returns after a second where nothing happens."""
        if self._astray:
            _kill(self._workers)
            self._start()
        self._astray = True
        poll = select.poll()  # select() refuses descriptors from 1024 on
        for descriptor in (self._done, *(w.socket.fileno() for w in self._workers)):
            poll.register(descriptor, select.POLLIN)
        if self._unsent:
            poll.register(self._tasks, select.POLLOUT)
        ready = [descriptor for descriptor, _ in poll.poll(1000)]
        self._send()
        if self._done in ready:
            data = os.read(self._done, AT_ONCE)
            for at in range(0, len(data), TASK.size):
                self._finish(data[at : at + TASK.size])
        if dead := [w for w in self._workers if w.socket.fileno() in ready]:  # then the pipe has an end, too, and is always ready
            self._bury(dead)
        if not ready:
            self._look_for_stalls()
        self._astray = False

    def _finish(self, task: bytes) -> None:
        if task in self._undone:
            del self._undone[task]
            self.left[TASK.unpack(task)[1]] -= 1

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # full; all dead: their sockets tell
            while self._unsent:
                first = [self._unsent[i] for i in range(min(len(self._unsent), AT_ONCE // TASK.size))]
                os.write(self._tasks, b"".join(first))
                for _ in first:
                    self._unsent.popleft()

    def _bury(self, dead: list[_Worker]) -> None:
        """Starts all workers anew: what a pipe held for a dead one is nobody's to know. Samples that are done stay done."""
        for worker in dead:
            if said := _said(worker.socket):
                self.close()
                raise WorkerError(said)
        at = [(w, int(self.ring.current[self._workers.index(w)])) for w in dead]
        _kill(self._workers)
        how = ", ".join(sorted({_fate(w.process.returncode) for w in dead}))
        over = [n for _, n in at if n >= 0]
        crashes = sum(n >= 0 and w.process.returncode not in (-signal.SIGKILL, -signal.SIGTERM) for w, n in at)
        self._crashes += crashes
        self._deaths += len(dead) - crashes
        for number in over:
            self._strikes[number] = self._strikes.get(number, 0) + 1
            if self._strikes[number] >= STRIKES:
                self._killers[number] = f"{self.work.samples.name(number)}: a worker process died over it {STRIKES} times ({how})"
        if self._deaths > DEATHS or self._crashes > CRASHES:
            self.close()
            names = f"; the last over {', '.join(self.work.samples.name(n) for n in over)}" if over else ""
            times = f"{self._deaths + self._crashes} times ({how}{names})"
            raise WorkerError(f"worker processes of the loader died {times}: out of memory? Fewer --workers need less")
        self.tell(f"a worker process of the loader died ({how}) and was started again; what it had in hand is done again")
        for task in self._undone if self._killers else ():
            self._condemn(*TASK.unpack(task)[1:])
        self._start()

    def _condemn(self, slot: int, first: int, count: int) -> None:
        """Samples over which workers keep dying count as broken."""
        for i in range(first, first + count):
            if why := self._killers.get(int(self.ring.numbers[slot, i])):
                mark(self.ring, slot, i, BROKEN, why)

    def _look_for_stalls(self) -> None:
        now = time.monotonic()
        for number, since in zip(self.ring.current.tolist(), self.ring.since.tolist(), strict=True):
            if number >= 0 and now - since > STALL and (number, since) not in self._told:
                self._told.add((number, since))
                self.tell(f"{self.work.samples.name(number)}: being read for {now - since:.0f} s; still waiting (is its disk or server gone?)")

    def _start(self) -> None:
        """Workers, pipes, and in them what isn't done yet."""
        for name in ("_tasks", "_done"):
            if (old := self._open.pop(name, None)) is not None:
                os.close(old)
        theirs, self._tasks = os.pipe()
        self._done, back = os.pipe()
        self._open.update(_tasks=self._tasks, _done=self._done)
        os.set_blocking(self._tasks, False)
        self.ring.current[:] = -1
        try:
            for i in range(self.shape.workers):
                order = Order(self.shape, self._orders, self._sizes, (self._file, self._arrays, theirs, back), i, os.getpid())
                self._workers.append(_spawn(order))
        finally:
            os.close(theirs)
            os.close(back)
        self._unsent = deque(self._undone)
        self._send()


def _said(ended: socket.socket) -> str:
    """A dead worker's last words; none where it died before it had read its order, which resets the connection."""
    with contextlib.suppress(ConnectionResetError):
        return ended.recv(1 << 16, socket.MSG_DONTWAIT).decode("utf-8", "replace")
    return ""


def _spawn(order: Order) -> _Worker:
    ours, theirs = socket.socketpair()
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # one worker, one core
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_file(sys.stderr) else subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), *order.files),
            env={**os.environ, **quiet},
            process_group=0,  # Ctrl-C is the parent's to handle
        )
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead already: seen when waited for
        ours.sendall(pickle.dumps(sys.path) + pickle.dumps(order))
    return _Worker(process, ours)


def _has_file(stream: object) -> bool:
    try:
        return stream.fileno() >= 0  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def _kill(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.kill()
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a dead file system: it won't write again
            worker.process.wait(5)
        worker.socket.close()
    workers.clear()


def _end(owner: int, workers: list[_Worker], pipes: dict[str, int], files: list[int]) -> None:
    """In a fork of the owner nothing is killed."""
    if os.getpid() == owner:
        _kill(workers)
        for descriptor in [*pipes.values(), *files]:
            os.close(descriptor)
        pipes.clear()


def _fate(status: int | None) -> str:
    if status is None or status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
