"""What the study trains, as data: base networks, recipes, and the runs of each figure.

Base and recipe were chosen by the base network's own behaviour alone (README.md); the multipliers of figure 8 follow from
the MACs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from triscale.architecture import Arch, Head, Numerics, Stage, Stem
from triscale.cost_model import cost
from triscale.families import arch as named
from triscale.recipe import Recipe
from triscale.scaling import Scaling, compound, fit_input, scale

CLASSES = 10
BUDGET = 4  # times the base network's MACs, in figure 8
PARTS = ("figure8", "figure3", "figure4")
PAIRS = ((1.0, 1.0), (1.0, 1.3), (2.0, 1.0), (2.0, 1.3))  # (depth, resolution) of figure 4, as in the paper

# 16 px, so that twice the resolution is the pictures' own 32 px: all the way up to it more pixels are more to see.
SMALL = Arch(
    Stem(8, 3, 1),
    (
        Stage("mbconv", 3, 2, 1, 0.25, "identity", 8, 1),
        Stage("mbconv", 3, 1, 3, 0.25, "identity", 16, 1),
        Stage("mbconv", 3, 2, 4, 0.25, "identity", 32, 2),
    ),
    Head(128),
    resolution=16,
    dropout=0.0,
    # The official momentum averages over too many steps for runs of a few thousand; channels in steps of 4 are finer than 8.
    numerics=Numerics(norm_momentum=0.1, drop_path=0.0, divisor=4),
    name="base",
)


@dataclass(frozen=True)
class Setting:
    """One size of the study: what `--scale` names.

    train_images, test_images: of each split at most, 0 for all. values: of each dimension alone, beside that of figure 8.
    widths: of figure 4, beside 1 and, in the pair (1, 1), figure 8's.
    """

    name: str
    base: Arch
    recipe: Recipe
    seeds: int
    device: str = "cpu"
    train_images: int = 0
    test_images: int = 0
    values: tuple[tuple[str, tuple[float, ...]], ...] = (("depth", (2.0, 6.0)), ("width", (1.5, 3.0)), ("resolution", (1.3, 1.5, 2.5)))
    widths: tuple[float, ...] = (1.0, 1.5, 2.0)


_B0 = fit_input(named("efficientnet_b0"), 32)

SETTINGS: dict[str, Setting] = {
    # Two cores of an AMD EPYC: 64 minutes of one core by the steps' CPU time, so about 32. The base reaches 60.3 % (one seed).
    "laptop": Setting(
        "laptop", SMALL, Recipe(epochs=4, batch_size=128, lr=0.3, warmup_epochs=0.5, label_smoothing=0.0, weight_decay=5e-4, shift=0.125), seeds=3
    ),
    # One H200. B0 with the strides taken out that 32 px don't need: the map before the head is 4 x 4. Not run.
    "gpu": Setting(
        "gpu",
        replace(_B0, name="base", numerics=replace(_B0.numerics, norm_momentum=0.1)),
        Recipe(epochs=12, batch_size=512, lr=0.8, warmup_epochs=2.0, label_smoothing=0.1, weight_decay=5e-4, erase=0.25, ema=0.99),
        seeds=3,
        device="cuda",
        values=(("depth", (2.0,)), ("width", (1.5, 2.5)), ("resolution", (1.3, 1.5))),
        widths=(1.0, 1.5),
    ),
    # Seconds, to see that all works. Its accuracies mean nothing.
    "tiny": Setting(
        "tiny",
        replace(SMALL, resolution=8),
        Recipe(epochs=1, batch_size=32, lr=0.1, warmup_epochs=0.2, label_smoothing=0.0, ema=0.0),
        seeds=2,
        train_images=256,
        test_images=100,
        values=(("depth", (2.0,)), ("width", (1.5,)), ("resolution", (1.3,))),
        widths=(1.0, 1.5),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training: a network and a seed."""

    name: str
    scaling: Scaling
    arch: Arch
    recipe: Recipe

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.recipe.seed}"

    @property
    def work(self) -> float:
        """Of the whole run, in images: time goes with layers and pixels more than with MACs where networks are small."""
        c = cost(self.arch, CLASSES)
        return self.recipe.epochs * (0.2 + c.activations / 1e5 + c.macs / 4e6)


def macs(arch: Arch) -> int:
    return cost(arch, CLASSES).macs


def scaled(base: Arch, s: Scaling, name: str) -> Arch:
    """`base` scaled, under this name. Dropout stays the base's: regularisation isn't what is compared."""
    return replace(scale(base, s), dropout=base.dropout, name=name)


@lru_cache
def equal_macs(base: Arch, budget: float = BUDGET) -> Mapping[str, Scaling]:
    """The base and the four ways to scale it to the same MACs, about `budget` times its own.

    Multipliers in steps of 0.01. Networks are coarse: the target is the multiple of the base within 8 % of `budget` at
    which the four lie closest together, and each way takes the network nearest to it, by its smallest multiplier.
    """
    kinds: dict[str, Callable[[float], Scaling]] = {
        "depth": lambda v: Scaling(depth=v),
        "width": lambda v: Scaling(width=v),
        "resolution": lambda v: Scaling(resolution=v),
        "compound": lambda v: compound(round(v - 1, 2)),
    }
    found: dict[str, dict[float, Scaling]] = {}
    for name, scaling_of in kinds.items():
        sizes = found[name] = {}
        for i in range(100, 700):
            s = scaling_of(i / 100)
            sizes.setdefault(macs(scale(base, s)) / macs(base), s)

    def nearest(target: float) -> list[float]:
        return [min(sizes, key=lambda m: abs(m - target)) for sizes in found.values()]

    targets = [budget * (1 + i / 200) for i in range(-16, 17)]
    target = min(targets, key=lambda t: (max(nearest(t)) / min(nearest(t)), abs(t - budget)))
    return {"base": Scaling(), **{name: sizes[m] for (name, sizes), m in zip(found.items(), nearest(target), strict=True)}}


def runs(setting: Setting, parts: tuple[str, ...] = PARTS, seeds: int | None = None, epochs: int | None = None) -> list[Run]:
    """Every training of these parts, each once. Figures 3 and 4 take one seed, and share what figure 8 has.

    Order: seed 0 of figure 8 first, so that a study that is stopped early has its comparison.
    """
    recipe = setting.recipe if epochs is None else replace(setting.recipe, epochs=epochs)
    five = equal_macs(setting.base)
    wanted: dict[tuple[Arch, int], Run] = {}

    def add(name: str, s: Scaling, seed: int = 0) -> None:
        network = scaled(setting.base, s, name)
        wanted.setdefault((replace(network, name=""), seed), Run(name, s, network, replace(recipe, seed=seed)))

    singles = {"depth", "width", "resolution"}
    for seed in range((setting.seeds if seeds is None else seeds) if "figure8" in parts else 1):
        for name, s in five.items():
            if "figure8" in parts or name == "base" or ("figure3" in parts and name in singles) or ("figure4" in parts and name == "width"):
                add(name, s, seed)
    if "figure3" in parts:
        for axis, values in setting.values:
            for v in values:
                add(f"{axis} {v:g}", Scaling(**{axis: v}))
    if "figure4" in parts:
        for depth, resolution in PAIRS:
            for w in setting.widths:
                if (depth, resolution) != (1, 1) or w < five["width"].width - 0.2:
                    add(f"d {depth:g} r {resolution:g} w {w:g}", Scaling(depth, w, resolution))
    return list(wanted.values())
