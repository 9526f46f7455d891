"""predict and convert: image files in, classes out; weights in, another code base's weights out."""

from __future__ import annotations

import csv
import json as json_module
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from triscale.commands.running import EngineSpeed, Reading, Weights, progress
from triscale.text import aligned, printable

if TYPE_CHECKING:
    from triscale.predict import Prediction

Target = Literal["timm", "torchvision", "lukemelas", "openmmlab", "keras-npz", "triscale"]
_DEFAULT = EngineSpeed()


def predict(
    files: list[str],
    /,
    *,
    network: Weights,
    top: int = 5,
    json: bool = False,
    csv: bool = False,
    out: Path | None = None,
    speed: EngineSpeed = _DEFAULT,
) -> int:
    """Classify image files. The weights' own preprocessing is applied.

    Args:
        files: image files, folders of them, patterns such as 'photos/*.jpg', or - for a list on standard input, one a line.
        network: which weights.
        top: classes to print for each file.
        json: a JSON object a line instead of a table.
        csv: comma-separated values instead of a table: file,rank,class,probability.
        out: a file for the output instead of standard output; whole or not there.
        speed: how the work is done.
    """
    if top < 1:
        raise ValueError(f"--top: expected 1 or more, found {top}")
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out}: expected a file, found a folder")
    if json and csv:
        raise ValueError("--json and --csv: expected one of the two")
    speed.check()
    from triscale.predict import Prediction, image_files, predict_files

    paths = image_files(listed_files(files))
    if not paths:
        raise ValueError(f"no image files in {', '.join(files)}")
    net, card = network.open("predict", network.weights)
    if net.num_classes != len(card.classes):
        raise ValueError(f"{network.weights}: has no classifier; weights for transfer can't name classes")
    logits_of = speed.prepare(net, len(paths))
    failures = 0
    with _output(out) as stream, progress("classifying", len(paths)) as tick:
        write, finish = _writer("json" if json else "csv" if csv else "table", stream)
        for result in predict_files(paths, logits_of, card.preprocess, card.classes, top=top, batch_size=speed.batch, workers=speed.workers):
            tick()
            if isinstance(result, Prediction):
                write(result)
            else:
                failures += 1
                print(f"triscale predict: {result.reason}", file=sys.stderr)
        finish()
    if failures:
        print(f"triscale predict: {failures} of {len(paths)} files could not be classified", file=sys.stderr)
    return 0 if not failures else 2 if failures == len(paths) else 1


def listed_files(files: list[str]) -> list[str]:
    """`files` with the lines of standard input in the place of -."""
    if not files:
        raise ValueError("no image files given")
    return [line for file in files for line in ([text for text in sys.stdin.read().splitlines() if text] if file == "-" else [file])]


@contextmanager
def _output(out: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that is renamed to its place at the end."""
    if out is None:
        yield sys.stdout
        return
    from io import StringIO

    from triscale.files import write_text

    buffer = StringIO()
    yield buffer
    write_text(out, buffer.getvalue())


def _writer(form: str, stream: IO[str]) -> tuple[Callable[[Prediction], object], Callable[[], object]]:
    """(writes one prediction, ends the output) in one of the three forms. JSON and CSV come as the work goes on, a table at the end."""
    if form == "json":

        def line(result: Prediction) -> None:
            body = {"file": result.file, "top": [{"class": c, "probability": p} for c, p in result.top]}
            print(json_module.dumps(body), file=stream, flush=True)

        return line, lambda: None
    if form == "csv":
        sheet: Any = csv.writer(stream, lineterminator="\n")
        sheet.writerow(("file", "rank", "class", "probability"))
        return lambda r: sheet.writerows((printable(r.file), i, c, f"{p:.6f}") for i, (c, p) in enumerate(r.top, 1)), stream.flush
    rows: list[tuple[str, ...]] = []

    def row(result: Prediction) -> None:
        rows.extend((result.file if i == 0 else "", c, f"{100 * p:.2f} %") for i, (c, p) in enumerate(result.top))

    def table() -> None:
        if rows:
            print(aligned(("file", "class", "probability"), rows, left=(0, 1)), file=stream)

    return row, table


_READING = Reading()


def convert(source: str, destination: Path, /, *, to: Target = "triscale", reading: Reading = _READING) -> int:
    """Write weights as another code base loads them, strictly: every tensor once, in its names, layouts and shapes.

    Args:
        source: the weights: a file of any code base, or a published checkpoint as efficientnet_b0:imagenet-aa.
        destination: the new file; its suffix decides the format: .safetensors, .pth, .pt, .bin, .npz.
        to: the code base; triscale writes a model file that alone is enough to predict.
        reading: what the file doesn't say.
    """
    from triscale.weights.convert import write_as

    net, card = reading.open("convert", source)
    for line in write_as(destination, net, card, to):
        print(f"triscale convert: not all modules there compute as here: {line}", file=sys.stderr)
    print(f"{destination}: {card.arch.name or 'the network'} as {to} has it, {sum(v.numel() for v in net.state_dict().values()):,} values")
    return 0
