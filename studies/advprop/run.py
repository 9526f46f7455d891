"""Plain against AdvProp training on CIFAR-10 at small size: accuracy on the pictures as they are and under attack.

    python -m studies.advprop.run --data-dir FOLDER

FOLDER holds CIFAR-10 as `triscale train cifar10 --data-dir` takes it. Each finished run is a line of results.jsonl; what is there
already isn't run again. table.md is made anew from all lines with the same settings.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triscale.architecture import Arch, Head, Numerics, Stage, Stem
from triscale.cost_model import cost
from triscale.data.datasets import find, load
from triscale.data.loader import Batches, evaluation_batches
from triscale.evaluate import predict_logits, top_k_accuracy
from triscale.model import build
from triscale.recipe import Preprocess, Recipe
from triscale.train.advprop import PGD, auxiliary_norms, pgd_accuracy, with_auxiliary_norms, without_auxiliary_norms
from triscale.train.loop import EpochEnd, cross_entropy, fit
from triscale.train.state import TrainState
from triscale.version import __version__

HERE = Path(__file__).resolve().parent
PREPROCESS = Preprocess(32, 0)
# EfficientNetV2's first kind of block at 32 px: 7.5 M multiply-adds, 102,000 parameters.
ARCH = Arch(
    Stem(24, 3, 2),
    (Stage("fused_mbconv", 3, 1, 1, 0.0, "identity", 24, 1), Stage("fused_mbconv", 3, 2, 4, 0.0, "identity", 40, 2)),
    Head(128),
    32,
    0.0,
    # The official momentum averages over 100 steps and more, too slow for an attack by running statistics in so short a run.
    Numerics(norm_momentum=0.1, drop_path=0.0),
    "small",
)
ATTACKS = (2.0, 4.0)  # epsilons that all networks are tested with
ATTACK_STEPS, ATTACK_STEP = 10, 1.0


@dataclass(frozen=True)
class Run:
    """epsilon: that of the training's attack, which takes epsilon + 1 steps of 1 (one at epsilon 1, as the paper); 0: plain training."""

    epsilon: float
    seed: int
    images: int
    tested: int
    epochs: int

    @property
    def recipe(self) -> Recipe:
        plain = Recipe(epochs=self.epochs, batch_size=64, lr=0.1, warmup_epochs=1.0, label_smoothing=0.0, seed=self.seed)
        if not self.epsilon:
            return plain
        steps = 1 if self.epsilon <= 1 else int(self.epsilon) + 1
        return replace(plain, advprop=True, adv_epsilon=self.epsilon, adv_steps=steps, adv_step=1.0)


_data: dict[str, Tensor] = {}  # of this process


def _load(data_dir: str, images: int, tested: int) -> None:
    torch.set_num_threads(1)
    splits = load(find("cifar10", data_dir), PREPROCESS)
    _data["x"], _data["y"] = splits.train.images[:images].clone(), splits.train.labels[:images].clone()
    _data["test x"], _data["test y"] = splits.held_out.images[:tested].clone(), splits.held_out.labels[:tested].clone()


def train(run: Run) -> dict[str, Any]:
    """One network, trained and tested."""
    began, recipe = time.process_time(), run.recipe
    torch.manual_seed(run.seed)
    net = build(ARCH, 10).to(memory_format=torch.channels_last)
    if recipe.advprop:
        net = with_auxiliary_norms(net)
    state = TrainState(net, recipe, adversary=PGD.of(recipe, PREPROCESS))
    batches, losses = Batches(_data["x"], _data["y"], PREPROCESS, recipe), []
    for event in fit(net, batches, cross_entropy(recipe.label_smoothing), recipe, state=state):
        if isinstance(event, EpochEnd):
            losses.append(round(event.loss, 4))
    trained = time.process_time() - began
    exported = without_auxiliary_norms(net).eval()
    assert not any(".auxiliary." in name for name in exported.state_dict())
    found: dict[str, Any] = {"clean": _clean(exported), "attacked": _attacked(exported)}
    if recipe.advprop:
        with auxiliary_norms(net):
            found |= {"auxiliary clean": _clean(net), "auxiliary attacked": _attacked(net)}
    seconds = {"train_cpu_s": round(trained, 1), "test_cpu_s": round(time.process_time() - began - trained, 1)}
    return {**asdict(run), **found, "train_loss": losses, **seconds, "triscale": __version__, "torch": torch.__version__, "cpu": platform.machine()}


def _clean(net: torch.nn.Module) -> float:
    return top_k_accuracy(predict_logits(net, evaluation_batches(_data["test x"], PREPROCESS)), _data["test y"])


def _attacked(net: torch.nn.Module) -> dict[str, float]:
    out = {}
    for epsilon in ATTACKS:
        pairs = zip(evaluation_batches(_data["test x"], PREPROCESS), _data["test y"].split(256), strict=True)
        out[f"{epsilon:g}"] = pgd_accuracy(net, pairs, PREPROCESS, epsilon, ATTACK_STEPS, ATTACK_STEP)
    return out


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file; a line that a stop cut short counts as not run."""
    out = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, in per cent, as Markdown."""
    lines = [
        "| training | norms | seeds | clean |" + "".join(f" epsilon {e:g} |" for e in ATTACKS) + " CPU seconds |",
        "| --- " * (5 + len(ATTACKS)) + "|",
    ]
    for epsilon in sorted({row["epsilon"] for row in rows}):
        same = [row for row in rows if row["epsilon"] == epsilon]
        name = f"AdvProp, epsilon {epsilon:g}" if epsilon else "plain"
        for prefix, norms in (("", "clean"), ("auxiliary ", "auxiliary, not exported")):
            if f"{prefix}clean" not in same[0]:
                continue
            cells = [_spread([row[f"{prefix}clean"] for row in same])]
            cells += [_spread([row[f"{prefix}attacked"][f"{e:g}"] for row in same]) for e in ATTACKS]
            seconds = f"{statistics.mean(row['train_cpu_s'] for row in same):.0f}" if not prefix else ""
            lines.append(f"| {name} | {norms} | {len(same)} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0, 4], help="of the training's attacks; 0: plain")
    parser.add_argument("--images", type=int, default=10_000, help="the first so many training pictures")
    parser.add_argument("--tested", type=int, default=2_000, help="the first so many test pictures")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    wanted = [Run(e, seed, a.images, a.tested, a.epochs) for e in sorted(a.epsilons, reverse=True) for seed in range(a.seeds)]  # the longest first
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / "results.jsonl"
    there = [{k: row.get(k) for k in asdict(wanted[0])} for row in read(path)]
    todo = [run for run in wanted if asdict(run) not in there]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are there; network: {cost(ARCH, 10).macs / 1e6:.1f} M multiply-adds", flush=True)
    began, context = time.monotonic(), multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(a.processes, context, _load, (a.data_dir, a.images, a.tested)) as pool:
        for done in as_completed([pool.submit(train, run) for run in todo]):
            row = done.result()
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{time.monotonic() - began:.0f} s:",
                {k: row[k] for k in ("epsilon", "seed", "clean", "attacked", "train_cpu_s", "test_cpu_s")},
                flush=True,
            )
    rows = [row for row in read(path) if all(row.get(k) == getattr(a, k) for k in ("images", "tested", "epochs"))]
    text = table(rows)
    (a.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
