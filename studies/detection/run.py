"""`python -m studies.detection.run DATA --weights B0`: a narrow RetinaNet on three backbones, the same recipe and seed, on two cores.

DATA: a folder with train, val and test splits as COCO has it; the results here are of bccd, 364 pictures of blood cells
(https://github.com/Shenggan/BCCD_Dataset). Each training is the command that the README has. Writes results.json beside this file
after each training, and docs/detection-curve.png and the table of docs/detection.md from it; `--page` does the latter alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, DOCS = HERE / "results.json", ROOT / "docs" / "detection.md"
OPTIONS = ("--recipe", "finetune", "--size", "320", "--width", "64")
ROWS = (
    ("B0, from ImageNet weights", "efficientnet_b0", True),
    ("B0, from scratch", "efficientnet_b0", False),
    ("MobileNetV2, from scratch", "mobilenet_v2", False),
)
STYLE = {ROWS[0][0]: ("-", "o", "#1f5fa8"), ROWS[1][0]: ("--", "s", "#b35900"), ROWS[2][0]: (":", "^", "#2b7a4b")}


def train(label: str, backbone: str, data: Path, weights: Path | None, more: list[str]) -> dict[str, Any]:
    """One training by the command; what it cost and found."""
    from triscale.cost_model import cost
    from triscale.detector import DetectorArch, detector_cost

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = [*OPTIONS, *more, *(("--weights", str(weights)) if weights else ("--backbone", backbone))]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "triscale", "detect", "train", str(data), *options, "--out", str(out)], check=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        arch = DetectorArch.from_json((out / "arch.json").read_text(encoding="utf-8"))
        scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    whole = detector_cost(arch, len(scores["classes"]))
    epochs = [{key: line[key] for key in ("epoch", "loss", "seconds", "ap", "ap50")} for line in lines if line["kind"] == "epoch"]
    trunk = cost(arch.trunk, 0, resolution=arch.backbone.resolution)
    numbers = {"params": whole.params, "macs": whole.macs, "backbone_macs": trunk.macs}
    return {"label": label, "backbone": backbone, "seconds": seconds, **numbers, "test": scores, "epochs": epochs, "recipe": recipe}


def curve(runs: list[dict[str, Any]], path: Path) -> None:
    """AP50 on the val split after each epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for run in runs:
        line, marker, colour = STYLE[run["label"]]
        points = run["epochs"]
        axes.plot(
            [p["epoch"] for p in points], [100 * p["ap50"] for p in points], line, marker=marker, markersize=4, color=colour, label=run["label"]
        )
    last = max(p["epoch"] for run in runs for p in run["epochs"])
    axes.set(xlabel="epoch", ylabel="box AP50 on val, %", ylim=(0, 100), xlim=(0, last + 0.5), xticks=range(0, last + 1, max(1, last // 10)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(results: dict[str, Any]) -> str:
    rows = ["| backbone | parameters | MACs | box AP | AP50 | AP75 | AP50 by class | minutes |", "| --- " * 8 + "|"]
    for run in results["runs"]:
        test = run["test"]
        classes = ", ".join(f"{c['name']} {100 * c['AP50']:.1f}" for c in test["classes"])
        numbers = " | ".join(f"{100 * test[name]:.1f}" for name in ("AP", "AP50", "AP75"))
        rows.append(
            f"| {run['label']} | {run['params'] / 1e6:.2f} M | {run['macs'] / 1e9:.2f} G | {numbers} | {classes} | {run['seconds'] / 60:.1f} |"
        )
    recipe, images = results["runs"][0]["recipe"], results["runs"][0]["test"]["images"]
    said = f"{images} test images, after {recipe['epochs']} epochs; one seed. {results['machine']}; "
    said += f"minutes are those of the whole command, {results['beside']}."
    return "\n".join([*rows, "", said])


def page() -> None:
    """The table into docs/detection.md and the curve beside it."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    curve(results["runs"], ROOT / "docs" / "detection-curve.png")
    before, rest = DOCS.read_text(encoding="utf-8").split("<!-- bccd -->\n")
    after = rest.split("<!-- /bccd -->")[1]
    DOCS.write_text(f"{before}<!-- bccd -->\n{table(results)}\n<!-- /bccd -->{after}", encoding="utf-8")


def machine() -> str:
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {model}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path, help="of the first row's B0")
    parser.add_argument("--beside", default="with nothing else on the machine", help="what else it had to do, for the page")
    parser.add_argument("--page", action="store_true", help="make the page from results.json alone")
    given, more = parser.parse_known_args()
    if not given.page:
        if given.data is None or given.weights is None:
            parser.error("DATA and --weights, or --page")
        runs = []
        for label, backbone, pretrained in ROWS:
            runs.append(train(label, backbone, given.data.resolve(), given.weights.resolve() if pretrained else None, more))
            RESULTS.write_text(
                json.dumps({"machine": machine(), "beside": given.beside, "options": [*OPTIONS, *more], "runs": runs}, indent=1) + "\n",
                encoding="utf-8",
            )
    page()


if __name__ == "__main__":
    main()
