"""The training loop: one explicit generator of typed events that its caller consumes.

Progress bars, logs, evaluation, saving and early stopping are consumers of the events, so the loop has no callbacks. It
takes batches and a loss, so classification and detection share it.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from triscale.blocks import BatchNorm
from triscale.recipe import Recipe
from triscale.text import first_line
from triscale.train.advprop import auxiliary_norms, clean_norm_parameters, evaluating, perturb
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

    loss: of the clean images; adversarial: of the attacked ones, where the recipe has advprop. The gradient is that of their sum.
    Seconds: of waiting for data, the forward pass with the attack, the backward pass, and the optimiser with the average.
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
    adversarial: float = 0.0


@dataclass(frozen=True)
class EpochEnd:
    """After each epoch, with the model's weights (the averaged ones, where the recipe has an average) ready to evaluate.

    loss: the mean of the steps' `loss`.
    """

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
    recipe.advprop needs a `state` with an adversary and a model with auxiliary norms. Raises NonFiniteLossError before the
    optimiser uses the gradient.
    """
    state = state or TrainState(model, recipe)
    if recipe.advprop and not state.adversary:
        raise ValueError("fit: the recipe asks for advprop, and the state has no attack; give TrainState adversary=PGD.of(recipe, preprocess)")
    step_of = _Stepper(model, state, loss_fn, recipe, plan)
    per_epoch = len(batches)
    steps, images = recipe.epochs * per_epoch, 0
    while state.epoch < recipe.epochs:
        epoch = state.epoch
        state.model.train()
        state.prepare()
        began = waited = time.perf_counter()
        for batch in batches.epoch(epoch, state.step - epoch * per_epoch):
            data = time.perf_counter() - waited
            lr = learning_rate(recipe, state.step, per_epoch)
            torch.manual_seed(zlib.crc32(f"{recipe.seed}/{state.step}/{rank}".encode()))
            (loss, attacked), times = step_of(batch)
            value, adversarial = mean(loss), mean(attacked) if step_of.adversary else 0.0
            if not math.isfinite(value + adversarial):
                raise NonFiniteLossError(_diagnosis(step_of, batch, batches, epoch, (value, adversarial), lr))
            optimizer = step_of.update(lr)
            state.step, state.loss_sum, images = state.step + 1, state.loss_sum + value, images + len(batch[1])
            yield from step_of.notes()
            yield Step(epoch, state.step, steps, value, lr, images, data, *times, optimizer, adversarial)
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
        self.adversary = state.adversary if recipe.advprop else None
        # The attack looks at this process's model alone: nothing of it is told to the others.
        self.left_out = clean_norm_parameters(state.model) if self.adversary and hasattr(model, "no_sync") else []
        self._notes: list[Note] = []
        if plan.recompute:
            state.model.recompute = True  # type: ignore[assignment]
        self.compiled: dict[nn.Module, Callable[[Any], Any]] = {}
        if plan.compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.compiled = {m: torch.compile(m, mode=mode) for m in {model, state.model}}

    def notes(self) -> Iterator[Note]:
        while self._notes:
            yield self._notes.pop(0)

    def __call__(self, batch: Sequence[Any]) -> tuple[tuple[float, float], tuple[float, float]]:
        """((the batch's mean loss, that of its attacked images or 0), (seconds of forward, of backward)); gradients are left on
        the parameters."""
        self.state.optimizer.zero_grad(set_to_none=True)
        n = len(batch[1])
        size = self.plan.micro_batch or n
        clean, attacked = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        before = time.perf_counter()
        parts = [slice(start, start + size) for start in range(0, n, size)]
        # All before the first pass, which moves the running statistics that the attack works by.
        images = [self.attack(*self._part(batch, part)) for part in parts] if self.adversary else []
        attacked[1] += time.perf_counter() - before
        for i, part in enumerate(parts):
            x, y = self._part(batch, part)
            last, share = i + 1 == len(parts), len(y) / n
            _add(clean, self._pass(x, y, share, sync=last and not self.adversary))
            if self.adversary:
                with auxiliary_norms(self.state.model):
                    _add(attacked, self._pass(images[i], y, share, sync=last, left_out=self.left_out))
        return (clean[0], attacked[0]), (clean[1] + attacked[1], clean[2] + attacked[2])

    def _part(self, batch: Sequence[Any], part: slice) -> tuple[Any, Any]:
        return _to(batch[0][part], self.device), _to(batch[1][part], self.device)

    def _pass(self, x: Any, y: Any, share: float, *, sync: bool, left_out: Sequence[Tensor] = ()) -> tuple[float, float, float]:
        """(share x loss, seconds of its forward pass, of its backward pass). Gradients are added to what is there; sync: and then
        joined with the other processes'. left_out: parameters that this pass doesn't use, though the others wait for them."""
        before = time.perf_counter()
        with nullcontext() if sync or not hasattr(self.model, "no_sync") else self.model.no_sync():  # type: ignore[operator]
            loss = self.loss(x, y) * share
            value = loss.item()
            middle = time.perf_counter()
            if left_out and sync:
                loss = loss + 0 * torch.stack([p.sum() for p in left_out]).sum()
            torch.autograd.backward(loss)  # of a broken loss too: other processes wait for the gradients
        return value, middle - before, time.perf_counter() - middle

    def attack(self, x: Tensor, y: Any) -> Tensor:
        """The images attacked, by the auxiliary norms."""
        assert self.adversary
        with auxiliary_norms(self.state.model), evaluating(self.state.model):
            return perturb(lambda changed: self.loss(changed, y, self.state.model), x, self.adversary)

    def loss(self, x: Any, y: Any, model: nn.Module | None = None) -> Tensor:
        with self.plan.autocast():
            out = self._forward(x, model or self.model)
        low = isinstance(out, Tensor) and out.dtype in (torch.bfloat16, torch.float16)
        return self.loss_fn(out.float() if low else out, y)

    def _forward(self, x: Any, model: nn.Module) -> Any:
        if model not in self.compiled:
            return model(x)
        try:
            return self.compiled[model](x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's own, of which there are many
            reason = first_line(error)
            self._notes.append(Note(f"torch.compile failed, going on without it: {reason}"))
            self.compiled = {}
            return model(x)

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


def _add(total: list[float], part: Sequence[float]) -> None:
    total[:] = [a + b for a, b in zip(total, part, strict=True)]


def _diagnosis(step_of: _Stepper, batch: Sequence[Any], batches: BatchSource, epoch: int, values: tuple[float, float], lr: float) -> str:
    """Where it went wrong: the same step once more, each module's output looked at; and the samples whose own input is broken."""
    step, of_attacked = step_of.state.step, math.isfinite(values[0])
    x = _to(batch[0], step_of.device)
    torch.manual_seed(zlib.crc32(f"{step_of.recipe.seed}/{step}/0".encode()))
    found = _first_not_finite(step_of, x, _to(batch[1], step_of.device), of_attacked)
    weights = next((n for n, p in step_of.state.model.named_parameters() if not bool(p.isfinite().all())), "")
    broken = [i for i in range(len(x)) if not bool(x[i].isfinite().all())] if isinstance(x, Tensor) else []
    where = f"the weights of {weights}" if weights else "the input" if broken else found or "the loss itself"
    names: list[str] = []
    if len(batch) > 2:
        names = batches.names(batch[2])
        names = [names[i] for i in broken] or names
    listed = f"; of {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else ""
    advice = "" if broken else "; a lower rate may help"
    loss = f"adversarial loss is {values[1]}" if of_attacked else f"loss is {values[0]}"
    return f"{loss} at step {step + 1} of epoch {epoch + 1}, learning rate {lr:.3g}: first not finite is {where}{listed}{advice}"


def _first_not_finite(step_of: _Stepper, x: Any, y: Any, attacked: bool) -> str:
    """The first module whose output isn't, in a pass of the clean or the attacked images; "" where all are."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(f"the output of {name}")

        return hook

    model = step_of.state.model
    with ExitStack() as stack:
        if attacked:
            x = step_of.attack(x, y)  # finite where its gradient isn't: the sign of NaN is 0
            stack.enter_context(auxiliary_norms(model))
        for name, m in model.named_modules():
            if name and (isinstance(m, BatchNorm) or not list(m.children())):
                stack.callback(m.register_forward_hook(look(name)).remove)
        with torch.no_grad():
            step_of.model(x)
    return found[0] if found else ""


def cross_entropy(label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross entropy of logits (N, classes) and labels (N,), with label smoothing."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return loss
