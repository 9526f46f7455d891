"""Trainings side by side, each in a process with its own threads; events as they come."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from queue import Empty
from typing import Any

import torch

from studies.scaling.train import Job, train


@dataclass(frozen=True)
class Done:
    """A training's result line."""

    job: Job
    line: dict[str, Any]


@dataclass(frozen=True)
class Worked:
    """So much of the work, in the unit of Run.work, since the last event."""

    work: float


@dataclass(frozen=True)
class Told:
    """Something that the user should know once."""

    text: str


_queue: Any = None


def _start_worker(queue: Any, threads: int, parent: int) -> None:
    global _queue
    _queue = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _train(job: Job) -> dict[str, Any]:
    return train(job, lambda share: _queue.put(share * job.run.work), _queue.put)


def side_by_side(jobs: Sequence[Job], workers: int, deadline: float = float("inf")) -> Iterator[Worked | Done | Told]:
    """Trains all jobs, `workers` at a time, in order; none is begun after `deadline` (time.monotonic()).

    Closing the iterator ends the workers. Raises MemoryError where one was killed, and what a training raised.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (queue, jobs[0].threads, os.getpid()))
    waiting, running = list(jobs), dict[Future[dict[str, Any]], Job]()
    try:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < workers and time.monotonic() < deadline:
                job = waiting.pop(0)
                running[pool.submit(_train, job)] = job
            yield from _messages(queue)
            for future in [f for f in running if f.done()]:
                yield Done(running.pop(future), future.result())
    except BrokenProcessPool:
        raise MemoryError("a training process was killed; the machine may be out of memory, try --workers 1") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        queue.close()


def _messages(queue: Any) -> Iterator[Worked | Told]:
    """What has come in, after waiting for it for a moment."""
    work = 0.0
    try:
        message = queue.get(timeout=0.2)
        while True:
            if isinstance(message, str):
                yield Told(message)
            else:
                work += message
            message = queue.get_nowait()
    except Empty:
        if work:
            yield Worked(work)
