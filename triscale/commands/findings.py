"""What an evaluation found: as data (results.json), as text, as CSV and plot in a folder, as a file for ImageNet's test server."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from triscale.commands.confusion import confusion_plot
from triscale.data.labels import Truth
from triscale.evaluate import KEPT, UNLABELLED, Scores, wilson
from triscale.files import write_text, write_whole
from triscale.text import aligned, printable

SHOWN = 5  # rows of the two lists that are printed


def findings(scores: Scores, truth: Truth, left_out: Sequence[int], seconds: float, real: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """The counts and shares of results.json. left_out: numbers of the images that could not be read. real: ReaL labels by number.

    Shares are 0..1; top1_interval is Wilson's at 95 %; what needs labels is left out where there are none.
    """
    s = scores
    body: dict[str, Any] = {"format": 1, "kind": "evaluation", "labels": truth.how, "images": s.images, "left_out": len(left_out)}
    body |= {"left_out_files": [truth.names[n] for n in left_out], "not_finite": s.broken, "labelled": s.labelled}
    if s.labelled:
        low, high = wilson(s.right(1), s.labelled)
        body |= {"top1_right": s.right(1), "top1": s.accuracy(1), "top1_interval": [low, high]}
        body |= {"top5_right": s.right(5), "top5": s.accuracy(5), "mean_per_class": s.mean_per_class()}
        body |= {"classes_with_images": sum(1 for _, total in s.per_class() if total)}
    if real is not None:
        right, counted = s.right_among(dict(enumerate(real)))
        body |= {"real_right": right, "real_counted": counted, "real_left_out": s.images - counted, "real_top1": right / counted if counted else None}
    return body | {"seconds": seconds, "images_per_second": s.images / seconds}


def summary(results: dict[str, Any], scores: Scores, classes: Sequence[str], out: Path) -> str:
    """What the command prints: the measures, the most confused pairs, the worst classes, the rate."""
    r, names = results, [printable(name) for name in classes]
    lines = [printable(f"{r['images']} images of {r['data']} through {r['network']} at {r['preprocess']['size']} px; classes by {r['labels']}")]
    if scores.labelled:
        low, high = r["top1_interval"]
        rows = [
            ("top-1", f"{100 * r['top1']:.2f} %", f"{r['top1_right']} of {r['labelled']}; 95 % interval {100 * low:.2f} to {100 * high:.2f}"),
            ("top-5", f"{100 * r['top5']:.2f} %", f"{r['top5_right']} of {r['labelled']}"),
            ("mean per class", f"{100 * r['mean_per_class']:.2f} %", f"top-1, over the {r['classes_with_images']} classes that have images"),
        ]
        lines.append(aligned(("measure", "value", ""), rows, left=(0, 2)))
    if "real_counted" in r:
        share = f"{100 * r['real_top1']:.2f} %" if r["real_counted"] else "none"
        lines.append(f"ReaL top-1: {share}, {r['real_right']} of {r['real_counted']}; {r['real_left_out']} images without a ReaL label left out")
    pairs = scores.confused(SHOWN)
    if pairs:
        lines += ["", aligned(("most confused: is", "said", "images"), [(names[a], names[b], str(n)) for a, b, n in pairs], left=(0, 1))]
    # With one image a class is right or wrong: a list of the worst would say nothing.
    worst = sorted((right / total, i, right, total) for i, (right, total) in enumerate(scores.per_class()) if total > 1 and right < total)
    if worst:
        body = [(names[i], f"{100 * share:.1f} %", f"{right} of {total}") for share, i, right, total in worst[:SHOWN]]
        lines += ["", aligned(("worst classes", "top-1", "images"), body)]
    processes = f"{r['processes']} process{'es' * (r['processes'] > 1)}"
    rate = f"{r['images_per_second']:.1f} images/s ({r['seconds']:.1f} s of reading and network, {processes})"
    return "\n".join([*lines, "", f"{rate}. Results: {out}"])


def write_findings(out: Path, results: dict[str, Any], scores: Scores, files: Sequence[str], classes: Sequence[str]) -> None:
    """Writes the folder `out`, each file whole or not at all, results.json last. Without labels only it and predictions.csv.

    predictions.csv: file,label,top1..top5,probability, class names from the top; empty where the output was not finite or
    there is no label; unreadable images are in results.json. per_class.csv: index,class,images,right,accuracy. confusion.csv
    is sparse whatever the number of classes: true,predicted,count, no zeros. Raises OSError.
    """

    def name(label: int) -> str:
        return "" if label == UNLABELLED else classes[label]

    kept = min(KEPT, len(classes))
    rows = [
        (files[n], name(row.label), *([classes[c] for c in row.top] or [""] * kept), f"{row.probability:.6f}" if row.top else "")
        for n, row in sorted(scores.rows.items())
    ]
    _csv(out / "predictions.csv", ("file", "label", *(f"top{k}" for k in range(1, kept + 1)), "probability"), rows)
    if scores.labelled:
        body = ((i, classes[i], total, right, f"{right / total:.6f}") for i, (right, total) in enumerate(scores.per_class()) if total)
        _csv(out / "per_class.csv", ("index", "class", "images", "right", "accuracy"), body)
        pairs = ((classes[true], classes[said], count) for (true, said), count in sorted(scores.pairs().items()))
        _csv(out / "confusion.csv", ("true", "predicted", "count"), pairs)
        figure = confusion_plot(scores, classes)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
            write_whole(out / "confusion.png", lambda path: figure.savefig(path, dpi=150, format="png", bbox_inches="tight"))
    write_text(out / "results.json", json.dumps(results, indent=1))


def write_submission(path: Path, scores: Scores, files: Sequence[str], ids: Sequence[int]) -> None:
    """ImageNet's test server's file: a line an image in the order of the file names, five class numbers from the best down.

    ids: the server's number, 1 to 1000, of each class index (`triscale.data.labels.devkit_ids`). An image without a result
    gets the numbers 1 to 5: its line must be there, or all after it would be read for other images.
    Source: ILSVRC development kit, readme.txt, submission format; EfficientNet paper, Table 8.
    """
    order = sorted(range(len(files)), key=lambda n: PurePosixPath(files[n]).name)
    tops = (scores.rows[n].top if n in scores.rows else () for n in order)
    write_text(path, "".join(" ".join(str(ids[c]) for c in top) + "\n" if top else "1 2 3 4 5\n" for top in tops))


def _csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
