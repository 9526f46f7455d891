"""Images encoded by worker processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from triscale.data.decode import BadImage
from triscale.data.encode import encoded
from triscale.data.samples import Samples
from triscale.data.sources import DataError

AT_A_TIME = 16  # images a task: 0.1 s of work
AHEAD = 3  # tasks a worker

_work: tuple[Samples, int, int]  # of a worker process: what `encoded` takes beside the number


def encode_all(samples: Samples, order: np.ndarray, short_side: int, quality: int, workers: int) -> Generator[bytes | BadImage]:
    """The image files for these numbers, in this order, or why there is none. workers: processes; 1: this one alone.

    Raises DataError where a worker is killed.
    """
    if workers <= 1:
        yield from (_one(samples, int(number), short_side, quality) for number in order)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (samples, short_side, quality))
    waiting: deque[Future[list[bytes | BadImage]]] = deque()
    try:
        for start in range(0, len(order), AT_A_TIME):
            waiting.append(pool.submit(_some, order[start : start + AT_A_TIME]))
            if len(waiting) > AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed, by lack of memory perhaps; the same command goes on, with fewer --workers too") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(samples: Samples, short_side: int, quality: int) -> None:
    global _work
    _work = samples, short_side, quality
    for name in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C goes to all processes: the first one ends the others
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _some(numbers: np.ndarray) -> list[bytes | BadImage]:
    samples, short_side, quality = _work
    return [_one(samples, int(number), short_side, quality) for number in numbers]


def _one(samples: Samples, number: int, short_side: int, quality: int) -> bytes | BadImage:
    try:
        return encoded(samples, number, short_side, quality)
    except BadImage as error:
        return error
