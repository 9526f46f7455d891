"""Optimiser, learning-rate schedule and weight average of a recipe."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from triscale.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW. Weight decay acts on tensors of two dimensions and more: not on norms, not on biases."""
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), foreach=True)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, foreach=True)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate for step 0, 1, ...: linear to recipe.lr over the warm-up, then half a cosine to 0 after the last step."""
    total, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


class WeightAverage:
    """Exponential average of all weights and running statistics: average += (1 - d)(value - average).

    d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, ...: the official warm-up, so that a short run isn't held at its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

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
