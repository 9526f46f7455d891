"""What is fastest here: measured once, kept between processes.

One small JSON file a question, in the cache's folder `tuning`, by the hash of the question: network, shape, precision, threads,
machine. A file of other versions of torch or triscale, or one that is damaged, is told, measured anew and written over. Any
number of processes may share the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from triscale.architecture import Arch
from triscale.files import cache_folder, write_text
from triscale.inference.notices import Tell
from triscale.version import __version__

FORMAT = 1
LARGEST = 1 << 20  # bytes of a file that is looked into
BUDGET = 0.5  # seconds that measuring may take; two runs of two calls where that is longer: three more batches for a large network
ROUNDS = 10

Question = Mapping[str, Any]
Seconds = dict[str, float]


def versions() -> dict[str, str]:
    return {"triscale": __version__, "torch": torch.__version__}


def network(arch: Arch, num_classes: int, in_channels: int) -> str:
    """A short hash of the network's shapes and numerics; its name and its weights don't count."""
    body = {**asdict(arch), "name": "", "classes": num_classes, "channels": in_channels}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


@cache
def processor() -> str:
    """The CPU's name, cores and the instruction set that torch uses."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


class Choices:
    """The answers in a folder; the cache's unless given. folder: None where there is none."""

    def __init__(self, tell: Tell, folder: Path | None = None) -> None:
        self.tell = tell
        try:
            self.folder: Path | None = folder or cache_folder("tuning")
        except ValueError as error:  # no home
            self.folder = None
            tell(f"optimize: what is measured can't be kept: {error}")

    def path(self, question: Question) -> Path | None:
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return self.folder and self.folder / f"{key[:32]}.json"

    def get(self, question: Question) -> str | None:
        """The choice, None where there is none that holds for these versions."""
        path = self.path(question)
        if path is None:
            return None
        try:
            if path.stat().st_size > LARGEST:
                raise ValueError("too large")
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            self.tell(f"optimize: {path} can't be read as what was measured before; it is measured again")
            return None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("of") != question or type(data.get("choice")) is not str:
            self.tell(f"optimize: {path} is not a tuning file of format {FORMAT}; it is measured again")
            return None
        if data.get("versions") != versions():
            self.tell(f"optimize: {path} was measured with {_listed(data.get('versions'))}, this is {_listed(versions())}; it is measured again")
            return None
        return str(data["choice"])

    def put(self, question: Question, choice: str, seconds: Seconds) -> None:
        data = {
            "format": FORMAT,
            "versions": versions(),
            "of": question,
            "choice": choice,
            "seconds": {k: v for k, v in seconds.items() if math.isfinite(v)},
        }
        path = self.path(question)
        if path is None:
            return
        try:
            write_text(path, json.dumps(data, indent=1))
        except OSError as error:
            self.tell(
                f"optimize: {self.folder}: what was measured can't be kept ({error.strerror}); set TRISCALE_HOME to a folder that can be written"
            )


def _listed(found: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else "unknown versions"


def measure(
    calls: Mapping[str, Callable[[], object]], ready: Callable[[str], bool], *, budget: float = BUDGET, rounds: int = ROUNDS, least: int = 2
) -> Seconds:
    """Seconds of the fastest run of each call, in their order.

    ready: runs a call a first time, which may prepare something and doesn't count; False leaves it out. Once `least` are ready and
    the budget is used up, no other is tried. Then up to `rounds` in turn, at least one, while the budget lasts.
    One thread's work is timed by what it takes of the CPU, which other processes change little; several threads' by the clock.
    """
    fine = time.get_clock_info("thread_time").resolution < 1e-4  # not on Windows
    clock = time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    tried: list[str] = []
    for name in calls:
        if len(tried) >= least and clock() - begun > budget:
            break
        if ready(name):
            tried.append(name)
    best = dict.fromkeys(tried, math.inf)
    for i in range(rounds):
        if i and clock() - begun > budget:
            break
        for name in tried:
            start = clock()
            calls[name]()
            best[name] = min(best[name], clock() - start)
    return best
