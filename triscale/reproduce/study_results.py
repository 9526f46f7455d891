"""The result lines of the scaling study, read, grouped and judged. The study writes them: studies/scaling/run.py."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
WAYS = ("depth", "width", "resolution", "compound")
COMMAND = "python -m studies.scaling.run --scale laptop --data-dir DIR"
LARGEST_FILE = 64 << 20  # bytes; a line is under 4 kB


class ResultsError(ValueError):
    """Results that can't be read: the message names the file and the line."""


@dataclass(frozen=True)
class Trained:
    """One network of the study with the accuracies of its seeds, 0 to 1."""

    name: str
    depth: float
    width: float
    resolution: float
    phi: float | None
    px: int
    macs: int
    params: int
    top1: tuple[float, ...]
    top5: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one seed."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None

    @property
    def percent(self) -> str:
        """Mean and standard deviation in %."""
        return f"{100 * self.mean:.2f}" + ("" if self.spread is None else f" ± {100 * self.spread:.2f}")


@dataclass(frozen=True)
class Study:
    """All networks that one scale of the study trained by one recipe. about: data, recipe and machine, in a sentence."""

    scale: str
    networks: tuple[Trained, ...]
    about: str
    notes: tuple[str, ...]

    def five(self) -> list[Trained]:
        """Base and four ways of figure 8, those that are there, in this order."""
        named = {n.name: n for n in self.networks}
        return [named[name] for name in ("base", *WAYS) if name in named]

    def alone(self, axis: str) -> list[Trained]:
        """Base and the networks with this dimension alone scaled, by its multiplier."""
        others = [a for a in ("depth", "width", "resolution") if a != axis]
        return sorted((n for n in self.networks if all(getattr(n, a) == 1 for a in others)), key=lambda n: float(getattr(n, axis)))

    def widths(self, depth: float, resolution: float) -> list[Trained]:
        """Networks of these multipliers, by width."""
        return sorted((n for n in self.networks if (n.depth, n.resolution) == (depth, resolution)), key=lambda n: n.width)


def shipped() -> Path:
    """Where a clone keeps the results; an installed package has no such folder."""
    return Path(__file__).resolve().parents[2] / "studies" / "scaling" / "results"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file, or of all in a folder; a last line that a kill cut off is left out. Raises ResultsError."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    out = []
    for file in files:
        try:
            if file.stat().st_size > LARGEST_FILE:
                raise ResultsError(f"{file}: {file.stat().st_size >> 20} MiB, expected result lines of {LARGEST_FILE >> 20} MiB at most")
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ResultsError(f"{file}: can't be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})") from None
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise ResultsError(f"{file}, line {number}: expected a JSON object, found {line[:40]!r}")
            out.append({**value, "_from": f"{file}, line {number}"})
    return out


def read_study(folder: Path | None = None) -> Study | None:
    """The study in `folder`, by default the one that a clone keeps; None where nothing has been run.

    Where a folder holds several scales or recipes, the one with the most trainings is taken, and a note says what was left out.
    Raises ResultsError for a folder that isn't there, or a broken line.
    """
    where = shipped() if folder is None else folder
    if folder is not None and not where.exists():
        raise ResultsError(f"--study {where}: no such folder; expected that of results.jsonl, which {COMMAND} --out writes")
    lines = [line for line in read_lines(where) if line.get("study") == "scaling"] if where.exists() else []
    if not lines:
        return None
    for line in lines:
        _check(line)
    groups = Counter(_group(line) for line in lines)
    chosen, _ = groups.most_common(1)[0]
    kept = [line for line in lines if _group(line) == chosen]
    left = len(lines) - len(kept)
    notes = (f"{left} results of another scale or recipe are in {where.name}/ too and are left out.",) if left else ()
    return Study(kept[0]["scale"], _networks(kept), _about(kept), notes)


def _check(line: Mapping[str, Any]) -> None:
    kinds = {"name": str, "scale": str, "seed": int, "px": int, "macs": int, "params": int, "recipe": dict, "arch": dict}
    numbers = ("depth", "width", "resolution", "top1", "top5")
    if line.get("format") != FORMAT:
        raise ResultsError(f'{line["_from"]}: expected "format": {FORMAT}, found {line.get("format")!r}')
    for key, kind in (*kinds.items(), *((n, (int, float)) for n in numbers)):
        if not isinstance(line.get(key), kind) or isinstance(line.get(key), bool):  # type: ignore[arg-type]
            raise ResultsError(f"{line['_from']}: no proper '{key}', found {str(line.get(key))[:40]!r}")


def _group(line: Mapping[str, Any]) -> str:
    recipe = {k: v for k, v in line["recipe"].items() if k != "seed"}
    return json.dumps([line["scale"], recipe, line.get("train_images")], sort_keys=True)


def _networks(lines: Iterable[Mapping[str, Any]]) -> tuple[Trained, ...]:
    """A seed that was trained twice counts once, the first time."""
    by_network: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        by_network.setdefault(line["name"], {}).setdefault(line["seed"], line)
    out = []
    for name, seeds in by_network.items():
        rows = [seeds[s] for s in sorted(seeds)]
        r = rows[0]
        accuracies = (tuple(float(row[k]) for row in rows) for k in ("top1", "top5"))
        same = (r["depth"], r["width"], r["resolution"], r.get("phi"), r["px"], r["macs"], r["params"])
        out.append(Trained(name, *same, *accuracies))
    return tuple(sorted(out, key=lambda n: (n.macs, n.name)))


def _about(lines: Sequence[Mapping[str, Any]]) -> str:
    r, recipe = lines[0], lines[0]["recipe"]
    machines = sorted({str(m.get("gpu") or m.get("processor")) for line in lines if (m := line.get("machine") or {})})
    torches = sorted({str(line["versions"]["torch"]) for line in lines if "torch" in line.get("versions", {})})
    hours = sum(float(line.get("cpu_seconds" if "gpu" not in (line.get("machine") or {}) else "seconds") or 0) for line in lines) / 60
    return (
        f"CIFAR-10, {r.get('train_images', 0):,} training and {r.get('test_images', 0):,} test images, {recipe.get('epochs')} epochs from scratch, "
        f"the same recipe for all; {len(lines)} trainings, {hours:.0f} minutes of {'a GPU' if 'gpu' in (r.get('machine') or {}) else 'one core'} "
        f"({', '.join(machines)}; torch {', '.join(torches)})."
    )


def verdict(five: Sequence[Trained]) -> str:
    """What the comparison found, whichever way it went: which way is first, by how much, against the spread over seeds.

    A lead counts where it is larger than the standard deviation of the difference of two seeds' accuracies, the root of the
    sum of the two variances. Networks of one seed have none, so they have no winner.
    """
    base = next((n for n in five if n.name == "base"), None)
    ways = sorted((n for n in five if n.name != "base"), key=lambda n: -n.mean)
    if base is None or len(ways) < len(WAYS):
        missing = [name for name in ("base", *WAYS) if name not in {n.name for n in five}]
        return f"Not all five networks have been trained: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
    first, second = ways[:2]
    budget = statistics.fmean(n.macs for n in ways) / base.macs
    start = (
        f"At {budget:.1f} times the multiply-adds of a base network of {base.percent} %, {first.name} scaling came out first with {first.percent} %, "
        f"{second.name} second with {second.percent} %: a lead of {100 * (first.mean - second.mean):.2f} points"
    )
    lead = first.mean - second.mean
    if first.spread is None or second.spread is None:
        return f"{start}, of one seed, so no winner can be named."
    spread = (first.spread**2 + second.spread**2) ** 0.5
    seeds = min(len(first.top1), len(second.top1))
    against = f"the standard deviation of such a difference over {seeds} seeds is {100 * spread:.2f}"
    if lead <= spread:
        return f"{start}, within the spread ({against}): no winner."
    ours = "compound" if first.name == "compound" else first.name
    end = "compound first, as in the paper" if ours == "compound" else f"{ours} first and not compound, unlike the paper"
    return f"{start}, more than the spread ({against}): {end}." + _behind(ways)


def _behind(ways: Sequence[Trained]) -> str:
    """Where compound stands, if it isn't among the first two."""
    place = next(i for i, n in enumerate(ways) if n.name == "compound")
    return "" if place < 2 else f" Compound is {('third', 'last')[place - 2]} with {ways[place].percent} %."
