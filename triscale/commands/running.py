"""What the commands that run a network share: which weights, on what, with a progress bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from triscale.text import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from triscale.architecture import Arch
    from triscale.detector import DetectorArch
    from triscale.inference import Optimized
    from triscale.model import ConvNet
    from triscale.recipe import Preprocess
    from triscale.weights.model_file import ModelCard

Normalise = Literal["imagenet", "unit", "lite", "centred"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a weights file doesn't say of itself."""

    arch: str | None = None
    """The network of a checkpoint that doesn't tell it: a name, or a .json file, whose numerics then count too."""
    raw: bool = False
    """The weights themselves where the checkpoint has moving averages of them too."""
    numerics: Literal["auto", "tensorflow", "torch"] = "auto"
    """tensorflow: SAME padding, eps 1e-3; torch: symmetric padding, eps 1e-5; where timm's names leave it open."""
    size: int | None = None
    """Input side in pixels instead of the network's."""
    normalise: Normalise | None = None
    """imagenet; unit: to -1..1 (AdvProp); lite: (x - 127) / 128; centred: (x - 128) / 128; instead of the file's."""
    offline: bool = False
    """Of published checkpoints, only those in the cache."""

    def open(self, command: str, source: str) -> tuple[ConvNet, ModelCard]:
        """The network and its card; what had to be assumed is told on standard error. source: a file, or NETWORK:TAG."""
        from triscale.commands.networks import read_arch
        from triscale.weights.open import open_model

        given = read_arch(self.arch) if self.arch else None
        entry = _entry(source)
        if entry:
            if given or self.numerics != "auto":
                raise ValueError(f"{source}: published weights know their network and numerics; leave --arch and --numerics out")
            path = _fetch(entry, self.offline)
            net, card = open_model(path, arch=entry.network(), raw=self.raw, preprocess=entry.preprocess, numerics="arch")
            card = replace(card, provenance={**card.provenance, "published": entry.name, "assumed": []})
        else:
            as_given: Any = "arch" if self.arch and self.arch.endswith(".json") and self.numerics == "auto" else self.numerics
            net, card = open_model(source, arch=given, raw=self.raw, numerics=as_given)
        if assumed := card.provenance.get("assumed"):
            print(f"triscale {command}: {os.path.basename(source)} doesn't say it, assumed: {'; '.join(assumed)}", file=sys.stderr)
        return net, replace(card, preprocess=self._preprocess(card))

    def _preprocess(self, card: ModelCard) -> Any:
        from triscale.weights.zoo import NORMALISE

        preprocess = card.preprocess
        if self.size is not None:
            preprocess = replace(preprocess, size=self.size)
        if self.normalise is not None:
            mean, std = NORMALISE[self.normalise]
            if preprocess.channels != len(mean):
                raise ValueError(f"--normalise {self.normalise}: for colour images, and this network takes grey ones")
            preprocess = replace(preprocess, mean=mean, std=std)
        return preprocess


@dataclass(frozen=True, kw_only=True)
class Weights(Reading):
    """Which network, and what its file doesn't say."""

    weights: str
    """A model file; a checkpoint of timm, torchvision, lukemelas, OpenMMLab, Keras or the official code; or a published one by
    its network and training, efficientnet_b0:imagenet-aa."""


class Trunk(NamedTuple):
    """A checkpoint whose backbone is wanted: where it lies, the classifier's network in the weights' numerics, its preprocessing,
    what was assumed of the network; detector: its DetectorArch where it is a detector's file of ours."""

    path: str | os.PathLike[str]
    arch: Arch
    preprocess: Preprocess
    said: tuple[str, ...] = ()
    detector: DetectorArch | None = None


def trunk(source: str, arch: Arch | None, *, raw: bool = False, offline: bool = False) -> Trunk:
    """A file of any known kind, ours or another's, or NETWORK:TAG. arch: of a checkpoint that doesn't tell it; one that contradicts the
    file is refused."""
    from triscale.detect.model_file import KEY as DETECTOR
    from triscale.detect.model_file import load_detector
    from triscale.weights.model_file import KEY, load_model
    from triscale.weights.open import trunk_of
    from triscale.weights.readers import open_tensors

    if entry := _entry(source):
        if arch is not None and replace(arch, resolution=entry.network().resolution) != entry.network():
            raise ValueError(f"--weights {source}: of another network than --backbone; leave one of the two out")
        return Trunk(_fetch(entry, offline), entry.network(), entry.preprocess)
    metadata = open_tensors(source, raw=raw).metadata
    if KEY not in metadata and DETECTOR not in metadata:
        known, preprocess, said = trunk_of(source, arch=arch, raw=raw)
        return Trunk(source, known, preprocess, tuple(line for line in said if not line.startswith("preprocessing")))
    if DETECTOR in metadata and raw:
        raise ValueError(f"--raw: {source} is a detector's file of ours, which holds one set of weights; leave it out")
    detector = load_detector(source)[1] if DETECTOR in metadata else None
    card = load_model(source)[1] if detector is None else None
    known, preprocess = (detector.arch.backbone, detector.preprocess) if detector else (card.arch, card.preprocess)  # type: ignore[union-attr]
    if arch is not None and replace(arch, head=known.head, resolution=known.resolution) != known:
        differs = (
            "computes otherwise than" if replace(arch, numerics=known.numerics, head=known.head, resolution=known.resolution) == known else "is not"
        )
        raise ValueError(f"--weights {source}: carries its own network ({known.name or 'unnamed'}), which {differs} --backbone; leave that out")
    return Trunk(source, known, preprocess, (), detector.arch if detector else None)


def _entry(source: str) -> Any:
    """The published checkpoint that `NETWORK:TAG` names; None for a path."""
    from triscale.families import names
    from triscale.weights.zoo import find

    name, colon, tag = source.partition(":")
    if not colon or os.path.exists(source) or name not in names():
        return None
    return find(name, tag)


def _fetch(entry: Any, offline: bool) -> Any:
    from triscale.weights.fetch import fetch

    if not sys.stderr.isatty():
        return fetch(entry, offline=offline)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(f"fetching {entry.name}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        return fetch(entry, offline=offline, progress=lambda done, total: bar.update(task, completed=done, total=total))


@dataclass(frozen=True)
class Speed:
    """How the work is done; none of it changes the results, but for rounding."""

    batch: int = 16
    """Images at a time."""
    workers: int | None = None
    """Threads that read images and run the network; as many as torch has unless given."""
    threads: int | None = None
    """CPU threads in all; torch's own choice unless given."""
    device: str = "auto"
    """cpu, cuda, auto (cuda where there is one), or another device of torch."""

    def check(self) -> None:
        """Raises ValueError for numbers below 1."""
        if self.batch < 1 or (self.workers is not None and self.workers < 1):
            raise ValueError(f"--batch and --workers: expected 1 or more, found {self.batch} and {self.workers}")


@dataclass(frozen=True)
class EngineSpeed(Speed):
    """How a classifier does its work; rounding is bfloat16's with `engine` auto on a GPU."""

    engine: Literal["auto", "torch"] = "auto"
    """auto: for more than 200 images what is fastest here: on an NVIDIA GPU kernels of our own in bfloat16, on a CPU the same float32
    arithmetic in fewer steps. torch: the network as it is."""

    def prepare(self, net: ConvNet, images: int, world: int = 1) -> Forward:
        """Sets the threads; the network on the device. images: to come. world: processes that share the work."""
        import torch

        from triscale.latency import set_threads

        set_threads(self.threads)
        device = available(self.device, world)
        return Forward(net.to(device).eval().to(memory_format=torch.channels_last), device, self, images)


FEW, MANY = 200, 100_000  # images for which a second or two of measuring doesn't pay (on a GPU half a minute of compiling); and minutes do


class Forward:
    """A network in evaluation mode as a function of batches on the CPU: optimised where more than FEW images are to come, the same
    way for all of them. Several threads may call it."""

    def __init__(self, net: ConvNet, device: str, speed: EngineSpeed, images: int) -> None:
        from triscale.inference import optimize

        self.net, self.device, self.batch = net, device, speed.batch
        self.optimised: Optimized | None = None
        if speed.engine == "auto" and images > FEW:
            precision: Literal["float32"] | None = None if device.startswith("cuda") else "float32"
            self.optimised = optimize(net, precision=precision, measure=images > MANY, tell=notices("triscale"))

    @property
    def used(self) -> list[str]:
        """How it has computed so far."""
        engine = self.optimised.engine if self.optimised else None
        return list(engine.used) if engine and not isinstance(engine, str) else ["eager"]

    def __call__(self, x: Tensor) -> Tensor:
        import torch

        n = len(x)
        x = x.to(self.device, memory_format=torch.channels_last)
        if self.optimised is None:
            return self.net(x).float().cpu()
        if x.is_cuda and n < self.batch:  # a last batch is filled up: another shape would be compiled
            x = x.repeat(-(-self.batch // n), 1, 1, 1)[: self.batch]
        return self.optimised(x)[:n].float().cpu()


def notices(command: str) -> Callable[[str], None]:
    """Writes what `optimize` tells to standard error, each text once, in the command line's words."""
    from triscale.inference.notices import Once

    return Once(lambda text: print(f"{command}: {text.removeprefix('optimize: ')}".replace("precision='float32'", "--engine torch"), file=sys.stderr))


def available(device: str, world: int = 1) -> str:
    """`device`, of its kind the one of this process where there are several; ValueError where torch doesn't have it."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {first_line(error)}") from None
    return device


@contextmanager
def progress(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """A bar with rate and time left on standard error where that is a terminal, else nothing; call what it gives once an image."""
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    start, done = time.perf_counter(), 0
    columns = (
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, rate="")

        def tick() -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, rate=f"{done / (time.perf_counter() - start):.0f} images/s")

        yield tick
