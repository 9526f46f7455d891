"""detect train: long work with a progress bar and a run folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from triscale.architecture import Arch
from triscale.commands import TYRO
from triscale.commands.bars import bars
from triscale.commands.computing import Computing, Keeping, make_running
from triscale.commands.following import FIRST, PROCESSES, available_cores, follow, named_recipe
from triscale.commands.networks import read_arch
from triscale.detector import DetectorArch, detector_cost, retinanet, scale_detector
from triscale.detector_recipe import DetectorRecipe, detector_recipe
from triscale.quantities import count, short
from triscale.scaling import compound

if TYPE_CHECKING:
    from triscale.detect.coco import BoxData
    from triscale.detect.run import Boxes
    from triscale.detect.start import Start
    from triscale.recipe import Preprocess
    from triscale.train.events import Running
    from triscale.train.plan import Plan

SOME = 8  # classes, up to which each is told
PLAIN = 512  # pixels: what --phi scales from


@dataclass(frozen=True)
class Shape:
    """The detector, where it isn't mmdetection's RetinaNet-B3."""

    backbone: str | None = None
    """Any network's name, or a .json file; that of --weights, else efficientnet_b3 unless given."""
    detector: str | None = None
    """A detector's .json file instead, as `show` and a run's arch.json have it."""
    phi: float | None = None
    """Scale backbone, input side and width together by alpha, beta and gamma to this power; from 512 px unless --size is given."""
    size: int | None = None
    """Side of the input; 896 unless given."""
    width: int | None = None
    """Channels of pyramid and heads; 256 unless given."""
    head_convs: int | None = None
    """Convolutions of each head before its last; 4 unless given."""
    anchor_scale: float | None = None
    """Side of a level's smallest anchor, in its strides; 4 unless given."""


@dataclass(frozen=True)
class DetectorComputing(Computing):
    """How a step is computed."""

    workers: int | None = None
    """Threads that read images ahead; one a core, at most 8, unless given."""


@dataclass
class DetectTrain:
    """Train a RetinaNet on any backbone of these networks, on boxes in COCO's format; write a run folder with its model file, log and report."""

    data: tyro.conf.Positional[str]
    """A folder with annotations/instances_train.json and instances_val.json or instances_test.json and its images, as COCO has it; or
    train.json and so on; or Roboflow's. Pascal VOC: `detect convert` first."""
    images: str | None = None
    """The folder of the pictures, where it isn't found."""
    weights: str | None = None
    """Begin with the backbone of these: a classifier's file of any known code base, a published one, efficientnet_b3:imagenet-aa, or
    a detector of ours with its pyramid and heads. Up to a tenth of the backbone's tensors may be missing, which is told."""
    raw: bool = False
    """Of --weights, not the moving averages."""
    offline: bool = False
    """Of published checkpoints, only those in the cache."""
    shape: Shape = field(default_factory=Shape)
    recipe: str = "coco-1x"
    """Named settings, which the options below override: coco-1x, finetune."""
    keeping: Keeping = field(default_factory=Keeping)
    computing: DetectorComputing = field(default_factory=DetectorComputing)
    settings: Annotated[DetectorRecipe, tyro.conf.arg(name="")] = field(default_factory=DetectorRecipe)


def _options(args: list[str]) -> DetectTrain:
    """Parsed twice: the named recipe gives the defaults that the other options override."""
    name = named_recipe(args) or "coco-1x"
    default = DetectTrain(data=tyro.MISSING, recipe=name, settings=detector_recipe(name))
    return tyro.cli(DetectTrain, args=args, default=default, prog="triscale detect train", config=TYRO)


def detect_train(args: list[str]) -> int:
    """Trains and reports. Returns the exit status: 1 where images were left out; for torchrun that would be a crash, so there 0."""
    options = _options(args)
    from triscale.commands.running import available
    from triscale.detect.evaluate import check_evaluator
    from triscale.detect.run import detector_run
    from triscale.latency import set_threads

    check_evaluator()
    if options.computing.device != "auto":
        available(options.computing.device, PROCESSES)  # told before the data are read
    set_threads(options.computing.threads)
    options.keeping.check()
    backbone, start, preprocess = _beginning(options)
    arch = _arch(options.shape, backbone, start)
    preprocess = replace(preprocess, size=arch.backbone.resolution)
    out = options.keeping.folder(f"{Path(options.data).name or 'boxes'}-{Path(arch.backbone.name or 'network').name}")
    boxes = _boxes(options)
    running = _running(options, arch, len(boxes.train.classes))
    if FIRST:
        _describe(options, arch, boxes, running, preprocess)
    scores = _Told()
    events = detector_run(out, boxes, arch, preprocess, options.settings, options.data, running, start)
    follow(events, out, options.settings.epochs, options.settings.batch_size, scores.line)
    if not FIRST:
        return 0
    from triscale.report import render

    print(f"epoch {scores.epoch}'s model on {scores.summary}")
    print(f"model: {out / 'model.safetensors'}; scores: {out / 'scores.json'}; report: {render(out)}")
    left_out = [line for part in (boxes.train, boxes.val, boxes.test) if part for line in part.left_out] + list(scores.left_out)
    if left_out:
        print(f"{len(left_out)} images could not be used and were left out", file=sys.stderr)
    return 1 if left_out and PROCESSES == 1 else 0


class _Told:
    """What the run's evaluations said last, and the images that it left out."""

    def __init__(self) -> None:
        self.summary, self.epoch, self.left_out = "", 0, tuple[str, ...]()

    def line(self, event: object) -> str | None:
        from triscale.detect.events import Evaluated

        assert isinstance(event, Evaluated)
        n = event.scores.numbers
        by_class = ", ".join(f"{c.name} {100 * c.AP50:.1f}" for c in event.scores.classes if c.AP50 == c.AP50)
        numbers = f"box AP {100 * n['AP']:.1f}, AP50 {100 * n['AP50']:.1f}, AP75 {100 * n['AP75']:.1f}"
        self.summary = f"{event.on}, {event.scores.images} images: {numbers}"
        if len(event.scores.classes) <= SOME:
            self.summary += f"; AP50 by class: {by_class}"
        self.epoch, self.left_out = event.epoch, event.left_out
        if event.train_loss:
            return f"epoch {event.epoch}: loss {event.train_loss:.4f}, {event.on} {numbers}, {event.seconds:.0f} s"
        return None  # the summary tells it


def _beginning(options: DetectTrain) -> tuple[Arch | None, Start | None, Preprocess]:
    """The backbone as the weights have it or as it was asked for, what to load, and the normalisation that goes with it."""
    from triscale.detect.start import Start
    from triscale.recipe import Preprocess

    asked, plain = options.shape.backbone, Preprocess(1, 0, interpolation="bilinear")
    given = read_arch(asked) if asked else None
    if options.weights is None:
        if options.raw or options.offline:
            raise ValueError("--raw and --offline: of --weights, which isn't given")
        return given, None, plain
    if options.shape.phi is not None:
        raise ValueError("--phi: a detector that weights are loaded into can't be scaled; give --backbone, --size and --width")
    from triscale.commands.running import trunk

    label = Path(options.weights).name
    found = trunk(options.weights, given, raw=options.raw, offline=options.offline)
    if FIRST and found.said:
        print(f"triscale detect train: {label} doesn't say it, assumed: {'; '.join(found.said)}", file=sys.stderr)
    if found.preprocess.channels != 3:
        raise ValueError(f"--weights {options.weights}: for grey images; detectors take colour")
    normalised = replace(plain, mean=found.preprocess.mean, std=found.preprocess.std)
    return found.arch, Start(found.path, found.detector is not None, options.raw, label), normalised


def _arch(shape: Shape, backbone: Arch | None, start: Start | None) -> DetectorArch:
    """The detector that was asked for."""
    if shape.detector is not None:
        if shape.backbone is not None or shape.phi is not None:
            raise ValueError("--detector: a whole detector, which --backbone and --phi would change; leave them out")
        arch = DetectorArch.from_json(Path(shape.detector).read_text(encoding="utf-8"))
    elif start and start.detector:
        from triscale.detect.model_file import load_detector

        arch = load_detector(start.source)[1].arch
    else:
        arch = retinanet(backbone or "efficientnet_b3", PLAIN if shape.phi is not None else 896)
    if shape.detector is not None and start and not start.detector and backbone is not None:
        own, theirs = arch.backbone.numerics, backbone.numerics
        if (own.padding, own.norm_eps, own.activation) != (theirs.padding, theirs.norm_eps, theirs.activation):
            found = f"{own.padding} padding, eps {own.norm_eps:g}, {own.activation}"
            wanted = f"{theirs.padding} padding, eps {theirs.norm_eps:g}, {theirs.activation}"
            raise ValueError(f"--detector {shape.detector}: {found}, and {start.label} was trained with {wanted}; give it the weights' own")
    if shape.size is not None:
        arch = replace(arch, backbone=replace(arch.backbone, resolution=shape.size))
    if shape.width is not None:
        arch = replace(arch, pyramid=replace(arch.pyramid, channels=shape.width), head=replace(arch.head, channels=shape.width))
    if shape.head_convs is not None:
        arch = replace(arch, head=replace(arch.head, convs=shape.head_convs))
    if shape.anchor_scale is not None:
        arch = replace(arch, anchors=replace(arch.anchors, scale=shape.anchor_scale))
    return scale_detector(arch, compound(shape.phi)) if shape.phi is not None else arch


def _boxes(options: DetectTrain) -> Boxes:
    from triscale.detect.coco import read_coco
    from triscale.detect.folders import find_split, has_split
    from triscale.detect.run import Boxes

    parts: dict[str, BoxData] = {}
    if Path(options.data).is_file():
        raise ValueError(f"{options.data}: a file; expected a folder with a train split and a val or test split")
    for split in ("train", *(name for name in ("val", "test") if has_split(options.data, name))):
        source = find_split(options.data, split, options.images)
        with bars() as bar:
            task = bar.add_task(f"looking at the images of {split}", total=None, unit="images", visible=FIRST)
            parts[split] = read_coco(*source, watch=lambda done, total: bar.update(task, completed=done, total=total))  # noqa: B023
        if FIRST:
            for note in parts[split].notes:
                print(note, file=sys.stderr)
    return Boxes(parts["train"], parts.get("val"), parts.get("test"))


def _running(options: DetectTrain, arch: DetectorArch, classes: int) -> Running:
    c = options.computing
    workers = c.workers if c.workers is not None else min(8, available_cores())
    if workers < 1:
        raise ValueError(f"--workers: expected 1 or more, found {workers}")
    plan = c.plan()
    return make_running(_fitted(plan, options, arch, classes) if c.memory is not None else plan, workers, c, options.keeping)


def _fitted(plan: Plan, options: DetectTrain, arch: DetectorArch, classes: int) -> Plan:
    """With the largest part of the batch that fits --memory."""
    from triscale.detector_memory import detector_memory
    from triscale.train.plan import optimizer_slots

    limit, share = count(options.computing.memory or "0"), max(1, options.settings.batch_size // PROCESSES)
    slots = optimizer_slots(options.settings.loop(1))
    for parts in range(1, share + 1):
        at_once = -(-share // parts)
        if detector_memory(arch, classes, at_once).training(slots) <= limit:
            return replace(plan, micro_batch=0 if parts == 1 else at_once)
    needed = detector_memory(arch, classes, 1).training(slots)
    advice = "a smaller --size, --width or backbone fits, or --micro-batch 1 --recompute, which isn't counted"
    raise ValueError(f"--memory: a step of one image needs {short(needed)}B; {advice}")


def _describe(options: DetectTrain, arch: DetectorArch, boxes: Boxes, running: Running, preprocess: Preprocess) -> None:
    settings, train = options.settings, boxes.train
    c = detector_cost(arch, len(train.classes))
    name = f"RetinaNet on {arch.backbone.name or 'a network of its own'}"
    print(f"{name} at {arch.backbone.resolution} px, width {arch.pyramid.channels}: {short(c.macs)} MACs, {short(c.params)} parameters")
    counts = ", ".join(f"{len(part)} {kind}" for kind, part in (("to train on", train), ("val", boxes.val), ("test", boxes.test)) if part)
    print(f"{len(train.classes)} classes, {int(train.counts().sum())} boxes to learn; images: {counts}")
    if options.weights:
        mean, std = (" ".join(f"{v:.0f}" for v in values) for values in (preprocess.mean, preprocess.std))
        print(f"beginning with {options.weights}; colours less mean {mean} over {std}, as its code base has it")
    defaults = DetectorRecipe().to_dict()
    changed = {k: v for k, v in settings.to_dict().items() if v != defaults[k]}
    print(f"recipe {options.recipe}: {', '.join(f'{k} {v:g}' if type(v) is float else f'{k} {v}' for k, v in changed.items()) or 'as it stands'}")
    if running.plan.micro_batch:
        print(f"{running.plan.micro_batch} images at a time")
