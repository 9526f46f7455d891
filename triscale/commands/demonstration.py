"""demo: the paper's idea in two minutes."""

from __future__ import annotations

import time
from pathlib import Path

from triscale.commands.bars import bars
from triscale.text import aligned


def demo(out: Path = Path("runs/demo"), seeds: int = 3, workers: int | None = None) -> int:
    """The paper's idea on real scans: a small network, four times its MACs spent in four ways, all five trained and compared.

    Args:
        out: the run folder: results.json, model.safetensors, report.html.
        seeds: trainings of each network.
        workers: trainings at a time, one thread each; all cores unless given.
    """
    import json

    from triscale import demo as demo_task
    from triscale.report import DEMO_HEADER, demo_rows, render, verdict

    if seeds < 1:
        raise ValueError(f"--seeds: expected 1 or more, found {seeds}")
    start = time.perf_counter()
    runs = len(demo_task.ways()) * seeds
    print(f"{runs} trainings on scikit-learn's scans of handwritten digits: a base network and {demo_task.BUDGET} times its MACs in four ways")
    finished = 0
    with bars() as bar:
        task = bar.add_task(f"training 0 of {runs}", total=None)
        for progress in demo_task.run(out, seeds=seeds, workers=workers):
            bar.update(task, completed=progress.done, total=progress.total)
            if progress.finished:
                finished += 1
                way, seed, top1 = progress.finished
                bar.update(task, description=f"training {finished} of {runs}")
                bar.console.print(
                    f"  {way}{' network' if way == 'base' else ' scaling'}, seed {seed}: {100 * top1:.2f} % of held-out scans right", highlight=False
                )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    print(aligned(DEMO_HEADER, demo_rows(results["networks"])))
    print(f"\n{verdict(results['networks'], results['budget'])}")
    print(f"\nThe {results['best']} network on held-out scans, its least certain first:")
    for s in results["samples"]:
        wrong = "" if s["says"] == s["label"] else f", wrong: it is a {s['label']}"
        print(f"  {s['name']}: {s['says']} ({100 * s['probability']:.1f} %){wrong}")
    path = render(out)
    print(f"\n{time.perf_counter() - start:.0f} s. Report: {path.resolve()}")
    return 0
