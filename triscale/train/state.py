"""All that a training run has learnt and where it stands: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from triscale.recipe import Recipe
from triscale.train.advprop import PGD
from triscale.train.optim import WeightAverage, make_optimizer


class TrainState:
    """Model, optimiser, weight average, step and the running sum of the epoch's losses.

    Random numbers need no place in it: each step's follow from the seed and its number. The sampler's position is the step.
    prepare: called after each `model.train()`, to put modules that are to stay in evaluation mode back into it. adversary: the
    attack of a recipe with advprop, for a model with auxiliary norms, whose values and slots are state like all others.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        build: Callable[..., torch.optim.Optimizer] | None = None,
        prepare: Callable[[], object] = lambda: None,
        adversary: PGD | None = None,
    ) -> None:
        self.model, self.prepare, self.adversary = model, prepare, adversary
        self.optimizer = make_optimizer(model, recipe, build)
        self.average = WeightAverage(model, recipe.ema) if recipe.ema else None
        self.step = 0
        self.epoch = 0  # whose end has been told
        self.loss_sum = 0.0

    def tensors(self, whole: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Every tensor by name: model/..., average/..., optimizer/PARAMETER/SLOT. Not copies. The same while an EpochEnd is
        consumed, when model and average are exchanged. whole: the state_dict of an optimiser that is shared out to processes."""
        model, average = dict(self.model.state_dict()), dict(self.average.values) if self.average else {}
        if self.average and self.average.swapped:
            model, average = average, model
        named = self._optimised()
        state = (whole or self.optimizer.state_dict())["state"]
        slots = {f"{named[i][0]}/{slot}": v for i, values in state.items() for slot, v in values.items() if isinstance(v, Tensor)}
        parts = {"model": model, "average": average, "optimizer": slots}
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def _optimised(self) -> list[tuple[str, nn.Parameter]]:
        """The optimiser's parameters with their names, in the order of its state_dict's numbers."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [(names[id(p)], p) for group in self.optimizer.param_groups for p in group["params"]]

    def _groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups as its state_dict has them, with numbers instead of parameters."""
        out, start = [], 0
        for group in self.optimizer.param_groups:
            rest = {k: v for k, v in group.items() if k != "params"}
            out.append({**rest, "params": list(range(start, start + len(group["params"])))})
            start += len(group["params"])
        return out

    def numbers(self) -> dict[str, Any]:
        """What is no tensor, for JSON."""
        return {"step": self.step, "epoch": self.epoch, "loss_sum": self.loss_sum, "updates": self.average.updates if self.average else 0}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], into: Callable[[dict[str, Any]], object] | None = None) -> None:
        """Takes the place of an earlier state. Raises ValueError, and changes nothing, where a tensor lacks or has another shape.

        into: what takes the optimiser's state_dict instead of the optimiser itself.
        """
        fresh = self.tensors({"state": {}})
        expected = {name for name in fresh if not name.startswith("optimizer/")}
        found = {name for name in tensors if not name.startswith("optimizer/")}
        wrong = sorted((expected ^ found) | {n for n in expected & found if fresh[n].shape != tensors[n].shape})
        parameters = dict(self.model.named_parameters())
        slots: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                parameter, _, slot = name.removeprefix("optimizer/").rpartition("/")
                if parameter not in parameters or (value.ndim and value.shape != parameters[parameter].shape):
                    wrong.append(name)
                slots.setdefault(parameter, {})[slot] = value
        if wrong:
            raise ValueError(f"the checkpoint is of another network or recipe: {len(wrong)} tensors don't fit, first {wrong[0]}")
        if self.average and self.average.swapped:
            self.average.swap(self.model)
        for name in expected:
            fresh[name].copy_(tensors[name])
        state = {}
        for i, (name, p) in enumerate(self._optimised()):
            if name in slots:
                # AdamW counts its steps in a tensor on the CPU; the others lie beside their parameter, in its memory format.
                state[i] = {k: v.clone() if not v.ndim else torch.empty_like(p).copy_(v) for k, v in slots[name].items()}
        (into or self.optimizer.load_state_dict)({"state": state, "param_groups": self._groups()})
        self.step, self.epoch, self.loss_sum = int(numbers["step"]), int(numbers["epoch"]), float(numbers["loss_sum"])
        if self.average:
            self.average.updates = int(numbers["updates"])
