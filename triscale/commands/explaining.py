"""explain: where in the pictures the networks find their evidence, as overlays beside each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from triscale.commands.running import Reading
from triscale.text import aligned, printable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from triscale.commands.overlay_sheet import Explained, Panel
    from triscale.model import ConvNet
    from triscale.recipe import Preprocess

Method = Literal["auto", "cam", "gradcam"]
_READING = Reading()


class _UnexplainedError(ValueError):
    """A file that can't be explained. The message is one line that names it."""


@dataclass(frozen=True)
class _Network:
    name: str
    note: str
    net: ConvNet
    preprocess: Preprocess
    classes: tuple[str, ...]
    method: str  # cam or gradcam

    def index(self, class_name: str) -> int:
        if class_name not in self.classes:
            from triscale.naming import unknown

            raise unknown(f"class of {self.name}", class_name, self.classes)
        return self.classes.index(class_name)


def explain(
    files: list[str],
    /,
    *,
    weights: str,
    compare: str = "",
    out: Path = Path("runs/explain"),
    top: int = 1,
    class_name: str | None = None,
    method: Method = "auto",
    threads: int | None = None,
    reading: Reading = _READING,
) -> int:
    """Draw where in each picture a network finds the evidence for its class: a PNG a picture, and one page with all of them.

    Args:
        files: image files, or folders of them.
        weights: the network: a file of any code base, or a published checkpoint as efficientnet_b0:imagenet-aa.
        compare: more networks, separated by commas; a column for each.
        out: a new or empty folder, or one that an earlier explain wrote.
        top: classes to explain, from each network's most probable.
        class_name: explain this class instead of the most probable.
        method: cam (needs global average pooling and a linear classifier), gradcam (any), auto (cam where it can be).
        threads: CPU threads; torch's own choice unless given.
        reading: what the files don't say.
    """
    if top < 1 or (top > 1 and class_name is not None):
        raise ValueError(f"--top: expected {'1 or more' if class_name is None else '1 with --class-name'}, found {top}")
    _refuse_foreign(out)
    from triscale.commands.overlay_sheet import SHEET, Heading, save_picture, sheet_entry, write_sheet
    from triscale.latency import set_threads
    from triscale.predict import image_files

    set_threads(threads)
    paths = image_files(files)
    if not paths:
        raise ValueError(f"no image files in {', '.join(files)}")
    networks = _networks([weights, *filter(None, map(str.strip, compare.split(",")))], method, reading)
    for network in networks:
        if class_name is not None:
            network.index(class_name)  # refuses an unknown one, before any file is read
    headings, names = [Heading(n.name, n.note) for n in networks], _Names(out, paths)
    rows: list[tuple[str, ...]] = []
    entries = []
    try:
        for found in _explain_files(paths, networks, top, class_name):
            name = names.free(found.file)
            save_picture(out / name, found, headings)
            entries.append(sheet_entry(found, name))
            rows += _rows(found, networks)
    finally:
        _counter("")
        if entries:  # after Ctrl-C too: the page shows what is done
            write_sheet(out, headings, entries, sorted({n.method for n in networks}))
    if rows:
        print(aligned(("file", "network", "class", "probability", "row", "column"), rows, left=(0, 1, 2)))
        print(f"\nRow and column of the map's maximum: from the top left, in % of the pixels that the network saw. Page: {out / SHEET}")
    if failures := len(paths) - len(entries):
        print(f"triscale explain: {failures} of {len(paths)} files could not be explained", file=sys.stderr)
    return 0 if not failures else 1 if entries else 2


def _networks(sources: Sequence[str], method: Method, reading: Reading) -> list[_Network]:
    """Every network with its heading."""
    from triscale.cost_model import cost
    from triscale.explain import has_linear_head
    from triscale.quantities import short

    out = []
    for source in sources:
        net, card = reading.open("explain", source)
        if net.classifier is None:
            raise ValueError(f"{source}: has no classifier, so there is no class to explain")
        preprocess = card.preprocess
        used = ("cam" if has_linear_head(net) else "gradcam") if method == "auto" else method
        macs = cost(card.arch, len(card.classes), preprocess.channels, resolution=preprocess.size).macs
        note = f"{preprocess.size} px, {short(macs)} MACs, {'CAM' if used == 'cam' else 'Grad-CAM'}"
        out.append(_Network(card.arch.name or Path(source).stem, note, net, preprocess, card.classes, used))
    return [replace(n, name=name) for n, name in zip(out, _apart([n.name for n in out], sources), strict=True)]


def _apart(names: Sequence[str], sources: Sequence[str]) -> list[str]:
    """`names`, those that clash told apart by their files' stems, folders or, where these clash too, whole paths."""
    paths = [Path(source) for source in sources]
    candidates = ([p.stem for p in paths], [p.resolve().parent.name for p in paths], list(sources))
    more = next((c for c in candidates if len(set(c)) == len(c)), list(sources))
    return [f"{name} ({m})" if names.count(name) > 1 else name for name, m in zip(names, more, strict=True)]


def _explain_files(files: Sequence[str], networks: Sequence[_Network], top: int, class_name: str | None) -> Iterator[Explained]:
    """What is found in each file, in order; those that can't be explained are named on standard error and left out."""
    for i, file in enumerate(files):
        _counter(f"{i + 1} of {len(files)}" if len(files) > 1 else "")
        try:
            found = _explain_file(file, networks, top, class_name)
        except _UnexplainedError as error:
            _counter("")
            print(f"triscale explain: {printable(str(error))}", file=sys.stderr)
        else:
            yield found


def _explain_file(file: str, networks: Sequence[_Network], top: int, class_name: str | None) -> Explained:
    import numpy as np
    import torch

    from triscale.commands.overlay_sheet import Explained
    from triscale.data.decode import BadImage, decode
    from triscale.data.transform import evaluate_transform, square

    try:
        image = decode(file)
    except BadImage as error:
        raise _UnexplainedError(str(error)) from None
    columns: list[list[Panel]] = []
    first = square(image, networks[0].preprocess)
    for network in networks:
        pixels = square(image, network.preprocess)
        x = torch.from_numpy(evaluate_transform(image, network.preprocess))[None]
        with torch.no_grad():
            probabilities = network.net(x)[0].float().softmax(0)
        if not bool(probabilities.isfinite().all()):
            raise _UnexplainedError(f"{file}: the output of {network.name} is not finite; its weights are broken")
        few = min(top, *(len(n.classes) for n in networks))  # as many in each column
        chosen = probabilities.topk(few).indices.tolist() if class_name is None else [network.index(class_name)]
        columns.append([_panel(network, x, pixels, index, float(probabilities[index])) for index in chosen])
    note = f"from {image.shape[1]} × {image.shape[0]} px"
    return Explained(file, note, np.broadcast_to(first, (*first.shape[:2], 3)).copy(), tuple(zip(*columns, strict=True)))


def _panel(network: _Network, x: Tensor, pixels: np.ndarray, index: int, probability: float) -> Panel:
    from triscale.commands.overlay_sheet import Panel
    from triscale.explain import cell_centres, class_activation, grad_cam, overlay, peak, upsample

    size = (x.shape[2], x.shape[3])
    grid = (class_activation if network.method == "cam" else grad_cam)(network.net, x, [index])[0]
    centres = cell_centres(network.net, size)
    return Panel(overlay(pixels, upsample(grid, size, centres)), network.classes[index], probability, peak(grid, size, centres))


def _rows(found: Explained, networks: Sequence[_Network]) -> list[tuple[str, ...]]:
    panels = [(network.name, panel) for row in found.rows for network, panel in zip(networks, row, strict=True)]
    return [(found.file if i == 0 else "", name, p.label, p.percent, *p.place) for i, (name, p) in enumerate(panels)]


class _Names:
    """File names in `out`, one a picture, that neither clash with each other nor with a file that is to be explained."""

    def __init__(self, out: Path, files: Sequence[str]) -> None:
        self.out = out
        self.taken = {Path(file).name.lower() for file in files if Path(file).resolve().parent == out.resolve()}

    def free(self, file: str) -> str:
        stem, i = printable(Path(file).stem)[:80], 1
        name = f"{stem}.png"
        while name.lower() in self.taken:  # lower case: some file systems tell no difference
            i += 1
            name = f"{stem}-{i}.png"
        self.taken.add(name.lower())
        return name


def _refuse_foreign(out: Path) -> None:
    """Pictures would overwrite others of the same name: only a folder that is empty or has a page of ours is written into."""
    from triscale.commands.overlay_sheet import MARK, SHEET

    if not out.exists():
        return
    if out.is_dir():
        if not any(out.iterdir()):
            return
        if (out / SHEET).is_file():
            with open(out / SHEET, encoding="utf-8", errors="replace") as page:
                if MARK in page.read(1000):
                    return
    raise ValueError(f"--out {out}: exists already, and is neither an empty folder nor one that explain wrote; give another")


def _counter(text: str) -> None:
    """What is being done, on a line that the next call takes away; nothing where standard error is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
