"""Training a classifier: the run and its folder.

A run folder holds recipe.json, log.jsonl, samples.npz and held_out.npz (for the report), model.safetensors (the last finished
epoch, or with a minival the best on it) and states/ to resume from. The accuracy is that of the model in the file, on images
that took no part in any choice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triscale.architecture import Arch
from triscale.classify.events import Evaluated, Resumed, ResumeError, Running, Saved, Stopped
from triscale.classify.pictures import Data, Feeding, Pictures
from triscale.classify.start import Start, start_from
from triscale.data.datasets import Splits
from triscale.evaluate import predict_logits, top_k_accuracy
from triscale.files import write_text
from triscale.model import ConvNet
from triscale.recipe import Preprocess, Recipe
from triscale.run_log import RunLog, write_held_out, write_samples
from triscale.train.advprop import PGD, without_auxiliary_norms
from triscale.train.checkpoint import Checkpoints, differences
from triscale.train.dist import (
    World,
    any_true,
    average_buffers,
    everyones,
    full_state,
    load_full_state,
    local_batch,
    mean,
    parallel,
    same_everywhere,
    sharded,
    world,
)
from triscale.train.loop import BatchSource, EpochEnd, Note, Step, cross_entropy, fit
from triscale.train.plan import Plan
from triscale.train.state import TrainState
from triscale.train.syncnorm import ghost_norms, norm_groups, share_norms
from triscale.version import __version__
from triscale.weights.model_file import ModelCard, save_model

STATES = "states"  # the folder of checkpoints in a run folder
SAMPLES = 24  # augmented training images that the report shows


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
                judged = _accuracy(net, data.held_out, preprocess, feeding, plan.micro_batch)
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
        run = _Run(out, Data.of(data), arch, preprocess, recipe, name, running, start, here)
        try:
            yield from run.events()
        finally:
            run.data.close()


class _Run:
    """One run in one process."""

    def __init__(
        self, out: Path, data: Data, arch: Arch, preprocess: Preprocess, recipe: Recipe, name: str, running: Running, start: Start | None, here: World
    ) -> None:
        self.out, self.preprocess, self.recipe, self.running, self.here = out, preprocess, recipe, running, here
        self.arch, self.name, self.plan = arch, name, replace(running.plan, device=str(here.device))
        self.writes = here.rank == 0
        self.feeding = Feeding(running.workers, running.broken_share, (here.rank, here.size), str(here.device))
        data.check_labels()
        identity = {"recipe": recipe.to_dict(), "arch": json.loads(arch.to_json()), "preprocess": preprocess.to_dict()}
        identity |= {"classes": list(data.classes), "data": data.fingerprint(), "streamed": data.streamed}  # another decoder, other pixels
        self.data, self.chosen_by = data.without_minival(recipe.minival) if recipe.minival else (data, data.held_out)
        network = start_from(arch, data.classes, preprocess.channels, recipe, start)
        if start:
            identity["weights"] = network.weights
        self.weights = start.label if start else ""
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        same_everywhere(json.dumps(self.identity), here)
        self.net: ConvNet = self._norms(network.net.to(here.device))  # type: ignore[assignment]
        build = (lambda kind, groups, **o: sharded(kind, groups, here, **o)) if running.shard else None
        self.state = TrainState(self.net, recipe, build, network.prepare, PGD.of(recipe, preprocess) if recipe.advprop else None)
        self.best, self.seconds, self.told, self.reserved, self.otherwise = -1.0, 0.0, False, False, ""
        self.noted: set[str] = set()

    def _norms(self, net: ConvNet) -> torch.nn.Module:
        """Batch norms over as many images as the recipe says, or processes as the official code has."""
        share = local_batch(min(self.recipe.batch_size, len(self.data.train)), self.here)
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
        batches = self.data.train.batches(self.preprocess, self.recipe, len(self.data.classes), self.feeding)
        with Checkpoints(self.out / STATES, keep=self.running.keep) as states:
            resumed = self._resume(states) if self.running.resume else None
            same_everywhere(f"step {self.state.step}", self.here)
            if not self.writes:
                for _ in self._fit(batches, None, states):
                    pass
                self.data.share(lambda texts: everyones(texts, self.here))
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
                    yield from self._noted(log)
                yield from self._fit(batches, log, states)
                self.data.share(lambda texts: everyones(texts, self.here))
                yield from self._noted(log)

    def _fit(self, batches: BatchSource, log: RunLog | None, states: Checkpoints) -> Iterator[Step | Evaluated | Saved | Note]:
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
                    yield from self._noted(log)
                self._save(states, log)
            else:
                if log:
                    log.note(event.text)
                yield event
        if self.writes and log:
            yield from self._finish(log)

    def _join(self) -> None:
        """Running statistics, and the average's, become their mean over the processes: what is evaluated and saved is the same in
        all, so that those who go on from it stand where these stand. And all know which images none could read."""
        if self.here.size == 1:
            return
        self.data.share(lambda texts: everyones(texts, self.here))
        average_buffers(self.net, self.here)
        if self.state.average:
            self.state.average.swap(self.net)
            average_buffers(self.net, self.here)
            self.state.average.swap(self.net)

    def _evaluate(self, event: EpochEnd, log: RunLog) -> Iterator[Evaluated | Saved]:
        """Accuracy, and the model file where this model is the one to keep."""
        judged = _accuracy(self.net, self.chosen_by, self.preprocess, self.feeding, self.plan.micro_batch)
        top1, top5, by_class = judged.top1, judged.top5, judged.mean_per_class
        epoch, on = event.epoch + 1, "minival" if self.recipe.minival else "held-out"
        log.epoch(epoch=epoch, step=self.state.step, loss=event.loss, seconds=self.seconds, top1=top1, top5=top5, mean_per_class=by_class)
        self.told = not self.recipe.minival
        yield Evaluated(epoch, event.loss, top1, self.seconds, self.net, top5, on, by_class)
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

    def _finish(self, log: RunLog) -> Iterator[Evaluated]:
        """The final number: the model in the file on the untouched images."""
        from triscale.weights.model_file import load_model

        net, card = load_model(self.out / "model.safetensors")
        held_out = self.data.held_out
        net = net.to(self.here.device).to(memory_format=torch.channels_last)
        judged = _accuracy(net, held_out, self.preprocess, self.feeding, self.plan.micro_batch)
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
            yield Evaluated(epoch, 0.0, judged.top1, self.seconds, net, judged.top5, mean_per_class=judged.mean_per_class)

    def _noted(self, log: RunLog) -> Iterator[Note]:
        """What reading the images has met since this was last asked."""
        data = self.data
        said = [*data.train.notes, *data.held_out.notes, *(f"left out: {reason}" for reason in data.left_out())]
        for text in said:
            if text not in self.noted:
                self.noted.add(text)
                log.note(text)
                yield Note(text)

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
        about["recipe"] = Recipe.from_dict(about["recipe"]).to_dict()  # fields that came after the checkpoint have their defaults
        about.setdefault("streamed", False)
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

    def _samples(self, batches: BatchSource) -> None:
        x, y, _ = next(iter(batches.epoch(0)))
        y = y.argmax(1) if y.ndim == 2 else y  # of mixed images the label that has most of it
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
        pixels = (x[:SAMPLES].cpu() * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        write_samples(self.out, np.ascontiguousarray(pixels), y[:SAMPLES].cpu().numpy(), self.data.classes)


def _accuracy(net: ConvNet, pictures: Pictures, preprocess: Preprocess, feeding: Feeding, at_a_time: int = 0) -> _Judged:
    """at_a_time: images, where memory is short."""
    numbers: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for images, places in pictures.evaluation(preprocess, at_a_time or 256, feeding):
            numbers.append(places)
            yield images

    logits = predict_logits(net, batches())
    places = torch.cat(numbers)
    labels = pictures.labels[places]
    right = logits.argmax(1).eq(labels).double()
    seen = torch.bincount(labels, minlength=logits.shape[1])
    by_class = torch.bincount(labels, right, minlength=logits.shape[1])[seen > 0] / seen[seen > 0]
    return _Judged(top_k_accuracy(logits, labels), top_k_accuracy(logits, labels, 5), float(by_class.mean()), logits, places)
