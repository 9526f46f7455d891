"""detect convert and detect export: data and checkpoints of other code bases in; ONNX and mmdetection's checkpoints out."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from triscale.text import aligned, printable

if TYPE_CHECKING:
    from triscale.detect.model_file import DetectorCard
    from triscale.detect.retinanet import Detector

Kind = Literal["onnx", "mmdetection"]
SUFFIXES: dict[str, Kind] = {".onnx": "onnx", ".pth": "mmdetection"}


@dataclass(frozen=True, kw_only=True)
class DetectorReading:
    """What a detector's file doesn't say: ours says everything, mmdetection's checkpoint little."""

    arch: str | None = None
    """The network of mmdetection's checkpoint: retinanet_NETWORK_fpn, or a .json file; retinanet_efficientnet_b3_fpn unless given."""
    size: int | None = None
    """Side of the square in pixels instead of the file's, or the network's."""
    classes: str | None = None
    """Class names of mmdetection's checkpoint, as a,b,c; those in it unless given, or COCO's 80."""

    def open(self, command: str, source: Path) -> tuple[Detector, DetectorCard]:
        """The detector and its card; what had to be assumed is told on standard error."""
        from triscale.commands.networks import read_any
        from triscale.detect.opening import open_detector
        from triscale.detector import DetectorArch

        arch = read_any(self.arch) if self.arch else None
        if arch is not None and not isinstance(arch, DetectorArch):
            raise ValueError(f"--arch {self.arch}: a network; expected a detector, as retinanet_efficientnet_b3_fpn")
        names = tuple(name.strip() for name in self.classes.split(",")) if self.classes else ()
        net, card = open_detector(source, arch=arch, size=self.size, classes=names)
        if assumed := card.provenance.get("assumed"):
            print(f"triscale {command}: {source.name} doesn't say it, assumed: {'; '.join(assumed)}", file=sys.stderr)
        return net, card


@dataclass(frozen=True)
class DetectConvert:
    """Pascal VOC's XML as COCO JSON, or a checkpoint of mmdetection as a detector's file, which alone is enough to predict."""

    source: tyro.conf.Positional[Path]
    """voc: the folder with Annotations and JPEGImages. mmdetection: the .pth file."""
    destination: tyro.conf.Positional[Path]
    """voc: a folder, which gets annotations/instances_LIST.json; pictures stay where they are. mmdetection: a .safetensors file."""
    kind: Annotated[Literal["voc", "mmdetection"], tyro.conf.arg(name="from")]
    """What the source is."""
    reading: DetectorReading = field(default_factory=DetectorReading)


@dataclass(frozen=True)
class DetectExport:
    """A detector as an ONNX file that ONNX Runtime is seen to run as torch does, or under mmdetection's names."""

    model: tyro.conf.Positional[Path]
    """A detector's file, or a checkpoint of mmdetection."""
    destination: tyro.conf.Positional[Path]
    """The new file: .onnx, or .pth for mmdetection."""
    to: Kind | None = None
    """The format; by the suffix unless given."""
    nms: bool = False
    """ONNX: with the choice of boxes inside. Then boxes, scores, labels and counts come out, else every anchor's box and scores."""
    uint8: bool = False
    """ONNX: pictures as bytes, normalised inside."""
    batch: int | None = None
    """ONNX: pictures at a time, fixed; any number unless given."""
    reading: DetectorReading = field(default_factory=DetectorReading)


def detect_convert(args: list[str]) -> int:
    """Converts; returns the exit status."""
    from triscale.commands import TYRO

    given = tyro.cli(DetectConvert, args=args, prog="triscale detect convert", config=TYRO)
    if given.kind == "mmdetection":
        return _from_mmdetection(given)
    if given.reading != DetectorReading():
        raise ValueError("--arch, --size and --classes: of mmdetection's checkpoints; Pascal VOC's annotations have no use for them")
    return _from_voc(given.source, given.destination)


def _from_voc(source: Path, destination: Path) -> int:
    from triscale.commands.running import progress
    from triscale.detect.voc import convert_voc

    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination}: expected a folder, found a file; the lists of a VOC folder become a JSON file each")
    if there := sorted((destination / "annotations").glob("instances_*.json")):
        raise ValueError(f"{there[0]}: exists already; give another folder")
    with progress("reading XML", sum(1 for _ in source.glob("Annotations/*.[xX][mM][lL]"))) as tick:
        made = convert_voc(source, destination, lambda done, total: tick())
    for note in made.notes:
        print(f"triscale detect convert: {note}", file=sys.stderr)
    rows = [(name, str(path), f"{images}", f"{boxes}") for name, path, images, boxes in made.files]
    print(aligned(("list", "file", "images", "boxes"), rows, left=(0, 1)))
    names = printable(", ".join(made.classes))
    print(f"\n{len(made.classes)} classes: {names}\nthe pictures stay in {printable(str(made.images_root))}, which detect train takes as --images")
    return 0


def _from_mmdetection(given: DetectConvert) -> int:
    from triscale.detect.model_file import save_detector

    if given.destination.suffix != ".safetensors":
        raise ValueError(f"{given.destination}: a detector's file is a .safetensors file")
    _refuse_existing(given.destination)
    net, card = given.reading.open("detect convert", given.source)
    if "assumed" not in card.provenance:
        raise ValueError(f"{given.source}: a detector's file already, expected a checkpoint of mmdetection")
    # From now on the file says it itself; what was assumed on the way stays on record.
    provenance = {"assumed_before" if key == "assumed" else key: value for key, value in card.provenance.items()}
    save_detector(given.destination, net, replace(card, provenance=provenance))
    print(f"{given.destination}: {_about(net, card)}, {card.preprocess.size} px")
    return 0


def detect_export(args: list[str]) -> int:
    """Exports; returns the exit status."""
    from triscale.commands import TYRO

    given = tyro.cli(DetectExport, args=args, prog="triscale detect export", config=TYRO)
    to = given.to or SUFFIXES.get(given.destination.suffix.lower())
    if to is None:
        raise ValueError(f"{given.destination}: expected a name that ends in {' or '.join(SUFFIXES)}, or --to")
    _refuse_existing(given.destination)
    if to == "onnx":
        return _to_onnx(given)
    if given.nms or given.uint8 or given.batch is not None:
        raise ValueError("--nms, --uint8 and --batch: of ONNX; mmdetection's checkpoint holds tensors alone")
    from triscale.detect.mmdetection import save_mmdet

    net, card = given.reading.open("detect export", given.model)
    save_mmdet(given.destination, net, card.classes)
    print(f"{given.destination}: {_about(net, card)} under mmdetection's names")
    return 0


def _to_onnx(given: DetectExport) -> int:
    from triscale.detect.export import export_onnx

    net, card = given.reading.open("detect export", given.model)
    made = export_onnx(net, card, given.destination, nms=given.nms, batch="dynamic" if given.batch is None else given.batch, uint8=given.uint8)
    print(f"{given.destination}: {_about(net, card)}, {given.destination.stat().st_size / 1e6:.1f} MB")
    print(aligned(("", "name", "type", "shape"), [("in", *line) for line in made.inputs] + [("out", *line) for line in made.outputs], left=range(4)))
    batches = " and ".join(map(str, made.agreement.batches))
    print(f"run by ONNX Runtime on random pictures, {batches} at a time: {made.agreement.told()}")
    return 0


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path}: exists already; give another name")


def _about(net: Detector, card: DetectorCard) -> str:
    values = sum(v.numel() for v in net.state_dict().values())
    return f"{card.arch.name or 'the detector'}, {len(card.classes)} class{'es' * (len(card.classes) != 1)}, {values:,} values"
