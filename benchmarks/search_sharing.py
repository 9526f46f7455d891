"""Trials an hour of one and of two worker processes on one study, for a score that sleeps: what sharing costs.

Each worker is a process that searches EfficientNet-B0's space at random; its score sleeps half a second. The time is from the first
trial's beginning to the last one's end, of 24 trials; starting the processes isn't in it. In turn, on a journal file and, where it is
installed, on PostgreSQL.

python -m benchmarks.search_sharing --quick prints the same once, with fewer trials.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS, TRIALS, ROUNDS = 0.5, 24, 3
WORKER = Path(__file__).resolve().parent.parent / "tests" / "search_worker.py"


def measured(storage, log, workers, trials):
    """Trials an hour."""
    start = time.time() + 8
    arguments = [sys.executable, WORKER, storage, log, str(trials), str(SECONDS), str(start), "120"]
    processes = [subprocess.Popen(list(map(str, arguments)), stdout=subprocess.DEVNULL, cwd=WORKER.parent) for _ in range(workers)]
    if any(process.wait() for process in processes):
        raise RuntimeError("a worker failed")
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    ended = [line["time"] for line in lines if line["what"] == "ended"]
    if len(ended) != trials or len({line["key"] for line in lines}) != trials:
        raise RuntimeError(f"{len(ended)} of {trials} trials were done")
    return 3600 * trials / (max(ended) - min(line["time"] for line in lines))


def main(quick=False):
    from benchmarks.postgres import binaries, server

    trials, rounds, rows = (8, 1, []) if quick else (TRIALS, ROUNDS, [])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kinds = {"journal file": lambda name: folder / f"{name}.journal"}
        if binaries() is not None:
            kinds["PostgreSQL"] = stack.enter_context(server()).database
        rates = {(kind, workers): [] for kind in kinds for workers in (1, 2)}
        for i in range(rounds):
            for (kind, workers), found in rates.items():
                name = f"s{i}{workers}"
                found.append(measured(kinds[kind](name), folder / f"{kind}{name}.log", workers, trials))
    for kind in kinds:
        one, two = (rates[kind, workers] for workers in (1, 2))
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        row = {"storage": kind, "trials": trials, "seconds": SECONDS, "one": statistics.median(one), "two": statistics.median(two)}
        rows.append({**row, "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]})
    return rows


def described(rows):
    header = ["storage", "one worker, trials an hour", "two", "ratio", "range"]
    body = [[r["storage"], f"{r['one']:.0f}", f"{r['two']:.0f}", f"{r['ratio']:.2f}", "{:.2f} to {:.2f}".format(*r["ratio_range"])] for r in rows]
    most = 3600 / rows[0]["seconds"]
    note = f"A score that sleeps {rows[0]['seconds']:g} s, so at most {most:.0f} trials an hour a worker; {rows[0]['trials']} trials, "
    return [(header, body), note + "two processes on one study."]


if __name__ == "__main__":
    print(json.dumps(main("--quick" in sys.argv), indent=1))
