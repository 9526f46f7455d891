"""The training loop: one explicit generator of typed events that its caller consumes.

Progress bars, logs, evaluation, saving and early stopping are consumers of the events, so the loop has no callbacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from triscale.recipe import Recipe
from triscale.train.optim import WeightAverage, learning_rate, make_optimizer


class BatchSource(Protocol):
    """What the loop reads: the number of batches in an epoch, and the batches of epoch i."""

    def __len__(self) -> int: ...

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class NonFiniteLossError(FloatingPointError):
    """The loss is infinite or not a number."""


@dataclass(frozen=True)
class Step:
    """After each optimiser step. `step` counts from 1 over the whole run; `images` since its start."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    images: int


@dataclass(frozen=True)
class EpochEnd:
    """After each epoch, with the model's weights (the averaged ones, where the recipe has an average) ready to evaluate."""

    epoch: int
    loss: float
    seconds: float


Event = Step | EpochEnd


def fit(model: nn.Module, batches: BatchSource, loss_fn: Callable[[Tensor, Tensor], Tensor], recipe: Recipe) -> Iterator[Event]:
    """Trains `model` in place by `recipe`, yielding a Step after every step and an EpochEnd after every epoch.

    While an EpochEnd is being consumed the model is in evaluation mode and, with recipe.ema, holds the averaged weights;
    after the last one it keeps them. Raises NonFiniteLossError with the step, before the optimiser uses the gradient.
    """
    optimizer = make_optimizer(model, recipe)
    average = WeightAverage(model, recipe.ema) if recipe.ema else None
    device = next(model.parameters()).device
    steps, step, images = recipe.epochs * len(batches), 0, 0
    for epoch in range(recipe.epochs):
        model.train()
        start, total = time.perf_counter(), 0.0
        for x, y in batches.epoch(epoch):
            lr = learning_rate(recipe, step, len(batches))
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = loss_fn(model(x.to(device, non_blocking=True)), y.to(device, non_blocking=True))
            value = loss.item()
            if value != value or value in (float("inf"), float("-inf")):
                raise NonFiniteLossError(f"loss is {value} at step {step + 1} of epoch {epoch + 1}, learning rate {lr:.3g}; a lower rate may help")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            if average:
                average.update(model)
            step, images, total = step + 1, images + len(x), total + value
            yield Step(epoch, step, steps, value, lr, images)
        if average:
            average.swap(model)
        model.eval()
        yield EpochEnd(epoch, total / len(batches), time.perf_counter() - start)
        if average and epoch + 1 < recipe.epochs:
            average.swap(model)


def cross_entropy(label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross entropy of logits (N, classes) and labels (N,), with label smoothing."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return loss
