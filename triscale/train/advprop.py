"""AdvProp: adversarial images as further training images, with batch norms of their own.

Each norm gets an auxiliary one: weight, bias and running statistics of its own, under `...norm.auxiliary`. Clean images go
through the norms as they were, adversarial ones through the auxiliary ones; all else is shared. Inference uses the clean
ones, and a model file has no others. Source: Xie et al. 2020, arXiv 1911.09665; the attack is Madry et al. 2018,
arXiv 1706.06083.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triscale.blocks import BatchNorm, Switch
from triscale.recipe import Preprocess, Recipe

M = TypeVar("M", bound=nn.Module)


def with_auxiliary_norms(net: M) -> M:
    """`net`, in place, each of whose BatchNorms has an auxiliary one, which starts as its copy.

    In any order with `share_norms` and `ghost_norms`, which the auxiliary ones follow; before `parallel` and the optimiser.
    Raises ValueError for a network without norms or one that has them already.
    """
    norms = [m for m in net.modules() if isinstance(m, BatchNorm)]
    if not norms or any(norm.auxiliary is not None for norm in norms):
        raise ValueError(f"with_auxiliary_norms: the network has {'auxiliary norms already' if norms else 'no batch norms'}")
    switch = Switch()
    for norm in norms:
        norm.auxiliary = copy.deepcopy(norm)
        norm.switch = switch
    return net


def without_auxiliary_norms(net: M) -> M:
    """A copy of `net` without auxiliary norms that shares its other tensors: what is exported. Outputs are bit for bit the clean
    norms'. A network without auxiliary norms gives its like."""
    # Tensors that are their own copies, so that only the modules are made anew.
    shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(net.parameters(), net.buffers())}
    clean = copy.deepcopy(net, shared)
    for module in clean.modules():
        if isinstance(module, BatchNorm):
            module.auxiliary, module.switch = None, Switch()
    return clean


def clean_norm_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Those trained parameters that a pass through the auxiliary norms leaves out."""
    norms = [m for m in net.modules() if isinstance(m, BatchNorm) and m.auxiliary is not None]
    return [p for norm in norms for p in norm.parameters(recurse=False) if p.requires_grad]


@contextmanager
def auxiliary_norms(net: nn.Module) -> Iterator[None]:
    """Forward passes of `net` inside go through the auxiliary norms; with recomputation their backward passes belong inside too.

    The switch is the network's own, so that another network may run in another thread, though not the same one. Raises
    ValueError for a network without auxiliary norms.
    """
    switch = next((m.switch for m in net.modules() if isinstance(m, BatchNorm) and m.auxiliary is not None), None)
    if switch is None:
        raise ValueError("the network has no auxiliary norms; with_auxiliary_norms(net) adds them")
    before, switch.on = switch.on, True
    try:
        yield
    finally:
        switch.on = before


@dataclass(frozen=True)
class PGD:
    """An untargeted attack by projected gradient descent in the L-infinity ball.

    epsilon: largest change of a pixel; step: that of each of the `steps` steps; both on the 0..255 scale. mean, std: of the
    inputs' normalisation, per channel on that scale. random_start: begin anywhere in the ball, not at the image. No steps, or
    an epsilon of 0, leave the images as they are.
    """

    epsilon: float
    steps: int
    step: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    random_start: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.epsilon <= 255 and 0 <= self.step <= 255 and self.steps >= 0):
            raise ValueError(f"PGD: expected epsilon and step from 0 to 255 and steps from 0, found {self.epsilon}, {self.step} and {self.steps}")
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"PGD: expected as many means as stds above 0, found {self.mean} and {self.std}")

    @staticmethod
    def of(recipe: Recipe, preprocess: Preprocess) -> PGD:
        """The recipe's attack on images that `preprocess` normalised."""
        return PGD(recipe.adv_epsilon, recipe.adv_steps, recipe.adv_step, preprocess.mean, preprocess.std)


def perturb(loss: Callable[[Tensor], Tensor], x: Tensor, pgd: PGD) -> Tensor:
    """The images x (N, C, H, W), normalised, changed so that `loss` of them, a scalar, rises; a new tensor without graph.

    x+ = clip(x + step / std x sign of the gradient), to epsilon / std about the image and to the pixels 0..255, to float
    rounding. Random numbers are torch's of x's device. Gradients of parameters are neither computed nor touched.
    """
    if not pgd.steps or not pgd.epsilon:
        return x.detach().clone()
    x = x.detach()
    mean, std, black, white = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (pgd.mean, pgd.std, [0.0], [255.0]))
    low = torch.maximum(x - pgd.epsilon / std, (black - mean) / std)
    high = torch.minimum(x + pgd.epsilon / std, (white - mean) / std)
    changed = torch.clamp(x + (2 * torch.rand_like(x) - 1) * (pgd.epsilon / std), low, high) if pgd.random_start else x.clone()
    with torch.enable_grad():
        for _ in range(pgd.steps):
            changed.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(changed), [changed])
            changed = torch.clamp(changed.detach() + gradient.sign() * (pgd.step / std), low, high)
    return changed


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode inside; afterwards each module is as it was."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def attack(model: nn.Module, x: Tensor, y: Any, loss_fn: Callable[[Any, Any], Tensor], pgd: PGD) -> Tensor:
    """The images x (N, C, H, W), normalised, changed to raise loss_fn(model(x), y); see `perturb`.

    In evaluation mode: norms work by their running statistics, which don't move, and nothing is dropped. Through the clean
    norms, or inside `auxiliary_norms(model)` through the auxiliary ones.
    """
    with evaluating(model):
        return perturb(lambda changed: loss_fn(model(changed), y), x, pgd)


def pgd_accuracy(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], preprocess: Preprocess, epsilon: float, steps: int, step: float) -> float:
    """Share of the images that `net`, by its clean norms, still tells right after an attack that knows it (cross entropy).

    batches: (images (N, C, H, W) normalised by `preprocess`, labels (N,)). epsilon, step: on the 0..255 scale; epsilon 0 gives
    the clean accuracy. The attacks' random starts are the same each time; torch's random numbers are left as they were.
    """
    pgd, device = PGD(epsilon, steps, step, preprocess.mean, preprocess.std), next(net.parameters()).device
    right = total = 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(net):
        torch.manual_seed(0)
        for images, labels in batches:
            x, y = images.to(device), labels.to(device)
            changed = attack(net, x, y, F.cross_entropy, pgd)
            with torch.no_grad():
                right += int(net(changed).argmax(1).eq(y).sum())
            total += len(y)
    return right / total
