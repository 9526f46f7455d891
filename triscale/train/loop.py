"""The training loop: one explicit generator of typed events that its caller consumes.

Progress bars, logs, evaluation, saving and early stopping are consumers of the events, so the loop has no callbacks. It
takes batches and a loss, so classification and detection share it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from triscale.recipe import Recipe
from triscale.train.optim import clip, learning_rate
from triscale.train.plan import Plan
from triscale.train.state import TrainState


class BatchSource(Protocol):
    """What the loop reads: the number of batches in an epoch, and this process's share of the batches of epoch i from batch
    `start` on, as (inputs, targets) or (inputs, targets, numbers), the same whenever it is asked. `names`: of numbered samples."""

    def __len__(self) -> int: ...

    def epoch(self, index: int, start: int = 0) -> Iterator[Sequence[Any]]: ...

    def names(self, numbers: Any) -> list[str]: ...


class NonFiniteLossError(FloatingPointError):
    """The loss is infinite or not a number. The message names the step, the layer where it began and the samples."""


@dataclass(frozen=True)
class Step:
    """After each optimiser step. `step` counts from 1 over the whole run; `images` those of this process since its start.

    Seconds: of waiting for data, the forward and the backward pass, and the optimiser with the average.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    images: int
    data: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0


@dataclass(frozen=True)
class EpochEnd:
    """After each epoch, with the model's weights (the averaged ones, where the recipe has an average) ready to evaluate."""

    epoch: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Note:
    """Something that the user should know once."""

    text: str


Event = Step | EpochEnd | Note
Loss = Callable[[Any, Any], Tensor]


def fit(
    model: nn.Module,
    batches: BatchSource,
    loss_fn: Loss,
    recipe: Recipe,
    *,
    plan: Plan = Plan(),  # noqa: B008 - frozen
    state: TrainState | None = None,
    rank: int = 0,
    mean: Callable[[float], float] = lambda value: value,
) -> Iterator[Event]:
    """Trains `state.model` (`model` without its parallel wrapper) from `state.step` to the recipe's end, yielding a Step after
    every step and an EpochEnd after every epoch.

    While an EpochEnd is being consumed the model is in evaluation mode and, with recipe.ema, holds the averaged weights; after
    the last one it keeps them. `state` can be saved at any event. Every step begins with random numbers that its number, the
    seed and the rank decide, so a resumed run draws what an uninterrupted one draws. mean: of a loss over all processes.
    Raises NonFiniteLossError before the optimiser uses the gradient.
    """
    state = state or TrainState(model, recipe)
    step_of = _Stepper(model, state, loss_fn, recipe, plan)
    per_epoch = len(batches)
    steps, images = recipe.epochs * per_epoch, 0
    while state.epoch < recipe.epochs:
        epoch = state.epoch
        state.model.train()
        began = waited = time.perf_counter()
        for batch in batches.epoch(epoch, state.step - epoch * per_epoch):
            data = time.perf_counter() - waited
            lr = learning_rate(recipe, state.step, per_epoch)
            torch.manual_seed(zlib.crc32(f"{recipe.seed}/{state.step}/{rank}".encode()))
            loss, times = step_of(batch, lr)
            value = mean(loss)
            if value != value or value in (float("inf"), float("-inf")):
                raise NonFiniteLossError(_diagnosis(step_of, batch, batches, state.step, epoch, value, lr))
            optimizer = step_of.update(lr)
            state.step, state.loss_sum, images = state.step + 1, state.loss_sum + value, images + len(batch[1])
            yield from step_of.notes()
            yield Step(epoch, state.step, steps, value, lr, images, data, *times, optimizer)
            waited = time.perf_counter()
        if state.average:
            state.average.swap(state.model)
        state.model.eval()
        loss_mean, state.loss_sum, state.epoch = state.loss_sum / per_epoch, 0.0, epoch + 1
        yield EpochEnd(epoch, loss_mean, time.perf_counter() - began)
        if state.average and state.epoch < recipe.epochs:
            state.average.swap(state.model)
    if state.average and not state.average.swapped:  # resumed from its own end
        state.average.swap(state.model)
        state.model.eval()


class _Stepper:
    """One training step: forward and backward of the micro-batches, then `update`."""

    def __init__(self, model: nn.Module, state: TrainState, loss_fn: Loss, recipe: Recipe, plan: Plan) -> None:
        self.model, self.state, self.loss_fn, self.recipe, self.plan = model, state, loss_fn, recipe, plan
        self.device = torch.device(plan.device)
        self._notes: list[Note] = []
        self.run: Callable[[Any], Any] = model
        if plan.recompute:
            state.model.recompute = True  # type: ignore[assignment]
        if plan.compile:
            self.run = torch.compile(model, mode="reduce-overhead" if self.device.type == "cuda" else None)

    def notes(self) -> Iterator[Note]:
        while self._notes:
            yield self._notes.pop(0)

    def __call__(self, batch: Sequence[Any], lr: float) -> tuple[float, tuple[float, float]]:
        """(the batch's mean loss, (seconds of forward, of backward)); gradients are left on the parameters."""
        self.state.optimizer.zero_grad(set_to_none=True)
        n = len(batch[1])
        size = self.plan.micro_batch or n
        total, forward, backward = 0.0, 0.0, 0.0
        for start in range(0, n, size):
            x, y = (_to(part[start : start + size], self.device) for part in batch[:2])
            last = start + size >= n
            before = time.perf_counter()
            with nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync():  # type: ignore[operator]
                loss = self.loss(x, y) * (len(y) / n)
                value = loss.item()
                middle = time.perf_counter()
                torch.autograd.backward(loss)  # of a broken loss too: other processes wait for the gradients
            total, forward, backward = total + value, forward + middle - before, backward + time.perf_counter() - middle
        return total, (forward, backward)

    def loss(self, x: Any, y: Any) -> Tensor:
        with self.plan.autocast():
            out = self._forward(x)
        low = isinstance(out, Tensor) and out.dtype in (torch.bfloat16, torch.float16)
        return self.loss_fn(out.float() if low else out, y)

    def _forward(self, x: Any) -> Any:
        if self.run is self.model:
            return self.model(x)
        try:
            return self.run(x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's own, of which there are many
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            self._notes.append(Note(f"torch.compile failed, going on without it: {reason}"))
            self.run = self.model
            return self.model(x)

    def update(self, lr: float) -> float:
        """The optimiser's step and the average's; returns the seconds."""
        before, state = time.perf_counter(), self.state
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        if self.recipe.clip:
            clip(state.model.parameters(), self.recipe.clip)
        state.optimizer.step()
        if state.average:
            state.average.update(state.model)
        return time.perf_counter() - before


def _to(part: Any, device: torch.device) -> Any:
    return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part


def _diagnosis(step_of: _Stepper, batch: Sequence[Any], batches: BatchSource, step: int, epoch: int, value: float, lr: float) -> str:
    """Where it went wrong: the same step once more, each module's output looked at; and the samples whose own input is broken."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    model = step_of.state.model
    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name and not list(m.children())]
    x = _to(batch[0], step_of.device)
    torch.manual_seed(zlib.crc32(f"{step_of.recipe.seed}/{step}/0".encode()))
    try:
        with torch.no_grad():
            step_of.model(x)
    finally:
        for hook in hooks:
            hook.remove()
    weights = next((n for n, p in model.named_parameters() if not bool(p.isfinite().all())), "")
    broken = [i for i in range(len(x)) if not bool(x[i].isfinite().all())] if isinstance(x, Tensor) else []
    where = f"the weights of {weights}" if weights else "the input" if broken else f"the output of {found[0]}" if found else "the loss itself"
    names: list[str] = []
    if len(batch) > 2:
        names = batches.names(batch[2])
        names = [names[i] for i in broken] or names
    listed = f"; of {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else ""
    advice = "" if broken else "; a lower rate may help"
    return f"loss is {value} at step {step + 1} of epoch {epoch + 1}, learning rate {lr:.3g}: first not finite is {where}{listed}{advice}"


def cross_entropy(label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross entropy of logits (N, classes) and labels (N,), with label smoothing."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return loss
