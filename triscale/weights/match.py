"""A checkpoint's tensors against a network's: which dialect, which network, what fits, and what doesn't."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

from triscale.architecture import Arch
from triscale.families import arch as named_arch
from triscale.families import names as arch_names
from triscale.weights.dialects import Dialect, WeightsError
from triscale.weights.parts import Shape, tensors
from triscale.weights.tables import DIALECTS

SHOWN = 10  # names an error lists before it counts the rest
COUNTERS = ("num_batches_tracked", "n_averaged")  # torch's counters, which nothing reads
MOST_MISSING = 0.1  # share of the trunk's tensors that a checkpoint for transfer may lack; with fewer it is another network


@dataclass(frozen=True)
class Match:
    """Which tensor of a checkpoint is which of ours. theirs: our names -> the file's, for those that are there and fit.

    missing, left_over, wrong: names in the file's dialect; a wrong one with both shapes.
    """

    arch: Arch
    dialect: Dialect
    theirs: dict[str, str]
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return not (self.missing or self.left_over or self.wrong)

    def difference(self) -> str:
        """`2 missing: a, b; 1 left over: c`: the first ten of each kind and a count."""
        kinds = {"missing": self.missing, "left over": self.left_over, "of another shape": self.wrong}
        return "; ".join(f"{len(items)} {kind}: {listing(items)}" for kind, items in kinds.items() if items)


def listing(items: Collection[str]) -> str:
    more = f", ... and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(list(items)[:SHOWN]) + more


def recognise(keys: Collection[str]) -> Dialect:
    """The dialect that the names are in. Raises WeightsError where it is none of them."""
    for dialect in DIALECTS:
        mark = re.compile(dialect.mark)
        if any(mark.fullmatch(key) for key in keys):
            return dialect
    known = ", ".join(dict.fromkeys(d.project for d in DIALECTS))
    raise WeightsError(f"tensor names of no known dialect ({known}): {listing(list(keys))}")


def match(shapes: Mapping[str, Shape], arch: Arch, num_classes: int = 1000, in_channels: int = 3, *, dialect: Dialect | None = None) -> Match:
    """A checkpoint's tensors, name -> shape, held to the network's: nothing is read and nothing refused yet."""
    dialect = dialect or recognise(shapes)
    expected = tensors(arch, num_classes, in_channels)
    named = dialect.names(arch, expected)
    theirs, missing, wrong = {}, [], []
    for key, name in named.items():
        if name not in shapes:
            missing.append(name)
        elif (wanted := dialect.shape(key, expected[key])) != shapes[name]:
            wrong.append(f"{name} {shapes[name]} instead of {wanted}")
        else:
            theirs[key] = name
    known = set(named.values())
    ignored = dialect.others if dialect.layout == "tensorflow" else ()  # a preprocessing layer is no tensor of the network
    left = [name for name in shapes if name not in known and not name.endswith(COUNTERS) and not name.startswith(ignored)]
    return Match(arch, dialect, theirs, tuple(missing), tuple(left), tuple(wrong))


def strict(found: Match) -> Match:
    """`found` where everything fits; else WeightsError lists what is missing, left over or of another shape."""
    if not found.whole:
        raise WeightsError(f"weights don't fit {found.arch.name or 'the network'}: {found.difference()}")
    return found


def for_transfer(found: Match, num_classes: int) -> tuple[Match, str]:
    """What transfer takes of a checkpoint, and a line that says what stays fresh.

    The classifier may be missing or of another number of classes; up to a tenth of the trunk's tensors may be missing; the
    neck and heads of a detector may be left over. Else WeightsError.
    """
    classifier = {name for key, name in found.dialect.names(found.arch, tensors(found.arch)).items() if key.startswith("classifier")}
    keep = {"classifier.weight", "classifier.bias"} <= found.theirs.keys()
    theirs = {key: name for key, name in found.theirs.items() if keep or not key.startswith("classifier")}
    missing = [name for name in found.missing if name not in classifier]
    wrong = tuple(text for text in found.wrong if text.split(" ")[0] not in classifier)
    left = tuple(name for name in found.left_over if name not in classifier and not name.startswith(found.dialect.others))
    total = sum(not key.startswith("classifier") for key in tensors(found.arch))
    if wrong or left or len(missing) > MOST_MISSING * total:
        rest = Match(found.arch, found.dialect, theirs, tuple(missing), left, wrong)
        raise WeightsError(f"weights are no trunk of {found.arch.name or 'the network'}: {rest.difference()}")
    fresh = ([f"the classifier of {num_classes} classes"] if num_classes and not keep else []) + missing
    return Match(found.arch, found.dialect, theirs), f"fresh, not from the checkpoint: {listing(fresh)}" if fresh else ""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint's names and shapes say. num_classes 0: no classifier in it."""

    arch: Arch
    dialect: Dialect
    num_classes: int
    in_channels: int


def identify(shapes: Mapping[str, Shape], arch: Arch | None = None, *, numerics_too: bool = False) -> Identity:
    """The dialect and network of a checkpoint. arch: where it is known; else the named network whose tensors these are.

    A network that lacks some tensors is named too, by most that fit; `match` then says which lack. Numerics are those of the
    code base, unless the given Arch's are meant (numerics_too). Raises WeightsError where no named network comes near.
    """
    dialect = recognise(shapes)
    if arch is not None:
        return _identity(dialect, arch if numerics_too else dialect.computes(arch), shapes)
    best, best_fit = None, 0.0
    for name in arch_names():
        candidate = named_arch(name)
        try:
            expected = _expected(candidate, dialect)
        except WeightsError:
            continue
        trunk = {key for key, shape in expected.items() if shape}
        classifier = expected.keys() - trunk
        theirs = sum(key not in classifier and not key.endswith(COUNTERS) and not key.startswith(dialect.others) for key in shapes)
        fit = sum(shapes.get(key) == expected[key] for key in trunk) / max(len(trunk), theirs)
        if fit > best_fit:
            best, best_fit = candidate, fit
    if best is None or best_fit < 0.85:
        near = f" (nearest is {best.name}, of which {best_fit:.0%} of the tensors fit)" if best else ""
        raise WeightsError(f"tensors in {dialect.name} names, but of no named network{near}; give its architecture")
    return _identity(dialect, dialect.computes(best), shapes)


@cache
def _expected(arch: Arch, dialect: Dialect) -> dict[str, Shape]:
    """Name -> shape there, () for the classifier, whose number of classes is open."""
    ours = tensors(arch)
    named = dialect.names(arch, ours)
    return {name: () if key.startswith("classifier") else dialect.shape(key, ours[key]) for key, name in named.items()}


def _identity(dialect: Dialect, arch: Arch, shapes: Mapping[str, Shape]) -> Identity:
    ours = tensors(arch)
    named = dialect.names(arch, ours)
    stem, bias = shapes.get(named["stem.conv.weight"]), shapes.get(named["classifier.bias"])
    in_channels = stem[dialect.axes("stem.conv.weight", 4).index(1)] if stem and len(stem) == 4 else 3
    return Identity(arch, dialect, bias[0] if bias and len(bias) == 1 else 0, in_channels)
