"""Optimisers, learning-rate schedules and weight average of a recipe, in the official code's numerics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triscale.recipe import Recipe


class RMSprop(torch.optim.Optimizer):
    """RMSProp as TensorFlow has it, which torch's is not.

    square += (1 - decay)(g^2 - square), from 1 on; velocity = momentum x velocity + lr x g / sqrt(square + eps);
    p -= velocity: eps inside the root, the rate inside the momentum. Weight decay is added to g. Source: tf.train.
    RMSPropOptimizer, official utils.build_optimizer.
    """

    def __init__(self, params: Any, lr: float, decay: float = 0.9, momentum: float = 0.9, eps: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"square": torch.ones_like(p), "velocity": torch.zeros_like(p)}
            squares, velocities = ([self.state[p][k] for p in params] for k in ("square", "velocity"))
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
            roots = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_addcdiv_(velocities, grads, roots, group["lr"])
            torch._foreach_sub_(params, velocities)
        return loss


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Decayed tensors and the others. Decayed are the weights of two dimensions and more; with `decay_biases` all that are no
    norm's, which is what the official code regularises: kernels, squeeze-excitation's biases, the classifier's."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for p in m.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if (id(p) not in norms if recipe.decay_biases else p.ndim > 1)]
    chosen = {id(p) for p in decayed}
    others = [p for p in trained if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, recipe: Recipe, build: Callable[..., torch.optim.Optimizer] | None = None) -> torch.optim.Optimizer:
    """The recipe's optimiser. build(class, groups, **options): what makes it instead, e.g. one that shards its state."""
    build = build or (lambda kind, groups, **options: kind(groups, **options))
    groups, lr = parameter_groups(model, recipe), peak_rate(recipe)
    if recipe.optimizer == "rmsprop":
        return build(RMSprop, groups, lr=lr, decay=recipe.rms_decay, momentum=recipe.momentum, eps=recipe.rms_eps)
    if recipe.optimizer == "adamw":
        return build(torch.optim.AdamW, groups, lr=lr, betas=(0.9, 0.99), foreach=True)
    return build(torch.optim.SGD, groups, lr=lr, momentum=recipe.momentum, nesterov=recipe.nesterov and recipe.momentum > 0, foreach=True)


def peak_rate(recipe: Recipe) -> float:
    return recipe.lr * recipe.batch_size / recipe.lr_batch if recipe.lr_batch else recipe.lr


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: float) -> float:
    """The rate for step 0, 1, ...; steps_per_epoch may be a fraction, images / batch_size.

    cosine: linear to the peak over the warm-up, then half a cosine to 0 after the last step. steps: peak x factor^(drops so far), in the
    warm-up times its line from warmup_from to 1, as mmdetection's step policy has it. staircase: step / int(warm-up
    steps) of the peak, then peak x factor^floor(step / (decay_epochs x steps_per_epoch)), the steps counted from 0, in float32
    as the official code computes it: float64 differs at decay boundaries. Source: official utils.build_learning_rate.
    """
    peak, warmup = peak_rate(recipe), recipe.warmup_epochs * steps_per_epoch
    if recipe.schedule == "staircase":
        f = np.float32
        if step < int(warmup):
            return float(f(peak) * f(step) / f(int(warmup)))
        return float(f(peak) * np.power(f(recipe.decay_factor), np.floor(f(step) / f(recipe.decay_epochs * steps_per_epoch))))
    low = recipe.warmup_from
    if recipe.schedule == "steps":
        rising = low + (1 - low) * step / warmup if step < warmup else 1.0
        return peak * rising * recipe.decay_factor ** sum(step >= at * steps_per_epoch for at in recipe.decay_at)
    if step < warmup:
        return peak * (low + (1 - low) * (step + 1) / (warmup + 1))
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(recipe.epochs * steps_per_epoch - warmup, 1)))


class WeightAverage:
    """Exponential average of all weights and running statistics: average += (1 - d)(value - average).

    d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, ...: the official warm-up, so that a short run isn't held at its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.swapped = False

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        state = model.state_dict()
        floating = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[n] for n in floating], [state[n] for n in floating], 1 - d)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the model's values and the average; a second call puts them back."""
        for name, value in model.state_dict().items():
            held: Tensor = self.values[name].clone()
            self.values[name].copy_(value)
            value.copy_(held)
        self.swapped = not self.swapped


def clip(parameters: Iterable[Tensor], largest: float) -> float:
    """Scales the gradients down to a norm of `largest` together; returns the norm they had."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, largest, foreach=True))
