"""Training a classifier: the run and its folder.

A run folder holds recipe.json, log.jsonl, samples.npz and held_out.npz (for the report), model.safetensors (the last finished
epoch, or with a minival the best on it) and states/ to resume from. The accuracy is that of the model in the file, on images
that took no part in any choice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triscale.architecture import Arch
from triscale.classify.events import Evaluated
from triscale.classify.pictures import Data, Feeding, Pictures
from triscale.classify.start import Start, start_from
from triscale.data.datasets import Splits
from triscale.data.sources import DataError
from triscale.evaluate import predict_logits, top_k_accuracy, whole_batches
from triscale.model import ConvNet
from triscale.recipe import Preprocess, Recipe
from triscale.run_log import RunLog, write_held_out, write_samples
from triscale.train.advprop import PGD, without_auxiliary_norms
from triscale.train.dist import World, gathered, sharded, told, world
from triscale.train.events import Resumed, Running, Saved
from triscale.train.loop import EpochEnd, Note, Step, cross_entropy, fit
from triscale.train.plan import Plan
from triscale.train.run import Run, arrange_norms
from triscale.train.state import TrainState
from triscale.version import __version__
from triscale.weights.model_file import ModelCard, save_model

SAMPLES = 24  # augmented training images that the report shows
# What a process says of its part of the images: logits (n, classes) and the n images' numbers, or why it could read none; None
# where it has no part.
_Part = tuple[Tensor, Tensor] | DataError | None


class _Judged(NamedTuple):
    """logits (n, classes) of the pictures with these numbers (n,)."""

    top1: float
    top5: float
    mean_per_class: float
    logits: Tensor
    numbers: Tensor


def train_classifier(
    data: Splits | Data,
    arch: Arch,
    preprocess: Preprocess,
    recipe: Recipe,
    *,
    start: Start | None = None,
    evaluate_every: int = 1,
    plan: Plan = Plan(),  # noqa: B008 - frozen
    broken_share: float = 0.01,
) -> Iterator[Step | Evaluated]:
    """Trains in this process, yielding each Step and, every so many epochs and after the last, an Evaluated.

    The same arguments, seed and number of threads give the same numbers on the same machine. plan: its device is one of torch's.
    broken_share: of streamed training images, above which it is an error that they can't be read.
    """
    data, feeding = Data.of(data), Feeding(broken_share=broken_share, device=plan.device)
    network = start_from(arch, data.classes, preprocess.channels, recipe, start)
    net = network.net.to(plan.device)
    state = TrainState(net, recipe, prepare=network.prepare, adversary=PGD.of(recipe, preprocess) if recipe.advprop else None)
    batches = data.train.batches(preprocess, recipe, len(data.classes), feeding)
    began = time.perf_counter()
    for event in fit(net, batches, cross_entropy(recipe.label_smoothing), recipe, plan=plan, state=state):
        if isinstance(event, EpochEnd):
            epoch = event.epoch + 1
            if epoch % evaluate_every == 0 or epoch == recipe.epochs:
                judged = _judged([_part(net, data.held_out, preprocess, feeding, plan.micro_batch)], data.held_out)
                seconds = time.perf_counter() - began
                yield Evaluated(epoch, event.loss, judged.top1, seconds, net, judged.top5, mean_per_class=judged.mean_per_class)
        elif isinstance(event, Step):
            yield event


def run_folder(
    out: Path,
    data: Splits | Data,
    arch: Arch,
    preprocess: Preprocess,
    recipe: Recipe,
    name: str,
    running: Running | None = None,
    start: Start | None = None,
) -> Iterator[Step | Evaluated | Saved | Resumed | Note]:
    """Trains with the run folder written as it goes, in as many processes as torchrun started; process 0 writes.

    name: what the model file calls the data. Raises ResumeError where the checkpoint is of another recipe, network or data;
    Stopped when asked to; OSError where the folder can't be written.
    """
    running = running or Running()
    with world(running.plan.device) as here:
        running = replace(running, plan=replace(running.plan, device=str(here.device)))
        task = _Task(out, Data.of(data), arch, preprocess, recipe, name, running, start, here)
        log = lambda steps: RunLog(out, tensorboard=running.tensorboard, steps_per_epoch=steps)  # noqa: E731
        try:
            yield from Run(out, task, recipe, running, here, log).events()
        finally:
            task.data.close()


class _Task:
    """A classifier as `train.run` trains it."""

    def __init__(
        self, out: Path, data: Data, arch: Arch, preprocess: Preprocess, recipe: Recipe, name: str, running: Running, start: Start | None, here: World
    ) -> None:
        self.out, self.preprocess, self.recipe, self.arch, self.name = out, preprocess, recipe, arch, name
        self.plan, self.here = running.plan, here
        self.feeding = Feeding(running.workers, running.broken_share, (here.rank, here.size), str(here.device))
        data.check_labels()
        self.identity: dict[str, Any] = {"recipe": recipe.to_dict(), "arch": json.loads(arch.to_json()), "preprocess": preprocess.to_dict()}
        # Streamed: another decoder, other pixels.
        self.identity |= {"classes": list(data.classes), "data": data.fingerprint(), "streamed": data.streamed}
        self.data, self.chosen_by = data.without_minival(recipe.minival) if recipe.minival else (data, data.held_out)
        network = start_from(arch, data.classes, preprocess.channels, recipe, start)
        if start:
            self.identity["weights"] = network.weights
        self.weights = start.label if start else ""
        self.net = network.net.to(here.device)
        self.identity["images a norm"] = arrange_norms(self.net, min(recipe.batch_size, len(self.data.train)), recipe, self.plan, here)
        build = (lambda kind, groups, **o: sharded(kind, groups, here, **o)) if running.shard else None
        self.state = TrainState(self.net, recipe, build, network.prepare, PGD.of(recipe, preprocess) if recipe.advprop else None)
        self.batches = self.data.train.batches(preprocess, recipe, len(self.data.classes), self.feeding)
        self.loss = cross_entropy(recipe.label_smoothing)
        self.files = {"recipe.json": json.dumps(recipe.to_dict(), indent=1), "arch.json": arch.to_json()}
        self.best, self.told = -1.0, False

    def renewed(self, about: dict[str, Any]) -> dict[str, Any]:
        return {"streamed": False, **about, "recipe": Recipe.from_dict(about["recipe"]).to_dict()}

    def share(self, everyones: Callable[[list[str]], list[str]]) -> None:
        self.data.share(everyones)

    def said(self) -> list[str]:
        data = self.data
        return [*data.train.notes, *data.held_out.notes, *(f"left out: {reason}" for reason in data.left_out())]

    def judge(self) -> _Judged | None:
        return self._found(self.net, self.chosen_by)

    def _found(self, net: ConvNet, pictures: Pictures) -> _Judged | None:
        parts = gathered(_part(net, pictures, self.preprocess, self.feeding, self.plan.micro_batch), self.here)
        return None if parts is None else _judged(parts, pictures)

    def evaluate(self, judged: _Judged, event: EpochEnd, log: RunLog, seconds: float) -> Iterator[Evaluated | Saved]:
        """Accuracy, and the model file where this model is the one to keep."""
        top1, top5, by_class = judged.top1, judged.top5, judged.mean_per_class
        epoch, on = event.epoch + 1, "minival" if self.recipe.minival else "held-out"
        log.epoch(epoch=epoch, step=self.state.step, loss=event.loss, seconds=seconds, top1=top1, top5=top5, mean_per_class=by_class)
        self.told = not self.recipe.minival
        yield Evaluated(epoch, event.loss, top1, seconds, self.net, top5, on, by_class)
        if self.recipe.minival and top1 <= self.best:
            return
        self.best = top1
        path = self.out / "model.safetensors"
        provenance: dict[str, Any] = {"data": self.name, "held_out": self.data.held_out_is, "epoch": epoch, "triscale": __version__}
        provenance["recipe"] = self.recipe.to_dict()
        if self.weights:
            provenance["from"] = self.weights
        measured = {"minival_top1": top1} if self.recipe.minival else {"top1": top1, "mean_per_class": by_class}
        net = without_auxiliary_norms(self.net) if self.recipe.advprop else self.net
        save_model(path, net, ModelCard(self.arch, self.preprocess, self.data.classes, provenance, measured))
        log.saved(self.state.step, path)
        yield Saved(epoch, path)

    def judge_kept(self) -> tuple[ConvNet, ModelCard, _Judged] | None:
        from triscale.weights.model_file import load_model

        net, card = told(lambda: load_model(self.out / "model.safetensors"), self.here)
        net = net.to(self.here.device).to(memory_format=torch.channels_last)
        judged = self._found(net, self.data.held_out)
        return (net, card, judged) if judged else None

    def finish(self, kept: tuple[ConvNet, ModelCard, _Judged], log: RunLog, seconds: float) -> Iterator[Evaluated]:
        """The final number: the model in the file on the untouched images."""
        (net, card, judged), held_out = kept, self.data.held_out
        numbers = judged.numbers.tolist()
        names = [held_out.name(i) for i in numbers]
        pixels = lambda rows: [held_out.pixels(numbers[i], self.preprocess) for i in rows]  # noqa: E731
        write_held_out(self.out, judged.logits.numpy(), held_out.labels[judged.numbers].numpy(), names, pixels)
        if self.recipe.minival:
            measured = {**card.measured, "top1": judged.top1, "mean_per_class": judged.mean_per_class}
            save_model(self.out / "model.safetensors", net, replace(card, measured=measured))
            log.note(f"chosen on the minival: epoch {card.provenance['epoch']}; {100 * judged.top1:.2f} % of the untouched held-out images right")
        if not self.told:
            epoch = int(card.provenance["epoch"])
            yield Evaluated(epoch, 0.0, judged.top1, seconds, net, judged.top5, mean_per_class=judged.mean_per_class)

    def begin(self) -> None:
        """Augmented training images, for the report."""
        x, y, _ = next(iter(self.batches.epoch(0)))
        y = y.argmax(1) if y.ndim == 2 else y  # of mixed images the label that has most of it
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
        pixels = (x[:SAMPLES].cpu() * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        write_samples(self.out, np.ascontiguousarray(pixels), y[:SAMPLES].cpu().numpy(), self.data.classes)


def _part(net: ConvNet, pictures: Pictures, preprocess: Preprocess, feeding: Feeding, at_a_time: int = 0) -> _Part:
    """at_a_time: images, where memory is short."""
    size, numbers = at_a_time or 256, list[Tensor]()
    mine = whole_batches(len(pictures), size, feeding.share)
    if not mine:
        return None
    part = pictures if len(mine) == len(pictures) else pictures.rows(torch.arange(mine.start, mine.stop))

    def batches() -> Iterator[Tensor]:
        for images, places in part.evaluation(preprocess, size, feeding):
            numbers.append(places + mine.start)
            yield images

    try:
        return predict_logits(net, batches()), torch.cat(numbers)
    except DataError as error:
        if numbers:
            raise
        return error  # others may have read theirs


def _judged(parts: Sequence[_Part], pictures: Pictures) -> _Judged:
    """Parts in the images' order. Raises DataError where none could be read."""
    read = [part for part in parts if isinstance(part, tuple)]
    if not read:
        raise next(part for part in parts if isinstance(part, DataError))
    logits, places = (torch.cat(rows) for rows in zip(*read, strict=True))
    labels = pictures.labels[places]
    right = logits.argmax(1).eq(labels).double()
    seen = torch.bincount(labels, minlength=logits.shape[1])
    by_class = torch.bincount(labels, right, minlength=logits.shape[1])[seen > 0] / seen[seen > 0]
    return _Judged(top_k_accuracy(logits, labels), top_k_accuracy(logits, labels, 5), float(by_class.mean()), logits, places)
