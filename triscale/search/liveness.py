"""Which workers of a study still live: each leaves a sign in the study, and what it runs on.

A worker of the same machine is looked up by its process, so that a killed one is known at once. One of another machine is given
up when its sign has not changed for a while by the watcher's own clock: the machines' clocks need not agree.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

SIGN = "alive "  # a study's attribute, with the worker's name: a count


def machine() -> str:
    """What processes that see each other share: the host's name, since when it runs, and the space of its process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def began(pid: int) -> str:
    """When a process began, in the system's ticks; "" where there is none, "?" where that can't be told."""
    try:
        after = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if after[0] in "ZX" else after[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "?"
    return "" if Path("/proc/self/stat").exists() else "?"


class Liveness:
    """This worker's sign, renewed by a thread, and a watch on the others'."""

    def __init__(self, study: optuna.Study, alive_after: float) -> None:
        self._study, self._alive_after = study, alive_after
        self._storage = getattr(study._storage, "inner", study._storage)
        self.name = uuid.uuid4().hex[:12]
        self.card = {"worker": self.name, "machine": machine(), "pid": os.getpid(), "began": began(os.getpid())}
        self._seen: dict[str, tuple[Any, float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to leave signs, four in the time after which others would give this worker up."""
        if isinstance(self._storage, optuna.storages.InMemoryStorage):
            return
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        count = 0
        while not self._stop.wait(self._alive_after / 4 if count else 0):
            count += 1
            with contextlib.suppress(Exception):  # the storage is away; it's the main thread that tells and waits
                self._storage.set_study_user_attr(self._study._study_id, SIGN + self.name, count)

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def lives(self, card: Mapping[str, Any], signs: Mapping[str, Any]) -> bool:
        """Whether the worker of this card may still be at work. signs: the study's attributes."""
        name = card.get("worker", "")
        if name == self.name:
            return True
        if card.get("machine") == self.card["machine"]:
            now = began(int(card["pid"]))
            if not now or (now != card.get("began") and "?" not in (now, card.get("began"))):
                return False
        return self.changes(SIGN + name, signs.get(SIGN + name))  # one that was stopped, or hangs whole, gives none either

    def changes(self, what: str, sign: Any) -> bool:
        """Whether `sign` has changed within the time, or is new here."""
        now = time.monotonic()
        if what not in self._seen or self._seen[what][0] != sign:
            self._seen[what] = sign, now
        return now - self._seen[what][1] < self._alive_after
