"""Training a detector: the run and its folder.

A run folder holds recipe.json, arch.json (the DetectorArch), log.jsonl, model.safetensors (the last finished epoch), scores.json (the
final numbers), samples.npz and found.npz (for the report), and states/ to resume from.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triscale.data.sources import DataError
from triscale.detect.batches import BoxBatches
from triscale.detect.coco import BoxData
from triscale.detect.evaluate import Results, Scores, check_evaluator, coco_results, coco_scores, matched_ids
from triscale.detect.events import Evaluated
from triscale.detect.kept import Drawn, marked, nothing, write_found, write_seen
from triscale.detect.losses import Target
from triscale.detect.model_file import DetectorCard, load_detector, save_detector
from triscale.detect.retinanet import Outputs
from triscale.detect.start import Start, start_detector
from triscale.detector import DetectorArch
from triscale.detector_recipe import DetectorRecipe
from triscale.evaluate import whole_batches
from triscale.files import write_text
from triscale.recipe import Preprocess, Recipe
from triscale.run_log import RunLog
from triscale.train.dist import World, gathered, local_batch, sharded, told, world
from triscale.train.events import Resumed, Running, Saved
from triscale.train.loop import EpochEnd, Note, Step
from triscale.train.run import Run
from triscale.train.state import TrainState
from triscale.train.syncnorm import share_norms
from triscale.version import __version__

MODEL, SCORES = "model.safetensors", "scores.json"


@dataclass(frozen=True)
class Boxes:
    """What a detector is trained and judged on. val: after every epoch, where it isn't None; test: at the end, the final numbers;
    without it they are those on val. Both have the classes of `train`, by name. Raises DataError where they
    haven't, or a split has no boxes."""

    train: BoxData
    val: BoxData | None = None
    test: BoxData | None = None

    def __post_init__(self) -> None:
        if self.val is None and self.test is None:
            raise DataError("expected boxes to judge the detector by: a val or a test split")
        for name, part in (("train", self.train), ("val", self.val), ("test", self.test)):
            if part is not None and not part.counts().any():
                what = "to learn" if part is self.train else "to be found"
                raise DataError(f"{name}: expected boxes {what}, found none in its {len(part)} images")
            if part is not None and set(part.classes) != set(self.train.classes):
                gone, new = ([c for c in a.classes if c not in b.classes] for a, b in ((self.train, part), (part, self.train)))
                what = "; ".join(f"{', '.join(c[:5])} {how}" for c, how in ((gone, "missing"), (new, "new")) if c)
                raise DataError(f"{name}: other classes than those of train: {what}; give both JSON files the same categories")

    @property
    def final(self) -> tuple[str, BoxData]:
        if self.test is not None:
            return "test", self.test
        assert self.val is not None
        return "val", self.val

    def fingerprint(self) -> dict[str, Any]:
        """What tells one data set from another: counts, and a sum over all images' names and boxes."""
        check = 0
        for part in (self.train, self.val, self.test):
            for i, entry in enumerate(part.images if part else ()):
                assert part is not None
                boxes, labels = part.targets(i)
                check = zlib.crc32(labels.tobytes(), zlib.crc32(boxes.tobytes(), zlib.crc32(repr(entry).encode(errors="surrogateescape"), check)))
        return {"images": self.counts(), "boxes": f"{check:08x}"}

    def counts(self) -> dict[str, int]:
        """Images of each split."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: len(part) if part else 0 for name, part in parts.items()}


def box_batches(data: BoxData, preprocess: Preprocess, recipe: DetectorRecipe, running: Running, share: tuple[int, int] = (0, 1)) -> BoxBatches:
    """The recipe's batches of a data set, as a run takes them."""
    return BoxBatches(
        data, preprocess, recipe.batch_size, seed=recipe.seed, ratios=recipe.ratios, flip=recipe.flip,
        numbers=None if recipe.empty_images else data.with_boxes().tolist(), workers=running.workers, share=share,
        device=running.plan.device, broken_share=running.broken_share,
    )  # fmt: skip


def detector_run(
    out: Path,
    boxes: Boxes,
    arch: DetectorArch,
    preprocess: Preprocess,
    recipe: DetectorRecipe,
    name: str,
    running: Running | None = None,
    start: Start | None = None,
) -> Iterator[Step | Evaluated | Saved | Resumed | Note]:
    """Trains with the run folder written as it goes, in as many processes as torchrun started; process 0 writes.

    The same arguments, seed and number of threads give the same numbers on the same machine. name: what the model file calls the
    data. Each process divides its losses by its own number of positive anchors, as mmdetection does, and so does each part of a
    batch that plan.micro_batch cuts. Raises ResumeError, Stopped and OSError as `train.run` does.
    """
    check_evaluator()
    running = running or Running()
    with world(running.plan.device) as here:
        running = replace(running, plan=replace(running.plan, device=str(here.device)))
        task = _Task(out, boxes, arch, preprocess, recipe, name, running, start, here)
        log = lambda steps: RunLog(out, tensorboard=running.tensorboard, steps_per_epoch=steps)  # noqa: E731
        yield from Run(out, task, task.loop, running, here, log).events()


class _Task:
    """A detector as `train.run` trains it."""

    def __init__(
        self, out: Path, boxes: Boxes, arch: DetectorArch, preprocess: Preprocess,
        recipe: DetectorRecipe, name: str, running: Running, start: Start | None, here: World,
    ) -> None:  # fmt: skip
        self.out, self.boxes, self.preprocess, self.recipe, self.arch, self.name = out, boxes, preprocess, recipe, arch, name
        self.plan, self.start, self.workers, self.here = running.plan, start, running.workers, here
        if recipe.keep == "best" and boxes.val is None:
            raise ValueError("--keep best: by AP on val, and there is no val split; last goes with that")
        self.batches = box_batches(boxes.train, preprocess, recipe, running, (here.rank, here.size))
        self.loop: Recipe = replace(recipe, batch_size=self.batches.size).loop(len(self.batches))
        share = local_batch(self.batches.size, here)
        together = min(self.plan.micro_batch or share, share)  # images that a process computes at a time
        _check_norms(arch, share % together or together)
        network = start_detector(arch, boxes.train.classes, preprocess.channels, recipe, start)
        self.net, self.noted = network.net.to(here.device), [*network.said, *self._shortened()]
        norms = _share_norms(self.net.backbone, recipe, together, here)
        build = (lambda kind, groups, **o: sharded(kind, groups, here, **o)) if running.shard else None
        self.state = TrainState(self.net, self.loop, build, network.prepare)
        self.identity: dict[str, Any] = {
            "recipe": recipe.to_dict(),
            "arch": json.loads(arch.to_json()),
            "preprocess": preprocess.to_dict(),
            "classes": list(boxes.train.classes),
            "data": boxes.fingerprint(),
            "weights": network.weights,
            "images a norm": norms,
            "images at a time": together,
        }
        self.files = {"recipe.json": json.dumps(recipe.to_dict(), indent=1), "arch.json": arch.to_json()}
        self.best, self.unreadable = -1.0, dict[str, None]()
        self.latest: tuple[int, Results, Scores] | None = None  # the last epoch judged on val since this process began; process 0 knows

    def _shortened(self) -> Iterator[str]:
        """What the recipe asks for and so small a data set hasn't."""
        if (size := self.batches.size) < self.recipe.batch_size:
            yield f"batches of {size} images, as there are no more, instead of {self.recipe.batch_size}; the learning rate is for {size}"
        steps = round(self.loop.warmup_epochs * len(self.batches))
        if steps < self.recipe.warmup_steps:
            yield f"a warm-up of {steps} steps, a third of all, instead of {self.recipe.warmup_steps}"

    def loss(self, outputs: Outputs, targets: Sequence[Target]) -> Tensor:
        """The sum of both losses, float32."""
        losses = self.net.losses(outputs, targets)
        return losses.classes + losses.boxes

    def renewed(self, about: dict[str, Any]) -> dict[str, Any]:
        return {**about, "recipe": DetectorRecipe.from_dict(about["recipe"]).to_dict()}

    def begin(self) -> None:
        """Augmented training views with their boxes, for the report."""
        write_seen(self.out, self._views(), self.name, self.boxes.train, self.boxes.counts())

    def _views(self) -> Iterator[Drawn]:
        """Those of the first epoch, in its order, as the network gets them."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
        for images, targets, numbers in self.batches.epoch(0):
            for image, target, name in zip(images, targets, self.batches.names(numbers), strict=True):
                pixels = (image.cpu() * std + mean).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
                yield Drawn(name, pixels, marked(target.boxes.cpu().numpy(), target.labels.cpu().numpy()), nothing())

    def said(self) -> list[str]:
        return [*self.noted, *(f"left out: {reason}" for reason in self.left_out())]

    def left_out(self) -> tuple[str, ...]:
        """Why each image that couldn't be read so far was left out."""
        return tuple(dict.fromkeys((*self.batches.left_out.values(), *self.unreadable)))

    def share(self, everyones: Callable[[list[str]], list[str]]) -> None:
        self.unreadable |= dict.fromkeys(everyones(list(self.batches.left_out.values())))

    def judge(self) -> Results | None:
        """None in every process where there is no val."""
        return self._found("val", self.boxes.val) if self.boxes.val is not None else None

    def evaluate(self, judged: Results | None, event: EpochEnd, log: RunLog, seconds: float) -> Iterator[Evaluated | Saved]:
        """The numbers on val, where there is one, and the model's file."""
        epoch, scores = event.epoch + 1, None
        if judged is not None and self.boxes.val is not None:
            scores = coco_scores(self.boxes.val, judged.rows, left_out=judged.unreadable)
            self.latest = epoch, judged, scores
        ap, ap50 = (scores.numbers["AP"], scores.numbers["AP50"]) if scores else (None, None)
        log.epoch(epoch=epoch, step=self.state.step, loss=event.loss, seconds=seconds, ap=ap, ap50=ap50)
        if scores:
            yield Evaluated(epoch, event.loss, scores, seconds, self.net, "val", self.left_out())
        if self.recipe.keep == "best" and ap is not None:
            if ap <= self.best:
                return
            self.best = ap
        path = self.out / MODEL
        provenance: dict[str, Any] = {"data": self.name, "epoch": epoch, "triscale": __version__, "recipe": self.recipe.to_dict()}
        if self.start:
            provenance["from"] = self.start.label
        measured = {f"val_{name}": value for name, value in scores.numbers.items() if value == value} if scores else {}
        train = self.boxes.train
        card = DetectorCard(self.arch, self.preprocess, train.classes, train.category_ids, self.net.rules, provenance, measured)
        save_detector(path, self.net, card)
        log.saved(self.state.step, path)
        yield Saved(epoch, path)

    def judge_kept(self) -> Results | None:
        """None in every process where process 0 has judged that model."""
        weights = told(self._unjudged, self.here)
        if weights is None:
            return None
        self.net.load_state_dict(weights)
        return self._found(*self.boxes.final)

    def _unjudged(self) -> dict[str, Tensor] | None:
        """The weights in the file; None where what they find is known."""
        net, card = load_detector(self.out / MODEL)
        known = self.boxes.test is None and self.latest and self.latest[0] == card.provenance["epoch"]
        return None if known else net.state_dict()

    def finish(self, judged: Results | None, log: RunLog, seconds: float) -> Iterator[Evaluated]:
        """The final numbers: those of the model in the file."""
        path, (on, data) = self.out / MODEL, self.boxes.final
        net, card = load_detector(path)
        epoch = int(card.provenance["epoch"])
        if judged is None:
            assert self.latest
            _, found, scores = self.latest
        else:
            found, scores = judged, coco_scores(data, judged.rows, left_out=judged.unreadable)
        measured = {**card.measured, **{f"{on}_{name}": value for name, value in scores.numbers.items() if value == value}}
        save_detector(path, net, replace(card, measured=measured))
        write_scores(self.out / SCORES, scores, on)
        write_found(self.out, data, found.rows, scores, left_out=found.unreadable)
        yield Evaluated(epoch, 0.0, scores, seconds, self.net, on, self.left_out())

    def _found(self, on: str, data: BoxData) -> Results | None:
        """What all processes find in their parts of the images: in process 0, None in the others."""
        ids, batch = matched_ids(self.boxes.train.classes, data), self.plan.micro_batch or 8
        mine = whole_batches(len(data), batch, (self.here.rank, self.here.size))
        part = coco_results(self.net, data, self.preprocess, category_ids=ids, numbers=mine, batch=batch, workers=self.workers or None)
        parts = gathered(part, self.here)
        if parts is None:
            return None
        found = Results.joined(parts)
        self.unreadable |= dict.fromkeys(found.unreadable.values())
        if found.broken:
            self.noted.append(f"{on}: outputs not finite for {len(found.broken)} of {len(data)} images, where nothing counts as found")
        return found


def write_scores(path: Path, scores: Scores, on: str) -> None:
    """COCO's numbers and those by class as JSON; null where there is nothing to count."""
    classes = [_plain(c._asdict()) for c in scores.classes]
    write_text(path, json.dumps({"split": on, "images": scores.images, **_plain(scores.numbers), "classes": classes}, indent=1))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if value != value else value for key, value in values.items()}


def _check_norms(arch: DetectorArch, images: int) -> None:
    """Raises ValueError where a batch norm would see a single value: one image at a time, the coarsest map a single place."""
    stride = arch.pyramid.strides[-1]
    if images == 1 and arch.backbone.resolution <= stride and (arch.pyramid.norm or arch.head.norm):
        found = (
            f"one image of {arch.backbone.resolution} px at a time, whose map of stride {stride} is a single place, with no variance to normalise by"
        )
        raise ValueError(f"{found}; a --size above {stride} or a larger --batch-size or --micro-batch has one")


def _share_norms(backbone: nn.Module, recipe: DetectorRecipe, images: int, here: World) -> int:
    """The backbone's norms over all processes, in place, where the recipe says so; returns how many images they see. images: at a
    time in each process."""
    if recipe.sync_norms and not recipe.freeze_norms and here.size > 1:
        share_norms(backbone, here, here.size)
        return images * here.size
    return images
