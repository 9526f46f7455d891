"""A training carried out in its folder: log, states to resume from, processes. What is trained and how it is judged is a Task's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from triscale.files import write_text
from triscale.recipe import Recipe
from triscale.train.checkpoint import Checkpoints, differences
from triscale.train.dist import World, any_true, average_buffers, everyones, full_state, load_full_state, local_batch, mean, parallel, same_everywhere
from triscale.train.events import Resumed, ResumeError, Running, Stopped
from triscale.train.loop import BatchSource, EpochEnd, Event, Loss, Note, Step, fit
from triscale.train.plan import Plan
from triscale.train.state import TrainState
from triscale.train.syncnorm import ghost_norms, norm_groups, share_norms

STATES = "states"  # the folder of checkpoints in a run folder


class Log(Protocol):
    """What a run writes as it goes; `run_log.RunLog` is one."""

    def step(self, **values: Any) -> None: ...

    def saved(self, step: int, path: str | Path) -> None: ...

    def resumed(self, step: int) -> None: ...

    def note(self, text: str) -> None: ...


class Task(Protocol):
    """What a run trains.

    identity: what a resumed run has to agree in, as JSON. best: the score of the model to keep, kept over a resume.
    files: written into the folder at the start. `renewed`, `share`, `judge` and `judge_kept` are called in every process, the other
    methods in process 0 alone.
    """

    best: float

    @property
    def state(self) -> TrainState: ...

    @property
    def batches(self) -> BatchSource: ...

    @property
    def loss(self) -> Loss: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def files(self) -> dict[str, str]: ...

    def begin(self) -> None:
        """Before the first step of a new run."""

    def renewed(self, about: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint says, with what older versions didn't write yet."""

    def said(self) -> Iterable[str]:
        """What the user should know by now; the run tells each line once."""

    def share(self, everyones: Callable[[list[str]], list[str]]) -> None:
        """All processes then know what any of them could not read."""

    def judge(self) -> Any:
        """After an epoch, with the weights to judge, the same in all processes: each sees its part of the images. What all found, in
        process 0; None in the others."""

    def evaluate(self, judged: Any, event: EpochEnd, log: Any, seconds: float) -> Iterator[Any]:
        """judged: by `judge`. Yields events, and saves the model. seconds: of training."""

    def judge_kept(self) -> Any:
        """After the last epoch, as `judge`, of the model in the file, which process 0 alone may see."""

    def finish(self, judged: Any, log: Any, seconds: float) -> Iterator[Any]:
        """judged: by `judge_kept`."""


def arrange_norms(net: nn.Module, images: int, recipe: Recipe, plan: Plan, here: World) -> int:
    """Batch norms, in place, over as many images as the recipe says, or processes as the official code has; returns that number.

    images: of a step's batch, over all processes. Raises ValueError for a number that can't be put together.
    """
    share = local_batch(images, here)
    together = min(plan.micro_batch or share, share)  # images that a process computes at a time
    wanted = recipe.norm_batch or together * norm_groups(here.size)
    if wanted > together:
        if wanted % together or wanted // together > here.size:
            most = f"{here.size} x {together} at a time" if here.size > 1 else f"{together} at a time"
            raise ValueError(f"--norm-batch {wanted}: expected a multiple of {together} within the images computed together, {most}")
        share_norms(net, here, wanted // together)
    elif wanted < together:
        ghost_norms(net, wanted)
    return wanted


class Run:
    """One run in one process; process 0 writes.

    open_log: the log's context manager for so many steps an epoch. Raises ResumeError where the checkpoint is of another training.
    """

    def __init__(
        self, out: Path, task: Task, recipe: Recipe, running: Running, here: World, open_log: Callable[[int], AbstractContextManager[Any]]
    ) -> None:
        self.out, self.task, self.recipe, self.running, self.here, self.open_log = out, task, recipe, running, here, open_log
        self.plan, self.state, self.writes = running.plan, task.state, here.rank == 0
        self.identity: dict[str, Any] = json.loads(json.dumps(task.identity))
        same_everywhere(json.dumps(self.identity), here)
        self.seconds, self.reserved, self.otherwise = 0.0, False, ""
        self.noted: set[str] = set()

    def events(self) -> Iterator[Any]:
        """The run from its start or its newest checkpoint to the end: Step, Note, Resumed, and what the task yields.

        Raises Stopped when asked to, OSError where the folder can't be written.
        """
        with Checkpoints(self.out / STATES, keep=self.running.keep) as states:
            resumed = self._resume(states) if self.running.resume else None
            same_everywhere(f"step {self.state.step}", self.here)
            if not self.writes:
                for _ in self._fit(None, states):
                    pass
                self._share()
                return
            for name, text in self.task.files.items():
                write_text(self.out / name, text)
            with self.open_log(len(self.task.batches)) as log:
                if resumed:
                    log.resumed(self.state.step)
                    if self.otherwise:
                        log.note(self.otherwise)
                        yield Note(self.otherwise)
                    yield resumed
                else:
                    self.task.begin()
                    yield from self._noted(log)
                yield from self._fit(log, states)
                self._share()
                yield from self._noted(log)

    def _fit(self, log: Log | None, states: Checkpoints) -> Iterator[Any]:
        start, task = time.perf_counter() - self.seconds, self.task
        model = parallel(self.state.model, self.here)
        loss_mean = (lambda v: mean([v], self.here)[0]) if self.here.size > 1 else (lambda v: v)
        for event in fit(model, task.batches, task.loss, self.recipe, plan=self.plan, state=self.state, rank=self.here.rank, mean=loss_mean):
            self.seconds = time.perf_counter() - start
            if isinstance(event, Step):
                yield from self._stepped(event, log, states)
            elif isinstance(event, EpochEnd):
                yield from self._evaluated(event, log)
                self._save(states, log)
            else:
                if log:
                    log.note(event.text)
                yield event
        judged = task.judge_kept()
        if self.writes and log:
            yield from task.finish(judged, log, self.seconds)

    def _evaluated(self, event: EpochEnd, log: Log | None) -> Iterator[Any]:
        self._join()
        judged = self.task.judge()
        self._share()
        if self.writes and log:
            yield from self.task.evaluate(judged, event, log, self.seconds)
            yield from self._noted(log)

    def _stepped(self, event: Step, log: Log | None, states: Checkpoints) -> Iterator[Event]:
        if log:
            log.step(
                epoch=event.epoch, step=event.step, steps=event.steps, loss=event.loss, lr=event.lr, images=event.images * self.here.size,
                data_s=event.data, forward_s=event.forward, backward_s=event.backward, optimiser_s=event.optimizer,
            )  # fmt: skip
        if self.writes and not self.reserved:
            self.reserved = True
            states.reserve(self.state.tensors({"state": {}} if self.running.shard else None))
        yield event
        stopping, per_epoch = any_true(self.running.stop(), self.here), len(self.task.batches)
        if stopping or (self.running.save_every and event.step % self.running.save_every == 0 and event.step % per_epoch):
            self._join()
            self._save(states, log, wait=stopping)
        if stopping:
            raise Stopped(event.step)

    def _join(self) -> None:
        """Running statistics, and the average's, become their mean over the processes: what is evaluated and saved is the same in
        all, so that those who go on from it stand where these stand."""
        if self.here.size == 1:
            return
        average_buffers(self.state.model, self.here)
        if self.state.average:
            self.state.average.swap(self.state.model)
            average_buffers(self.state.model, self.here)
            self.state.average.swap(self.state.model)

    def _share(self) -> None:
        """What any process could not read, in training or evaluation, all then know."""
        self.task.share(lambda texts: everyones(texts, self.here))

    def _noted(self, log: Log) -> Iterator[Note]:
        """What the task has said since it was last asked."""
        for text in self.task.said():
            if text not in self.noted:
                self.noted.add(text)
                log.note(text)
                yield Note(text)

    def _save(self, states: Checkpoints, log: Log | None, *, wait: bool = False) -> None:
        whole = full_state(self.state.optimizer, self.here) if self.running.shard else None  # every process takes part
        if self.writes:
            about = {**self.identity, "numbers": self.state.numbers(), "best": self.task.best, "seconds": self.seconds, "under": self._under()}
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
        about = self.task.renewed(about)
        different = differences({k: about.get(k) for k in self.identity}, self.identity)
        if different:
            raise ResumeError(f"{path}: of another training ({'; '.join(different[:5])}); resume it as it was, or give another --out")
        into = (lambda state: load_full_state(self.state.optimizer, state)) if self.running.shard else None
        self.state.load(tensors, about["numbers"], into)
        self.task.best, self.seconds = about["best"], about["seconds"]
        other = differences(about.get("under", {}), self._under())
        self.otherwise = f"going on under other conditions, so not bit for bit: {'; '.join(other)}" if other else ""
        return Resumed(self.state.step, self.state.epoch + 1)

    def _under(self) -> dict[str, Any]:
        """What changes the last bits of what is computed."""
        threads = torch.get_num_threads() if self.here.device.type == "cpu" else 0
        return {"processes": self.here.size, "threads": threads, "bfloat16": self.plan.bfloat16, "device": self.here.device.type}
