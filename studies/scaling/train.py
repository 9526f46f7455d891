"""One training of the study, from a Run to its result line."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from studies.scaling.images import resized
from studies.scaling.plan import CLASSES, Run
from triscale.cost_model import cost
from triscale.data.loader import Batches, evaluation_batches
from triscale.demo import processor
from triscale.evaluate import predict_logits, top_k_accuracy
from triscale.model import build
from triscale.recipe import Preprocess
from triscale.train.loop import Note, Step, cross_entropy, fit
from triscale.train.plan import Plan
from triscale.version import __version__
from triscale.weights.model_file import ModelCard, save_model

FORMAT = 1


@dataclass(frozen=True)
class Job:
    """A run with what it needs. images: the folder of `images.unpack`. model: where the trained network is saved, if anywhere."""

    run: Run
    scale: str
    images: str
    classes: tuple[str, ...]
    device: str = "cpu"
    compile: bool = False
    model: str | None = None
    threads: int = 1


def train(job: Job, progress: Callable[[float], None], note: Callable[[str], None]) -> dict[str, Any]:
    """Trains and evaluates; returns the result line. progress: called with the share of the training that each step is.

    The last epoch's network is what is evaluated, on the whole test split, once: nothing is chosen by it.
    """
    start, cpu = time.perf_counter(), time.process_time()
    run, recipe = job.run, job.run.recipe
    size = run.arch.resolution
    images = resized(Path(job.images), size, job.device)
    preprocess = Preprocess(size, 0)
    torch.manual_seed(recipe.seed)
    net = build(run.arch, CLASSES).to(job.device).to(memory_format=torch.channels_last)
    batches = Batches(images.train, images.train_labels, preprocess, recipe, device=job.device)
    losses: list[float] = []
    plan = Plan(device=job.device, compile=job.compile)
    for event in fit(net, batches, cross_entropy(recipe.label_smoothing), recipe, plan=plan):
        if isinstance(event, Step):
            progress(1 / event.steps)
        elif isinstance(event, Note):
            note(f"{run.label}: {event.text}")
        else:
            losses.append(event.loss)
    logits = predict_logits(net, evaluation_batches(images.test, preprocess, 500))
    labels = images.test_labels.cpu()
    top1, top5 = (top_k_accuracy(logits, labels, k) for k in (1, 5))
    line = _about(job) | {"top1": top1, "top5": top5, "train_loss": losses[-1], "train_losses": losses}
    if job.model:
        provenance = {"data": "CIFAR-10", "held_out": "its test set", "recipe": recipe.to_dict(), "triscale": __version__}
        save_model(job.model, net.float().cpu(), ModelCard(run.arch, preprocess, job.classes, provenance, {"top1": top1}))
    counts = {"train_images": len(images.train), "test_images": len(images.test)}
    return line | counts | {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "finished": int(time.time())}


def _about(job: Job) -> dict[str, Any]:
    s, c, recipe = job.run.scaling, cost(job.run.arch, CLASSES), job.run.recipe
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": job.threads}
    if job.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"triscale": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "format": FORMAT,
        "study": "scaling",
        "scale": job.scale,
        "name": job.run.name,
        "seed": recipe.seed,
        "depth": s.depth,
        "width": s.width,
        "resolution": s.resolution,
        "phi": s.phi,
        "px": job.run.arch.resolution,
        "macs": c.macs,
        "params": c.params,
        "arch": json.loads(job.run.arch.to_json()),
        "recipe": recipe.to_dict(),
        "versions": versions,
        "machine": machine,
    }
