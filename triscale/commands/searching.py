"""search coefficients, search network: long work with a live table, a study that is gone on with, and a report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import tyro

from triscale.commands.following import named_recipe
from triscale.commands.search_job import Asked, Job
from triscale.quantities import count, seconds
from triscale.recipes import named

if TYPE_CHECKING:
    from triscale.search.reward import Objective

COST = Literal["macs", "latency", "memory"]


@dataclass
class SearchCoefficients:
    """Find alpha, beta and gamma (paper, section 4, step 1): networks on a grid where alpha x beta^2 x gamma^2 is about the budget,
    each trained briefly; step 2 is `triscale scale NETWORK --phi N --coefficients FILE`."""

    data: tyro.conf.Positional[str]
    """As for `train`: a folder of class folders, shards, or a data set's name."""
    alpha: tuple[float, ...] = ()
    """Depth's bases to try, each >= 1; 1, 1.1, 1.2 and so on as far as the budget lets, unless given."""
    beta: tuple[float, ...] = ()
    """Width's; in steps of 0.05 unless given."""
    gamma: tuple[float, ...] = ()
    """Resolution's; in steps of 0.05 unless given."""
    budget: float = 2.0
    """What alpha x beta^2 x gamma^2 is to be about."""
    tolerance: float = 0.1
    """How far it may be from that."""
    common: Asked = field(default_factory=lambda: Asked())


@dataclass
class SearchNetwork:
    """Find a network in MnasNet's space around a reference: of each block operator, kernel, squeeze-excitation, skip, channels and
    layers. What is raised is accuracy x (cost / T)^w."""

    data: tyro.conf.Positional[str]
    """As for `train`: a folder of class folders, shards, or a data set's name."""
    sampler: str = "evolution"
    """evolution (regularised), ppo (MnasNet's recurrent controller), random, tpe, or nsga2: the Pareto front of accuracy and cost."""
    cost: COST = "macs"
    """What is counted: multiply-adds, latency measured on one thread of this machine, or inference memory at batch 1."""
    target: str | None = None
    """T, e.g. 5M, 20ms or 8MB; the reference's own unless given."""
    w: float | None = None
    """The exponent; the paper's -0.07, by which twice the cost is worth 5 % of the accuracy, unless given."""
    hard: bool = False
    """w = 0 up to T and -1 above it instead."""
    prefilter: str | None = None
    """naswot or synflow: of each --of networks that the sampler proposes, the best by this score without training is trained."""
    of: int | None = None
    """Of --prefilter; 8 unless given."""
    common: Asked = field(default_factory=lambda: Asked())


def options(kind: Any, args: list[str], name: str) -> Any:
    """Parsed twice: the named recipe gives the defaults that the other options override."""
    from triscale.commands import TYRO

    if find_spec("optuna") is None:
        raise ValueError("searches are carried out by Optuna: pip install 'triscale[search]', or pip install optuna")
    recipe = named_recipe(args) or "proxy"
    default = kind(data=tyro.MISSING, common=Asked(recipe=recipe, settings=named(recipe)))
    given = tyro.cli(kind, args=args, default=default, prog=f"triscale {name}", config=TYRO)
    if given.data == "digits" and "--flip" not in args:  # a mirrored digit is another digit, or none
        given.common = replace(given.common, settings=replace(given.common.settings, flip=False))
    return given


def search_coefficients(args: list[str]) -> int:
    """Runs the search over alpha, beta and gamma; returns the exit status: 1 where trials failed."""
    given: SearchCoefficients = options(SearchCoefficients, args, "search coefficients")
    from triscale.search.find import coefficient_search
    from triscale.search.grid import grid, spread

    triples = spread(grid(given.alpha, given.beta, given.gamma, budget=given.budget, tolerance=given.tolerance))
    job = Job("coefficients", given.data, given.common)
    about = {**job.about, "budget": given.budget}
    running, place = job.running(len(triples), "none"), job.place(about)
    search = job.join(lambda: coefficient_search(job.score, job.reference, triples, counted=job.counted, running=running, place=place), args)
    networks = len({search.problem.arch({"alpha": c.alpha, "beta": c.beta, "gamma": c.gamma}) for c in triples})
    print(f"{len(triples)} triples, which make {networks} different networks")
    settings = {
        "budget": f"{given.budget:g}",
        "tolerance": f"{given.tolerance:g}",
        "triples on the grid": f"{len(triples)}",
        "different networks": f"{networks}",
    }
    return job.carry_out(search, settings)


def search_network(args: list[str]) -> int:
    """Runs the search over networks; returns the exit status: 1 where trials failed."""
    given: SearchNetwork = options(SearchNetwork, args, "search network")
    from triscale.search.find import Screen, network_search
    from triscale.search.space import mnasnet_space

    job = Job("network", given.data, given.common, spare=given.cost == "latency")
    space = mnasnet_space(job.reference)
    objective = _objective(given, job)
    if given.of is not None and not given.prefilter:
        raise ValueError("--of: of --prefilter, which isn't given")
    if given.sampler == "nsga2" and given.common.pruner not in (None, "none"):
        raise ValueError(f"--pruner {given.common.pruner}: nsga2 has two values, of which neither alone can tell what to stop; none goes with it")
    of = 8 if given.of is None else given.of
    screen = Screen(job.zero_cost(given.prefilter), of) if given.prefilter else None
    running = job.running(100, "none" if given.sampler == "nsga2" or given.common.score != "train" else "median")
    more: Any = {"sampler": given.sampler, "seed": given.common.settings.seed, "screen": screen, "running": running}
    search = job.join(lambda: network_search(job.score, space, objective, place=job.place(job.about), **more), args)
    settings = {"sampler": given.sampler, "networks in the space": f"{space.size:.2g}", "pruner": running.pruner}
    if given.prefilter:
        settings["prefilter"] = f"the best of {of} by {given.prefilter}"
    return job.carry_out(search, settings)


def _objective(given: SearchNetwork, job: Job) -> Objective:
    from triscale.search.reward import HARD, SOFT, Objective

    measure = None
    if given.cost == "latency":
        from triscale.latency import measure_arch

        measure = measure_arch
    if given.target is not None:
        target = seconds(given.target) if given.cost == "latency" else float(count(given.target))
    elif (known := job.identity().get("objective", {})).get("cost") == given.cost == "latency":
        target = known["target"]  # as it was measured when the study was begun: another time, another latency
    else:
        probe = Objective(given.cost, 1.0, classes=job.counted[0], channels=job.counted[1], measure=measure)
        target = probe.costs(job.reference)[given.cost]
    if given.hard and given.w is not None:
        raise ValueError("--hard and --w: the hard constraint has exponents of its own; leave one of the two out")
    w = SOFT if given.w is None else (given.w, given.w)
    return Objective(given.cost, target, HARD if given.hard else w, *job.counted, measure=measure)
