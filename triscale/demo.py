"""The paper's idea on your own machine: one small network, four times its MACs spent in four ways, all trained on real scans.

Writes runs/demo: results.json (every figure), model.safetensors (the network of the best way), report.html.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from triscale.architecture import Arch, Head, Numerics, Stage, Stem
from triscale.classify import Evaluated, preprocess_for, train_classifier
from triscale.cost_model import cost, table
from triscale.data.datasets import find, load
from triscale.data.loader import evaluation_batches
from triscale.evaluate import predict_logits
from triscale.files import write_text
from triscale.recipe import Recipe
from triscale.scaling import ALPHA, BETA, GAMMA, Scaling, compound, scale
from triscale.train.loop import Step
from triscale.version import __version__
from triscale.weights.model_file import ModelCard, load_model, save_model

BUDGET = 4  # times the base network's MACs
CLASSES, CHANNELS = 10, 1
SAMPLES = 10

# Small enough that fifteen of it train in two minutes on two cores, with room to gain from being scaled.
BASE = Arch(
    Stem(8, 3, 1),
    (
        Stage("mbconv", 3, 2, 1, 0.25, "identity", 8, 2),
        Stage("mbconv", 3, 1, 2, 0.25, "identity", 12, 1),
        Stage("mbconv", 3, 2, 2, 0.25, "identity", 24, 2),
    ),
    Head(64),
    resolution=16,
    dropout=0.1,
    # The official momentum averages over 100 steps and more, too slow for runs of a few hundred; 4 is a finer grid than 8.
    numerics=Numerics(norm_momentum=0.1, drop_path=0.0, divisor=4),
    name="base",
)

RECIPE = Recipe(epochs=19, batch_size=64, lr=0.1, warmup_epochs=1.0, label_smoothing=0.05, flip=False, shift=0.1, ema=0.99)


@dataclass(frozen=True)
class Way:
    """One way to spend the MACs: its name, its multipliers, and the network they give."""

    name: str
    scaling: Scaling
    arch: Arch

    @property
    def macs(self) -> int:
        return cost(self.arch, CLASSES, CHANNELS).macs

    @property
    def params(self) -> int:
        return cost(self.arch, CLASSES, CHANNELS).params


def ways(base: Arch = BASE) -> list[Way]:
    """The base and the largest network of each way within BUDGET times its MACs, multipliers searched in steps of 0.01."""
    kinds: dict[str, Callable[[float], Scaling]] = {
        "depth": lambda v: Scaling(depth=v),
        "width": lambda v: Scaling(width=v),
        "resolution": lambda v: Scaling(resolution=v),
        "compound": lambda v: compound(v - 1),
    }
    limit = BUDGET * cost(base, CLASSES, CHANNELS).macs
    out = [Way("base", Scaling(), base)]
    for name, scaling_of in kinds.items():
        fitting = [s for s in (scaling_of(i / 100) for i in range(100, 1000)) if cost(scale(base, s), CLASSES, CHANNELS).macs <= limit]
        # Of the multipliers that round to the largest network, the smallest.
        best = max(fitting, key=lambda s: (cost(scale(base, s), CLASSES, CHANNELS).macs, -(s.phi or s.depth * s.width * s.resolution)))
        out.append(Way(name, best, replace(scale(base, best), dropout=base.dropout, name=name)))
    return out


@dataclass(frozen=True)
class _Job:
    way: str
    arch: Arch
    seed: int
    recipe: Recipe
    folder: str


@dataclass(frozen=True)
class Progress:
    """done and total in units of work (steps weighted by the network's blocks); `finished` when a training ends: its name and accuracy."""

    done: float
    total: float
    finished: tuple[str, int, float] | None = None


_queue: Any = None


def _start_worker(queue: Any) -> None:
    global _queue
    _queue = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _weight(arch: Arch) -> int:
    return 4 + sum(s.layers for s in arch.stages)


def _train(job: _Job) -> dict[str, Any]:
    preprocess = preprocess_for(job.arch.resolution, CHANNELS)
    splits = load(find("digits"), preprocess)
    start, last = time.perf_counter(), None
    for event in train_classifier(splits, job.arch, preprocess, job.recipe, evaluate_every=job.recipe.epochs):
        if isinstance(event, Step):
            _queue.put((_weight(job.arch), event.steps))
        else:
            last = event
    assert isinstance(last, Evaluated)
    path = Path(job.folder) / f"{job.way}-{job.seed}.safetensors"
    provenance = {"data": "digits", "recipe": job.recipe.to_dict(), "triscale": __version__}
    save_model(path, last.net, ModelCard(job.arch, preprocess, splits.classes, provenance, {"top1": last.top1}))
    return {"way": job.way, "seed": job.seed, "top1": last.top1, "loss": last.train_loss, "seconds": time.perf_counter() - start, "path": str(path)}


def run(out: Path, *, seeds: int = 3, recipe: Recipe = RECIPE, workers: int | None = None) -> Iterator[Progress]:
    """Trains every way with every seed, `workers` processes of one thread each at a time, and writes the run folder at the end.

    Nothing is written when it is stopped before. Raises DataError where scikit-learn is missing.
    """
    find("digits")  # a missing package is told here, not by a worker
    all_ways = ways()
    out.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=out, prefix=".work-") as folder:
        # The deepest first, so that the last to finish is a short one.
        order = sorted(all_ways, key=lambda w: -_weight(w.arch))
        jobs = [_Job(w.name, w.arch, s, replace(recipe, seed=s), folder) for w in order for s in range(seeds)]
        queue = context.Queue()
        count = max(1, min(workers or cores, len(jobs), 8))
        pool = ProcessPoolExecutor(count, context, _start_worker, (queue,))
        try:
            pending = [pool.submit(_train, job) for job in jobs]
            yield from _watch(pending, queue, jobs)
            results = [p.result() for p in pending]
        except BrokenProcessPool:
            raise MemoryError("a training process was killed; the machine may be out of memory, try --workers 1") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
        _finish(out, all_ways, results, recipe, time.perf_counter() - start, count)


def _watch(pending: list[Future[dict[str, Any]]], queue: Any, jobs: list[_Job]) -> Iterator[Progress]:
    done, total, reported = 0.0, float(sum(_weight(j.arch) for j in jobs)), set[int]()
    while len(reported) < len(pending):
        try:
            weight, steps = queue.get(timeout=0.2)
            done += weight / steps
            yield Progress(done, total)
        except Empty:
            pass
        for i, result in enumerate(pending):
            if i not in reported and result.done():
                reported.add(i)
                value = result.result()
                yield Progress(done, total, (value["way"], value["seed"], value["top1"]))


def _finish(out: Path, all_ways: list[Way], results: list[dict[str, Any]], recipe: Recipe, seconds: float, workers: int) -> None:
    rows: list[dict[str, Any]] = []
    for way in all_ways:
        mine = sorted((r for r in results if r["way"] == way.name), key=lambda r: r["seed"])
        s = way.scaling
        row = {"name": way.name, "depth": s.depth, "width": s.width, "resolution": s.resolution, "phi": s.phi, "px": way.arch.resolution}
        row |= {"macs": way.macs, "params": way.params, "top1": [r["top1"] for r in mine], "seconds": [r["seconds"] for r in mine]}
        rows.append(row | {"table": table(way.arch, CLASSES, CHANNELS), "arch": json.loads(way.arch.to_json())})
    best = max((r for r in rows if r["name"] != "base"), key=lambda r: statistics.fmean(r["top1"]))
    chosen = next(r for r in results if r["way"] == best["name"] and r["seed"] == 0)
    net, card = load_model(chosen["path"])
    save_model(out / "model.safetensors", net, card)
    machine = {"processor": processor(), "workers": workers, "python": platform.python_version(), "torch": torch.__version__, "triscale": __version__}
    body = {"format": 1, "kind": "demo", "budget": BUDGET, "alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "seconds": seconds, "machine": machine}
    body |= {"recipe": recipe.to_dict(), "networks": rows, "best": best["name"], "samples": _samples(out / "model.safetensors")}
    splits = load(find("digits"), preprocess_for(8, CHANNELS))
    body |= {"train_images": len(splits.train), "held_out_images": len(splits.held_out)}
    write_text(out / "results.json", json.dumps(body, indent=1))


def _samples(path: Path) -> list[dict[str, Any]]:
    """Held-out scans with what the model says: its least certain ones first, right or wrong, then evenly drawn others."""
    net, card = load_model(path)
    shown, scans = load(find("digits"), card.preprocess).held_out, load(find("digits"), preprocess_for(8, CHANNELS)).held_out
    probabilities = predict_logits(net, evaluation_batches(shown.images, card.preprocess)).softmax(1)
    certainty = probabilities.max(1).values
    hardest = certainty.argsort()[: SAMPLES // 2].tolist()
    spread = [i for i in range(0, len(shown), max(1, len(shown) // SAMPLES)) if i not in hardest][: SAMPLES - len(hardest)]
    return [
        {
            "name": shown.names[i],
            "pixels": scans.images[i, 0].tolist(),
            "label": card.classes[int(shown.labels[i])],
            "says": card.classes[int(probabilities[i].argmax())],
            "probability": float(certainty[i]),
        }
        for i in hardest + spread
    ]


def processor() -> str:
    """The processor's name, as /proc/cpuinfo or platform gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
