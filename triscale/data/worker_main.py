"""What a worker process of the loader is sent and what it runs: takes tasks off a pipe, does them, puts them on another.

Without torch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import tempfile
import threading
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np

from triscale.data.work import Ring, Shape, Work, do, ring_bytes

TASK = struct.Struct("<4I")  # generation, slot, first sample, count
ALIGN = 64  # bytes that arrays begin at multiples of


class Order(NamedTuple):
    """What a worker is told at its start. Files by their descriptors: ring, the pickled work's arrays, both pipes' ends."""

    shape: Shape
    work: bytes
    sizes: list[int]
    files: tuple[int, int, int, int]
    worker: int
    parent: int


def nameless(size: int) -> int:
    """A file of zeros without a name, in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("triscale")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, max(1, size))
    return descriptor


def pickled(work: Work) -> tuple[bytes, list[int], int]:
    """The work, its arrays' sizes, and a file with the arrays: workers map it, so that lists of a million names are there once."""
    arrays: list[pickle.PickleBuffer] = []
    try:
        order = pickle.dumps(work, protocol=5, buffer_callback=arrays.append)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{type(work.samples).__name__}: can't be sent to worker processes ({error}); --workers 0 goes without") from None
    raw = [a.raw() for a in arrays]
    sizes = [len(r) for r in raw]
    descriptor = nameless(sum(-(-s // ALIGN) * ALIGN for s in sizes))
    with mmap.mmap(descriptor, 0) as block:
        at = 0
        for part, size in zip(raw, sizes, strict=True):
            block[at : at + size] = part
            at += -(-size // ALIGN) * ALIGN
    return order, sizes, descriptor


def _unpickled(order: Order) -> Work:
    block = memoryview(mmap.mmap(order.files[1], 0, access=mmap.ACCESS_READ))
    starts = np.cumsum([0, *(-(-s // ALIGN) * ALIGN for s in order.sizes)]).tolist()
    return pickle.loads(order.work, buffers=[block[a : a + s] for a, s in zip(starts, order.sizes, strict=False)])


def serve(orders: socket.socket, file: BinaryIO) -> None:
    """A worker process: does tasks until the pipe that they come from ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", RuntimeWarning)  # of missing libraries: the parent tells, once
    try:
        order: Order = pickle.load(file)
        work, ring = _unpickled(order), Ring(order.shape, mmap.mmap(order.files[0], ring_bytes(order.shape)))
    except EOFError:  # the parent is gone already
        return
    except Exception as error:
        orders.sendall(f"the samples can't be loaded in a worker process ({type(error).__name__}: {error}); --workers 0 goes without".encode())
        return
    threading.Thread(target=_die_with_parent, args=(orders, order.parent), name="parent", daemon=True).start()
    tasks, done = order.files[2:]
    with contextlib.suppress(BrokenPipeError):
        while len(task := os.read(tasks, TASK.size)) == TASK.size:
            do(work, ring, order.worker, TASK.unpack(task))
            os.write(done, task)


def _die_with_parent(orders: socket.socket, parent: int) -> None:
    """Also in the middle of a read that never ends. By number too: a fork of the parent may hold the socket."""
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    while True:
        if poll.poll(5000) or os.getppid() != parent:
            os._exit(0)
