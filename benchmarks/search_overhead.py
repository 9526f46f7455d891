"""What a search costs beside the score, in ms a trial: our samplers in studies of up to 10 000 trials, and Optuna's journal file.

Sampler: a study of EfficientNet-B0's space in memory, of an instant score. Timed are `sample_relative`, less the learning within it
(draw), and the learning: reading what ended, PPO's updates. PPO learns from ten trials at once, so times are means of ten trials in
turn; the median and range are over the twenty such means before each number of trials, less the very first, in which torch wakes up.
Joining: a new sampler reads the whole study.

Storage: a journal file in the temporary folder, with so many trials in it already, one parameter a decision, a block, or 21 decisions,
in turn; an even draw, the parameters, one user attribute, the end. Listing: of all trials, as a sampler that learns asks for once a
trial.

python -m benchmarks.search_overhead --quick prints the same up to 300 trials.
"""

import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from triscale.families import arch
from triscale.search.coding import Coding
from triscale.search.samplers import sampler
from triscale.search.space import mnasnet_space

SPACE = mnasnet_space(arch("efficientnet_b0"))
SAMPLERS = ("random", "evolution", "ppo")
GROUPS = (1, 6, 21)  # decisions a parameter
AT = (100, 1000, 3000, 10000)
TEN, BLOCKS, STORED = 10, 20, 60
LIMIT_MS = 20  # of a sampler, that the project sets itself


def timed(call, *given):
    start = time.perf_counter()
    out = call(*given)
    return 1e3 * (time.perf_counter() - start), out


class Watch:
    """Wraps a sampler's two sides; keeps [draw ms, learn ms] of each trial."""

    def __init__(self, chosen):
        self.rows, self.sample, self.learn = [], chosen.sample_relative, chosen._catch_up
        chosen.sample_relative, chosen._catch_up = self.sampled, self.learnt

    def learnt(self, study):
        self.learning, _ = timed(self.learn, study)

    def sampled(self, *given):
        whole, params = timed(self.sample, *given)
        self.rows.append([whole - self.learning, self.learning])
        return params


def value(point):
    """Instant, and something to learn from: neighbouring decisions should agree."""
    return math.exp(-0.05 * sum(a != b for a, b in itertools.pairwise(point)))


def samplers(at):
    coding = Coding.by_block(SPACE)
    for name in SAMPLERS:
        study = optuna.create_study(direction="maximize", sampler=sampler(name, coding, 0, at[-1]))
        watch = Watch(study.sampler)
        for number in range(at[-1] + 1):
            trial = study.ask(coding.distributions)
            study.tell(trial, value(coding.point(trial.params)))
            if number + 1 in at:
                yield sampler_row(name, number + 1, watch.rows[max(TEN, number + 1 - TEN * BLOCKS) :], joining(name, coding, study))


def joining(name, coding, study):
    new = sampler(name, coding, 0, 10000)
    new._begin(study)
    return timed(new._catch_up, study)[0] / 1e3


def sampler_row(name, trials, rows, joined):
    blocks = [[statistics.fmean(side) for side in zip(*rows[i : i + TEN], strict=True)] for i in range(0, len(rows), TEN)]
    draw, learn = (statistics.median(side) for side in zip(*blocks, strict=True))
    whole = [sum(block) for block in blocks]
    return {
        "part": "sampler", "what": name, "trials": trials, "median_ms": statistics.median(whole), "min_ms": min(whole), "max_ms": max(whole),
        "draw_ms": draw, "learn_ms": learn, "joining_s": joined, "limit_ms": LIMIT_MS, "blocks": len(blocks),
    }  # fmt: skip


def one(study, coding):
    trial = study.ask(coding.distributions)
    trial.set_user_attr("score", 0.5)
    study.tell(trial, 0.5)


class Stored:
    """A study in a journal file."""

    def __init__(self, group, folder):
        self.coding, self.rng, self.path = Coding.of(SPACE, group), random.Random(0), Path(folder) / f"{group}.log"
        self.journal = JournalStorage(JournalFileBackend(str(self.path)))
        self.study = optuna.create_study(storage=self.journal, direction="maximize", sampler=sampler("random", self.coding, 0))

    def listed(self):
        return self.journal.get_all_trials(self.study._study_id, deepcopy=False)

    def fill(self, trials):
        with mock.patch("os.fsync"):  # what isn't timed need not wait for the disk
            for _ in range(trials - len(self.listed())):
                params = self.coding.params(SPACE.random(self.rng))
                self.study.add_trial(optuna.trial.create_trial(value=0.5, params=params, distributions=self.coding.distributions))

    def one(self):
        """ms of a trial and of its CPU time."""
        began = time.process_time()
        ms, trial = timed(self.study.ask, self.coding.distributions)
        ms += timed(trial.set_user_attr, "score", 0.5)[0] + timed(self.study.tell, trial, 0.5)[0]
        return ms, 1e3 * (time.process_time() - began)

    def row(self, trials, found):
        whole, cpu = zip(*found, strict=True)
        return {
            "part": "storage", "parameters": len(self.coding.distributions), "trials": trials, "median_ms": statistics.median(whole),
            "min_ms": min(whole), "max_ms": max(whole), "cpu_ms": statistics.median(cpu), "runs": len(found),
            "listing_ms": statistics.median(timed(self.listed)[0] for _ in range(20)), "bytes_a_trial": self.path.stat().st_size / trials,
        }  # fmt: skip


def storage(at):
    with tempfile.TemporaryDirectory() as folder:
        studies = [Stored(group, folder) for group in GROUPS]
        for trials in at:
            for s in studies:
                s.fill(trials - STORED)
            found = [[s.one() for s in studies] for _ in range(STORED)]
            yield from (s.row(trials, rows) for s, rows in zip(studies, zip(*found, strict=True), strict=True))


def main(quick=False):
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    at = (100, 300) if quick else AT
    return [*samplers(at), *storage(at), {"part": "versions", "optuna": optuna.__version__}]


def described(rows):
    """Paragraphs and (header, rows) of tables for docs/benchmarks.md."""
    ours, stored = ([r for r in rows if r["part"] == part] for part in ("sampler", "storage"))
    stored.sort(key=lambda r: -r["parameters"])
    cells = [
        [r["what"], f"{r['trials']}", f"{r['draw_ms']:.2f}", f"{r['learn_ms']:.2f}", f"{r['median_ms']:.2f}",
         f"{r['min_ms']:.2f} to {r['max_ms']:.2f}", f"{r['limit_ms']}", f"{r['joining_s']:.2f}"] for r in ours
    ]  # fmt: skip
    yield ["sampler", "trials", "draw, ms", "learn, ms", "a trial, ms", "range", "limit ms", "joining, s"], cells
    yield (
        "Draw: a point from what is known. Learn: reading the trials that ended, and PPO's updates, one every ten trials. Medians and "
        "ranges are of means of ten trials in turn. Joining: a new worker reads the whole study. 42 decisions, a study in memory."
    )
    cells = [
        [f"{r['parameters']}", f"{r['trials']}", f"{r['median_ms']:.1f}", f"{r['min_ms']:.1f} to {r['max_ms']:.1f}",
         f"{r['cpu_ms']:.1f}", f"{r['listing_ms']:.2f}", f"{r['bytes_a_trial'] / 1e3:.1f}"] for r in stored
    ]  # fmt: skip
    yield ["parameters a network", "trials", "a trial, ms", "range", "CPU, ms", "listing all, ms", "kB a trial"], cells
    version = next(r["optuna"] for r in rows if r["part"] == "versions")
    yield (
        f"Optuna {version}, journal file: ask, the parameters, one user attribute, tell, with that many trials there. Each parameter is a "
        "write that waits for the disk (fsync): CPU is what remains on a fast one. A learning sampler lists all trials once more."
    )
    yield "![ms a trial over the trials in the study, for samplers and storage](search-overhead.png)"


LINES = {
    "random": ("s", ":", "#555555"), "evolution": ("o", "-", "#0072B2"), "ppo": ("^", "--", "#D55E00"),
    42: ("s", ":", "#555555"), 7: ("o", "-", "#0072B2"), 2: ("^", "--", "#D55E00"),
}  # fmt: skip


def plot(rows, path):
    """ms a trial over the number of trials: the samplers, and the storage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name in SAMPLERS:
        line(left, [r for r in rows if r.get("what") == name], name, name)
    for count in sorted({r["parameters"] for r in rows if r["part"] == "storage"}, reverse=True):
        line(right, [r for r in rows if r.get("parameters") == count], count, f"{count} parameters")
    left.axhline(LIMIT_MS, color="black", linewidth=1)
    left.annotate(f"limit: {LIMIT_MS} ms", (AT[0], LIMIT_MS), (0, 4), textcoords="offset points", fontsize=9)
    left.set_title("sampler alone", fontsize=11)
    right.set_title("storage alone: a journal file (hollow: its CPU time)", fontsize=11)
    left.set_ylabel("ms a trial (median, bars: range)")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="trials in the study", xlim=(80, 60000), xticks=AT)
        axes.set_xticklabels([f"{n:,}".replace(",", " ") for n in AT])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.savefig(path, dpi=150)


def line(axes, rows, key, label):
    marker, dashes, colour = LINES[key]
    x, y = [r["trials"] for r in rows], [r["median_ms"] for r in rows]
    spread = [[r["median_ms"] - r["min_ms"] for r in rows], [r["max_ms"] - r["median_ms"] for r in rows]]
    axes.errorbar(x, y, spread, fmt=marker + dashes, color=colour, capsize=3, linewidth=1.6, elinewidth=0.8)
    if "cpu_ms" in rows[-1]:
        axes.plot(x, [r["cpu_ms"] for r in rows], marker, color=colour, markerfacecolor="white", markersize=7)
    axes.annotate(label, (x[-1], y[-1]), (10, 0), textcoords="offset points", va="center", color=colour, fontsize=10)


if __name__ == "__main__":
    print(json.dumps(main("--quick" in sys.argv), indent=1))
