"""How a training step is computed: device, precision, how much of the batch at a time. None of it changes what is learnt
beyond rounding, but for batch norm's statistics, which are those of the images that are computed together."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from triscale.architecture import Arch
from triscale.cost_model import cost
from triscale.naming import unknown
from triscale.recipe import Recipe

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Plan:
    """precision: of convolutions and matrix products; auto is bfloat16 on an accelerator that has it, float32 on a CPU.

    micro_batch: images at a time in each process; 0: all of its share. recompute: keep only the blocks' outputs in the
    forward pass and compute the rest again in the backward pass. compile: torch.compile; where that fails the plain step is
    used and a Note says so.
    """

    device: str = "cpu"
    precision: Precision = "auto"
    micro_batch: int = 0
    recompute: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise unknown("precision", self.precision, get_args(Precision))
        if self.micro_batch < 0:
            raise ValueError(f"Plan.micro_batch: expected a whole number from 0, found {self.micro_batch}")

    @property
    def bfloat16(self) -> bool:
        if self.precision == "auto":
            return self.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        return self.precision == "bfloat16"

    def autocast(self) -> AbstractContextManager[object]:
        """Where the forward pass runs: norms' statistics, losses and weights stay float32."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16) if self.bfloat16 else nullcontext()


def optimizer_slots(recipe: Recipe) -> int:
    """Values kept for each parameter beside its gradient: the optimiser's and the average's."""
    return {"sgd": 1 if recipe.momentum else 0, "rmsprop": 2, "adamw": 2}[recipe.optimizer] + (recipe.ema > 0)


def step_memory(arch: Arch, recipe: Recipe, num_classes: int, images: int, in_channels: int = 3) -> int:
    """Bytes that a float32 step of `images` at a time needs: weights, optimiser, average, batch, activations and gradients."""
    return cost(arch, num_classes, in_channels, batch=images).memory.training(optimizer_slots(recipe))


def largest_micro_batch(arch: Arch, recipe: Recipe, num_classes: int, limit: float, most: int, in_channels: int = 3) -> int:
    """Images at a time, up to `most`, whose step fits `limit` bytes. Raises ValueError where not even one image fits."""
    needed = step_memory(arch, recipe, num_classes, 1, in_channels)
    if needed > limit:
        raise ValueError(f"a step of one image needs {needed / 1e6:.0f} MB, the limit is {limit / 1e6:.0f} MB; a smaller network or input fits")
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if step_memory(arch, recipe, num_classes, middle, in_channels) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def fit_memory(plan: Plan, arch: Arch, recipe: Recipe, num_classes: int, limit: float, *, share: int | None = None, in_channels: int = 3) -> Plan:
    """The plan with as few micro-batches as fit `limit` bytes; the global batch stays as it is.

    share: images of the global batch in each process. They are shared out evenly: 96 of at most 40 at a time are 3 x 32.
    Memory is what tensors hold (`memory_model`), without the workspaces of operators. Raises ValueError where not even one
    image fits.
    """
    share = recipe.batch_size if share is None else share
    parts = -(-share // largest_micro_batch(arch, recipe, num_classes, limit, share, in_channels))
    return replace(plan, micro_batch=0 if parts == 1 else -(-share // parts))
