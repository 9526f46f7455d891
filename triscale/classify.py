"""Training a classifier: data set, network and recipe in, a run folder out.

A run folder holds recipe.json, log.jsonl, samples.npz and held_out.npz (for the report), model.safetensors (the last finished
epoch, or with a minival the best on it) and states/ to resume from. The accuracy is that of the model in the file, on images
that took no part in any choice.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triscale.architecture import Arch
from triscale.data.datasets import ImageData, Splits
from triscale.data.loader import Batches, evaluation_batches
from triscale.evaluate import predict_logits, top_k_accuracy
from triscale.files import write_text
from triscale.model import ConvNet, build
from triscale.recipe import Preprocess, Recipe
from triscale.run_log import RunLog, write_held_out, write_samples
from triscale.train.checkpoint import Checkpoints, differences
from triscale.train.dist import (
    World,
    any_true,
    average_buffers,
    full_state,
    load_full_state,
    local_batch,
    mean,
    parallel,
    same_everywhere,
    sharded,
    world,
)
from triscale.train.loop import EpochEnd, Note, Step, cross_entropy, fit
from triscale.train.plan import Plan
from triscale.train.state import TrainState
from triscale.train.syncnorm import ghost_norms, norm_groups, share_norms
from triscale.version import __version__
from triscale.weights.model_file import ModelCard, save_model

STATES = "states"  # the folder of checkpoints in a run folder
SAMPLES = 24  # augmented training images that the report shows


class ResumeError(ValueError):
    """A run that can't go on from its checkpoint: the message says what differs."""


class Stopped(KeyboardInterrupt):
    """Stopped on request, after a whole step; the state is saved. `step` counts from 1."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


@dataclass(frozen=True)
class Evaluated:
    """The accuracy after an epoch (counted from 1), with the model that reached it. on: which images."""

    epoch: int
    train_loss: float
    top1: float
    seconds: float
    net: ConvNet
    top5: float = 0.0
    on: str = "held-out"


@dataclass(frozen=True)
class Saved:
    """A model file that now stands whole."""

    epoch: int
    path: Path


@dataclass(frozen=True)
class Resumed:
    """The run goes on from this step, of epoch `epoch` (from 1)."""

    step: int
    epoch: int


@dataclass(frozen=True)
class Running:
    """How a run is carried out. None of it changes what is learnt, but as Plan says.

    workers: threads that prepare batches. save_every: steps between checkpoints beside those at the epochs' ends; 0: none.
    keep: checkpoints. resume: from the newest whole one, if there is one. shard: the optimiser's state over
    the processes. stop: asked after each step.
    """

    plan: Plan = field(default_factory=Plan)
    workers: int = 0
    save_every: int = 0
    keep: int = 2
    resume: bool = False
    shard: bool = False
    tensorboard: bool = False
    stop: Callable[[], bool] = lambda: False


def preprocess_for(size: int, channels: int) -> Preprocess:
    """The official evaluation crop from 96 px on; smaller images are taken whole. Grey images: mean and std one half."""
    padding = 32 if size >= 96 else 0
    return Preprocess(size, padding) if channels == 3 else Preprocess(size, padding, mean=(127.5,), std=(127.5,))


def train_classifier(splits: Splits, arch: Arch, preprocess: Preprocess, recipe: Recipe, *, evaluate_every: int = 1) -> Iterator[Step | Evaluated]:
    """Trains from scratch in this process, yielding each Step and, every so many epochs and after the last, an Evaluated.

    The same arguments, seed and number of threads give the same numbers on the same machine.
    """
    torch.manual_seed(recipe.seed)
    net = build(arch, len(splits.classes), preprocess.channels).to(memory_format=torch.channels_last)
    batches = Batches(splits.train.images, splits.train.labels, preprocess, recipe)
    start = time.perf_counter()
    for event in fit(net, batches, cross_entropy(recipe.label_smoothing), recipe):
        if isinstance(event, EpochEnd):
            epoch = event.epoch + 1
            if epoch % evaluate_every == 0 or epoch == recipe.epochs:
                top1, top5, _ = _accuracy(net, splits.held_out, preprocess)
                yield Evaluated(epoch, event.loss, top1, time.perf_counter() - start, net, top5)
        elif isinstance(event, Step):
            yield event


def run_folder(
    out: Path,
    splits: Splits,
    arch: Arch,
    preprocess: Preprocess,
    recipe: Recipe,
    data: str,
    running: Running | None = None,
) -> Iterator[Step | Evaluated | Saved | Resumed | Note]:
    """Trains with the run folder written as it goes, in as many processes as torchrun started; process 0 writes.

    Raises ResumeError where the checkpoint is of another recipe, network or data; Stopped when asked to; OSError where the
    folder can't be written.
    """
    check(recipe)
    running = running or Running()
    with world(running.plan.device) as here:
        yield from _Run(out, splits, arch, preprocess, recipe, data, running, here).events()


def check(recipe: Recipe) -> None:
    """Raises ValueError for what a recipe asks for and isn't there yet: never trained without it in silence."""
    missing = [f"--augment {recipe.augment}"] if recipe.augment != "none" else []
    missing += ["--advprop"] if recipe.advprop else []
    if missing:
        raise ValueError(f"the recipe asks for {' and '.join(missing)}, which this version doesn't have; --augment none --no-advprop trains without")


class _Run:
    """One run in one process."""

    def __init__(
        self, out: Path, splits: Splits, arch: Arch, preprocess: Preprocess, recipe: Recipe, data: str, running: Running, here: World
    ) -> None:
        self.out, self.splits, self.preprocess, self.recipe, self.running, self.here = out, splits, preprocess, recipe, running, here
        self.arch, self.data, self.plan = arch, data, replace(running.plan, device=str(here.device))
        self.writes = here.rank == 0
        _check_labels(splits)
        self.train, self.chosen_by = (splits.train, splits.held_out) if not recipe.minival else _minival(splits.train, recipe.minival)
        identity = {"recipe": recipe.to_dict(), "arch": json.loads(arch.to_json()), "preprocess": preprocess.to_dict()}
        identity |= {"classes": list(splits.classes), "data": _fingerprint(splits)}
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        same_everywhere(json.dumps(self.identity), here)
        torch.manual_seed(recipe.seed)
        net = build(arch, len(splits.classes), preprocess.channels).to(here.device).to(memory_format=torch.channels_last)
        self.net: ConvNet = self._norms(net)  # type: ignore[assignment]
        self.state = TrainState(self.net, recipe, (lambda kind, groups, **o: sharded(kind, groups, here, **o)) if running.shard else None)
        self.best, self.seconds, self.told, self.reserved, self.otherwise = -1.0, 0.0, False, False, ""

    def _norms(self, net: ConvNet) -> torch.nn.Module:
        """Batch norms over as many images as the recipe says, or processes as the official code has."""
        share = local_batch(min(self.recipe.batch_size, len(self.train)), self.here)
        together = min(self.plan.micro_batch or share, share)  # images that a process computes at a time
        wanted = self.recipe.norm_batch or together * norm_groups(self.here.size)
        self.identity["images a norm"] = wanted
        if wanted > together:
            if wanted % together or wanted // together > self.here.size:
                most = f"{self.here.size} x {together} at a time" if self.here.size > 1 else f"{together} at a time"
                raise ValueError(f"--norm-batch {wanted}: expected a multiple of {together} within the images computed together, {most}")
            return share_norms(net, self.here, wanted // together)
        return ghost_norms(net, wanted) if wanted < together else net

    def events(self) -> Iterator[Step | Evaluated | Saved | Resumed | Note]:
        names = self.train.names
        workers, share = self.running.workers, (self.here.rank, self.here.size)
        batches = Batches(self.train.images, self.train.labels, self.preprocess, self.recipe, names=names, workers=workers, share=share)
        with Checkpoints(self.out / STATES, keep=self.running.keep) as states:
            resumed = self._resume(states) if self.running.resume else None
            same_everywhere(f"step {self.state.step}", self.here)
            if not self.writes:
                for _ in self._fit(batches, None, states):
                    pass
                return
            write_text(self.out / "recipe.json", json.dumps(self.recipe.to_dict(), indent=1))
            write_text(self.out / "arch.json", self.arch.to_json())
            with RunLog(self.out, tensorboard=self.running.tensorboard, steps_per_epoch=len(batches)) as log:
                if resumed:
                    log.resumed(self.state.step)
                    if self.otherwise:
                        log.note(self.otherwise)
                        yield Note(self.otherwise)
                    yield resumed
                else:
                    self._samples(batches)
                    left_out = self.splits.train.left_out + self.splits.held_out.left_out
                    for reason in left_out:
                        log.note(f"left out: {reason}")
                yield from self._fit(batches, log, states)

    def _fit(self, batches: Batches, log: RunLog | None, states: Checkpoints) -> Iterator[Step | Evaluated | Saved | Note]:
        start = time.perf_counter() - self.seconds
        model = parallel(self.net, self.here)
        loss_mean = (lambda v: mean([v], self.here)[0]) if self.here.size > 1 else (lambda v: v)
        loss = cross_entropy(self.recipe.label_smoothing)
        for event in fit(model, batches, loss, self.recipe, plan=self.plan, state=self.state, rank=self.here.rank, mean=loss_mean):
            self.seconds = time.perf_counter() - start
            if isinstance(event, Step):
                if log:
                    log.step(
                        epoch=event.epoch, step=event.step, steps=event.steps, loss=event.loss, lr=event.lr, images=event.images * self.here.size,
                        data_s=event.data, forward_s=event.forward, backward_s=event.backward, optimiser_s=event.optimizer,
                    )  # fmt: skip
                if self.writes and not self.reserved:
                    self.reserved = True
                    states.reserve(self.state.tensors({"state": {}} if self.running.shard else None))
                yield event
                stopping = any_true(self.running.stop(), self.here)
                if stopping or (self.running.save_every and event.step % self.running.save_every == 0 and event.step % len(batches)):
                    self._join()
                    self._save(states, log, wait=stopping)
                if stopping:
                    raise Stopped(event.step)
            elif isinstance(event, EpochEnd):
                self._join()
                if self.writes and log:
                    yield from self._evaluate(event, log)
                self._save(states, log)
            else:
                if log:
                    log.note(event.text)
                yield event
        if self.writes and log:
            yield from self._finish(log)

    def _join(self) -> None:
        """Running statistics, and the average's, become their mean over the processes: what is evaluated and saved is the same in
        all, so that those who go on from it stand where these stand."""
        if self.here.size == 1:
            return
        average_buffers(self.net, self.here)
        if self.state.average:
            self.state.average.swap(self.net)
            average_buffers(self.net, self.here)
            self.state.average.swap(self.net)

    def _evaluate(self, event: EpochEnd, log: RunLog) -> Iterator[Evaluated | Saved]:
        """Accuracy, and the model file where this model is the one to keep."""
        top1, top5, _ = _accuracy(self.net, self.chosen_by, self.preprocess, self.plan.micro_batch)
        epoch, on = event.epoch + 1, "minival" if self.recipe.minival else "held-out"
        log.epoch(epoch=epoch, step=self.state.step, loss=event.loss, seconds=self.seconds, top1=top1, top5=top5)
        self.told = not self.recipe.minival
        yield Evaluated(epoch, event.loss, top1, self.seconds, self.net, top5, on)
        if self.recipe.minival and top1 <= self.best:
            return
        self.best = top1
        path = self.out / "model.safetensors"
        provenance = {"data": self.data, "held_out": self.splits.held_out_is, "epoch": epoch, "triscale": __version__}
        provenance["recipe"] = self.recipe.to_dict()
        measured = {"minival_top1" if self.recipe.minival else "top1": top1}
        save_model(path, self.net, ModelCard(self.arch, self.preprocess, self.splits.classes, provenance, measured))
        log.saved(self.state.step, path)
        yield Saved(epoch, path)

    def _finish(self, log: RunLog) -> Iterator[Evaluated]:
        """The final number: the model in the file on the untouched images."""
        from triscale.weights.model_file import load_model

        net, card = load_model(self.out / "model.safetensors")
        held_out = self.splits.held_out
        net = net.to(self.here.device).to(memory_format=torch.channels_last)
        top1, top5, logits = _accuracy(net, held_out, self.preprocess, self.plan.micro_batch)
        pictures = held_out.images.permute(0, 2, 3, 1)
        write_held_out(self.out, logits.numpy(), held_out.labels.numpy(), held_out.names, lambda rows: [pictures[i].numpy() for i in rows])
        if self.recipe.minival:
            save_model(self.out / "model.safetensors", net, replace(card, measured={**card.measured, "top1": top1}))
            log.note(f"chosen on the minival: epoch {card.provenance['epoch']}; {100 * top1:.2f} % of the untouched held-out images right")
        if not self.told:
            yield Evaluated(int(card.provenance["epoch"]), 0.0, top1, self.seconds, net, top5)

    def _save(self, states: Checkpoints, log: RunLog | None, *, wait: bool = False) -> None:
        whole = full_state(self.state.optimizer, self.here) if self.running.shard else None  # every process takes part
        if self.writes:
            about = {**self.identity, "numbers": self.state.numbers(), "best": self.best, "seconds": self.seconds, "under": self._under()}
            states.save(self.state.step, self.state.tensors(whole), about, wait=wait)
            if log:
                log.saved(self.state.step, f"state-{self.state.step:08d}.safetensors")

    def _resume(self, states: Checkpoints) -> Resumed | None:
        found = states.newest()
        if found is None:
            if any((self.out / STATES).glob("state-*.safetensors")):
                raise ResumeError(f"{self.out / STATES}: no whole checkpoint in it")
            return None
        path, tensors, about = found
        different = differences({k: about.get(k) for k in self.identity}, self.identity)
        if different:
            raise ResumeError(f"{path}: of another training ({'; '.join(different[:5])}); resume it as it was, or give another --out")
        into = (lambda state: load_full_state(self.state.optimizer, state)) if self.running.shard else None
        self.state.load(tensors, about["numbers"], into)
        self.best, self.seconds = about["best"], about["seconds"]
        other = differences(about.get("under", {}), self._under())
        self.otherwise = f"going on under other conditions, so not bit for bit: {'; '.join(other)}" if other else ""
        return Resumed(self.state.step, self.state.epoch + 1)

    def _under(self) -> dict[str, Any]:
        """What changes the last bits of what is computed."""
        threads = torch.get_num_threads() if self.here.device.type == "cpu" else 0
        return {"processes": self.here.size, "threads": threads, "bfloat16": self.plan.bfloat16, "device": self.here.device.type}

    def _samples(self, batches: Batches) -> None:
        x, y, _ = next(batches.epoch(0))
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
        pixels = (x[:SAMPLES] * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        write_samples(self.out, np.ascontiguousarray(pixels), y[:SAMPLES].numpy(), self.splits.classes)


def _check_labels(splits: Splits) -> None:
    """Raises ValueError for a label that no class has, with its file."""
    for part in (splits.train, splits.held_out):
        wrong = ((part.labels < 0) | (part.labels >= len(splits.classes))).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(f"{part.names[i]}: label {int(part.labels[i])}, expected 0 to {len(splits.classes) - 1} ({len(wrong)} such images)")


def _accuracy(net: ConvNet, images: ImageData, preprocess: Preprocess, at_a_time: int = 0) -> tuple[float, float, Tensor]:
    """(top-1, top-5, logits). at_a_time: images, where memory is short."""
    logits = predict_logits(net, evaluation_batches(images.images, preprocess, at_a_time or 256))
    return top_k_accuracy(logits, images.labels), top_k_accuracy(logits, images.labels, 5), logits


def _minival(train: ImageData, share: float) -> tuple[ImageData, ImageData]:
    """The training images without a fixed random share of them, and that share: at least one image."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    count = min(len(train) - 1, max(1, round(share * len(train))))
    return _rows(train, order[count:].sort().values), _rows(train, order[:count].sort().values)


def _rows(data: ImageData, rows: Tensor) -> ImageData:
    return ImageData(data.images[rows], data.labels[rows], tuple(data.names[i] for i in rows.tolist()))


def _fingerprint(splits: Splits) -> dict[str, Any]:
    """What tells one data set from another: counts, and a sum over the names and labels of all images."""
    both = (splits.train, splits.held_out)
    lines = "\n".join(f"{name}\t{label}" for part in both for name, label in zip(part.names, part.labels.tolist(), strict=True))
    return {"train": len(splits.train), "held_out": len(splits.held_out), "files": f"{zlib.crc32(lines.encode()):08x}"}
