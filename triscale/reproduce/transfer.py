"""Table 5: transfer to eight data sets, the paper's beside what was measured here (studies/transfer)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triscale import paper
from triscale.recipes import FINETUNE
from triscale.reproduce.layout import NONE, NOT_RUN, Reproduction
from triscale.reproduce.study_results import ResultsError, read_lines


def measured() -> Path:
    """Where a clone keeps the results; an installed package has no such file."""
    return Path(__file__).resolve().parents[2] / "studies" / "transfer" / "results.jsonl"


def table5(study: Path | None) -> Reproduction:
    """study: a file of result lines, or a folder with results.jsonl in it."""
    where = measured() if study is None else study / "results.jsonl" if study.is_dir() else study
    if study is not None and not where.is_file():
        raise ResultsError(f"--study {where}: no such file; expected lines of dataset, network and top1 or mean_per_class")
    lines = read_lines(where) if where.is_file() else []
    rows: list[tuple[str, ...]] = []
    known = {row.dataset for row in paper.TABLE5}
    for row in paper.TABLE5:
        here = "; ".join(_told(line) for line in lines if line.get("dataset") == row.dataset) or NOT_RUN
        rows.append((row.name, *_pair(row.public), *_pair(row.public_ours), *_pair(row.reported), *_pair(row.reported_ours), here))
    more = sorted({str(line.get("dataset")) for line in lines} - known)
    rows += [(name, *[NONE] * 8, "; ".join(_told(line) for line in lines if line.get("dataset") == name)) for name in more]
    header = (
        "Data set",
        "Best public",
        "Accuracy",
        "EfficientNet",
        "Accuracy",
        "Best reported",
        "Accuracy",
        "EfficientNet",
        "Accuracy",
        "Measured here",
    )
    notes = (
        "Accuracies but the last column's are the paper's, in %; parameters, in millions, are the paper's too.",
        "Paper: against the best public results 4.7 times fewer parameters, against the best reported 9.6 times (geometric means).",
        *(("Rows without the paper's numbers are of data sets that it doesn't have.",) if more else ()),
        *(() if lines else ("Nothing has been measured here: studies/transfer/results.jsonl is not there, or empty.",)),
    )
    return Reproduction("Table 5: transfer learning", header, tuple(rows), notes)


def _pair(result: paper.TransferResult) -> tuple[str, str]:
    return result.model + (f" ({result.params}M)" if result.params else ""), result.accuracy


def _told(line: Mapping[str, Any]) -> str:
    """Network, accuracy and of which kind, seeds and images, as far as the line has them."""
    protocol = FINETUNE[str(line["dataset"])].accuracy if line.get("dataset") in FINETUNE else "top1"
    kind = next((k for k in (protocol, "top1", "mean_per_class") if line.get(k) is not None), None)
    value = line.get(kind) if kind else None
    values = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if not values or not all(0 <= v <= 1 for v in values) or not isinstance(line.get("network"), str) or not isinstance(line.get("dataset"), str):
        raise ResultsError(f"{line['_from']}: expected dataset, network and top1 or mean_per_class (a share from 0 to 1, or a list of them)")
    mean = 100 * sum(values) / len(values)
    about = [f"{line['images']} training images" if "images" in line else "", f"{line['px']} px" if "px" in line else ""]
    about += [f"{line['seeds']} seeds" if "seeds" in line else "", "mean per class" if kind == "mean_per_class" else ""]
    return f"{line['network']} {mean:.1f} ({', '.join(filter(None, about))})".replace(" ()", "")
