"""models, show, scale: networks as data. No torch is loaded, unless a latency is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from triscale import quantities
from triscale.architecture import Arch, ArchError
from triscale.budget import BudgetError, Fit, Workload, fit_budget
from triscale.cost_model import cost
from triscale.detector import DetectorArch, detector, detector_names, detector_table, is_detector, scale_detector, scaled_table
from triscale.detector_budget import DetectorFit, DetectorWorkload, fit_detector
from triscale.detector_memory import detector_memory
from triscale.families import arch as named_arch
from triscale.families import names
from triscale.files import write_text
from triscale.naming import unknown
from triscale.scaling import ALPHA, BETA, GAMMA, Coefficients, Scaling, ScalingError, compound
from triscale.scaling import scale as scale_arch
from triscale.text import aligned


def read_arch(name: str) -> Arch:
    """A named network, or one from a JSON file (a name that ends in .json)."""
    if not name.endswith(".json"):
        return named_arch(name)
    found = read_any(name)
    if isinstance(found, DetectorArch):
        raise ArchError(f"{name}: a detector; expected a network")
    return found


def read_any(name: str) -> Arch | DetectorArch:
    """A network or a detector: named, or from a JSON file (a name that ends in .json)."""
    if name in names():
        return named_arch(name)
    if name in detector_names():
        return detector(name)
    if not name.endswith(".json"):
        raise unknown("network or detector", name, (*names(), *detector_names()))
    try:
        text = Path(name).read_text(encoding="utf-8")
        return DetectorArch.from_json(text) if is_detector(text) else Arch.from_json(text)
    except ArchError as error:
        raise ArchError(f"{name}: {error}") from None
    except UnicodeDecodeError:
        raise ArchError(f"{name}: not an architecture file: no UTF-8 text") from None


def _measure(arch: Arch) -> float:
    from triscale.latency import measure_arch  # loads torch

    return measure_arch(arch)


def models(networks: list[str], /, weights: bool = False) -> int:
    """The named networks, counted for 1000 classes. MACs are multiply-adds for one image; memory is for batch 1 in float32.

    Args:
        networks: only these; all unless given.
        weights: the published checkpoints of each instead, as --weights of the other commands takes them.
    """
    chosen = [named_arch(name).name for name in networks] or names()
    if weights:
        return _published(chosen)
    rows = []
    for name in chosen:
        c = cost(arch := named_arch(name))
        memory = (quantities.size(c.memory.inference), quantities.size(c.memory.training()))
        rows.append((name, f"{arch.resolution}", f"{c.params:,}", f"{c.macs / 1e9:.3f} G", f"{c.activations / 1e6:.1f} M", *memory))
    print(aligned(("network", "px", "params", "MACs", "activations", "inference", "training"), rows))
    return 0


def _published(networks: Sequence[str]) -> int:
    from triscale.weights.zoo import entries, find

    rows = []
    for name in networks:
        for e in entries(name):
            short = f"{name}:{e.tag}" if e.tag and find(name, e.tag) is e else e.name
            accuracy = ["" if value is None else f"{value:.2f}" for value in (e.top1, e.top5)]
            rows.append((short, e.source, f"{e.preprocess.size}", *accuracy, "" if e.classes == 1000 else f"{e.classes}", e.where))
    print(aligned(("weights", "source", "px", "top-1", "top-5", "classes", "where"), rows, left=(0, 1, 6)))
    print("\nAccuracy in % on ImageNet's validation images as its publisher gives it; classes where they aren't ImageNet's 1000.")
    return 0


def show(name: str, /, classes: int | None = None, batch: int = 1, json: bool = False) -> int:
    """One network as the paper's Table 1, with what it costs; or a detector by its parts.

    Args:
        name: a network's name, or a .json file; retinanet_NAME_fpn is the detector with that backbone.
        classes: outputs of the classifier; 1000 unless given, of a detector 80.
        batch: images at a time, for the memory.
        json: print the network as JSON instead, as --save and other commands' .json files have it.
    """
    arch = read_any(name)
    if json:
        print(arch.to_json())
        return 0
    if isinstance(arch, DetectorArch):
        classes = 80 if classes is None else classes
        print(f"{detector_table(arch, classes)}\n\n{_detector_memory(arch, classes, batch)}")
        return 0
    classes = 1000 if classes is None else classes
    c = cost(arch, classes, batch=batch)
    n, m = arch.numerics, c.memory
    from triscale.cost_model import table

    print(table(arch, classes))
    print(f"\nnumerics: {n.padding} padding, {n.activation}, batch norm eps {n.norm_eps:g} momentum {n.norm_momentum:g}, drop path {n.drop_path:g}")
    print(f"activations {c.activations:,} a image; memory at batch {batch}, float32: weights {quantities.size(m.weights)},", end=" ")
    print(f"inference {quantities.size(m.inference)} in all, training step {quantities.size(m.training())} in all (RMSProp)")
    return 0


def _detector_memory(arch: DetectorArch, classes: int, batch: int) -> str:
    batches = sorted({1, batch})
    found = [detector_memory(arch, classes, n) for n in batches]
    rows = [
        ("inference, in all", *(quantities.size(m.inference) for m in found)),
        ("training step, beside weights and images", *(quantities.size(m.training_peak) for m in found)),
        ("training step with SGD's momentum, in all", *(quantities.size(m.training(1)) for m in found)),
    ]
    return aligned(("Peak memory, float32", *(f"{n} image{'s' * (n > 1)}" for n in batches)), rows)


def _coefficients(file: Path | None, alpha: float | None, beta: float | None, gamma: float | None) -> Coefficients:
    if file is None:
        return Coefficients(*(usual if value is None else value for value, usual in ((alpha, ALPHA), (beta, BETA), (gamma, GAMMA))))
    if (alpha, beta, gamma) != (None, None, None):
        raise ScalingError("--coefficients: has alpha, beta and gamma; leave --alpha, --beta and --gamma out")
    try:
        return Coefficients.from_json(file.read_text(encoding="utf-8"))
    except (ScalingError, UnicodeDecodeError) as error:
        raise ScalingError(f"{file}: {error}") from None


def scale(
    name: str,
    /,
    phi: float | None = None,
    macs: str | None = None,
    params: str | None = None,
    memory: str | None = None,
    latency: str | None = None,
    depth: float = 1,
    width: float = 1,
    resolution: float = 1,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    coefficients: Path | None = None,
    batch: int = 1,
    training: bool = False,
    save: Path | None = None,
) -> int:
    """Scale a network or a detector: by phi, to the largest within budgets, or by multipliers.

    Args:
        name: a network's or a detector's name, or a .json file. A detector's pyramid and heads follow the width.
        phi: compound scaling by alpha^phi, beta^phi, gamma^phi; may be negative or a fraction.
        macs: budget of multiply-adds an image, e.g. 400M or 2e9.
        params: budget of parameters, e.g. 10M.
        memory: budget of memory in bytes, e.g. 500MB, for --batch images of inference (or --training).
        latency: budget of measured time for one image on one CPU thread, e.g. 20ms; of networks only.
        depth: multiplier of the layers.
        width: multiplier of the channels.
        resolution: multiplier of the input size.
        alpha: depth's base for phi; the paper's 1.2 unless given.
        beta: width's base for phi; 1.1 unless given.
        gamma: resolution's base for phi; 1.15 unless given.
        coefficients: all three from this file, as `search coefficients` writes it.
        batch: images at a time, for --memory.
        training: --memory is for a training step: with RMSProp, of a detector with SGD and momentum.
        save: write the result to this .json file, which show takes, and train and bench where it is a network.
    """
    base = read_any(name)
    budgets = {"macs": macs, "params": params, "memory": memory}
    counts = {key: quantities.count(value) for key, value in budgets.items() if value is not None}
    multiplied = (depth, width, resolution) != (1, 1, 1)
    if sum((phi is not None, multiplied, bool(counts) or latency is not None)) != 1:
        raise ScalingError(
            "give one of: --phi; budgets (--macs, --params, --memory, --latency, together if you like); --depth, --width, --resolution"
        )
    bases = _coefficients(coefficients, alpha, beta, gamma)
    if phi is not None or multiplied:
        scaling = compound(phi, bases.alpha, bases.beta, bases.gamma) if phi is not None else Scaling(depth, width, resolution)
        scaled = scale_detector(base, scaling) if isinstance(base, DetectorArch) else scale_arch(base, scaling)
    else:
        workload = Workload(batch, training)
        fit = (
            _fit_detector(base, counts, latency, bases, workload) if isinstance(base, DetectorArch) else _fit(base, counts, latency, bases, workload)
        )
        print(f"{fit}\n")
        scaled = fit.arch
    print(scaled_table(base, scaled) if isinstance(base, DetectorArch) and isinstance(scaled, DetectorArch) else scaled)
    if save:
        write_text(save, scaled.to_json() + "\n")
        print(f"\nsaved to {save}")
    return 0


def _fit(arch: Arch, counts: dict[str, float], latency: str | None, bases: Coefficients, workload: Workload) -> Fit:
    seconds, measure = (None, None) if latency is None else (quantities.seconds(latency), _measure)
    return fit_budget(arch, **counts, latency=seconds, measure=measure, coefficients=bases, workload=workload)


def _fit_detector(arch: DetectorArch, counts: dict[str, float], latency: str | None, bases: Coefficients, workload: Workload) -> DetectorFit:
    if latency is not None:
        raise BudgetError("--latency: of networks only; give a detector --macs, --params or --memory")
    return fit_detector(arch, counts, coefficients=bases, workload=DetectorWorkload(batch=workload.batch, training=workload.training))
