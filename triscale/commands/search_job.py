"""What the searches of the command line share: the network, its score, the folder, and what is told and written."""

from __future__ import annotations

import contextlib
import glob
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from triscale.architecture import Arch
from triscale.commands.fitting import fitted
from triscale.commands.following import available_cores
from triscale.commands.networks import read_arch
from triscale.commands.run_folder import run_folder
from triscale.files import cache_folder, write_text
from triscale.quantities import seconds, short
from triscale.recipe import Recipe
from triscale.recipes import named
from triscale.scaling import Coefficients
from triscale.text import aligned

if TYPE_CHECKING:
    from triscale.search.events import Running, Score
    from triscale.search.find import Found
    from triscale.search.record import Record
    from triscale.search.study import Search

JOURNAL, BEGUN = "study.journal", "command.txt"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every search is asked."""

    arch: str = "efficientnet_b0"
    """The network that is scaled or varied: a name, or a .json file."""
    resolution: int | None = None
    """Input size; the network's own unless given (digits: 16, cifar: 32). Where the last feature map would be smaller than 4x4,
    strides are taken out first."""
    macs: str | None = None
    """Scale that network to this budget of multiply-adds an image first, e.g. 4M, so that trials are short."""
    trials: int = 0
    """Networks to score, by all workers and machines together; 0: the whole grid, or 100 networks."""
    score: str = "train"
    """train: the accuracy after a short training; proxy:naswot or proxy:synflow: a number without training, for trying things."""
    share: float = 0.2
    """Of the training images of each class that networks are scored on, and not trained on. The held-out images take no part."""
    data_dir: str | None = None
    """Where a named data set lies, as torchvision keeps it (cifar10 also as Parquet)."""
    crop_padding: int | None = None
    """Of evaluation: pixels that the crop leaves out around its side, as for `train`."""
    workers: int | None = None
    """Networks scored at a time on this machine, each in a process of its own; one a core on a CPU (for --cost latency one less),
    else one. 0: one after the other in this process. With more than one, the order in which they end decides what comes next."""
    threads: int | None = None
    """CPU threads of each worker; the cores shared out unless given."""
    device: str = "cpu"
    """cpu, cuda, or auto."""
    timeout: str | None = None
    """Time after which a score is given up, e.g. 600s: that trial fails."""
    pruner: Literal["none", "median", "asha"] | None = None
    """Stop a training early by its accuracy after an epoch: below the median of the others, or by successive halving. none for
    coefficients and for nsga2, else median, unless given."""
    cache: bool = True
    """Keep scores in the cache folder, so that a network scored before on the same data by the same recipe costs nothing."""
    out: Path | None = None
    """The run folder: study, networks found and report; runs/search-..., with a number where that is taken, unless given. The
    same folder again goes on with its study, and several processes may share it."""
    resume: bool = False
    """Go on with the newest of those folders, where --out isn't given."""
    storage: str | None = None
    """A database instead of a file in --out: postgresql://, mysql:// or redis://. The same command on each machine joins in."""
    study: str | None = None
    """The study's name in --storage; search-KIND-DATA-NETWORK unless given."""
    report: bool = False
    """Only write the report of the study as it stands."""
    recipe: str = "proxy"
    """Named settings of the short training, which the options below override."""
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: named("proxy"))


class Job:
    """A search of the command line: its network, score and folder."""

    def __init__(self, kind: Literal["network", "coefficients"], data: str, asked: Asked, *, spare: bool = False) -> None:
        from triscale.classify import ProxyScore

        self.kind, self.data, self.asked = kind, data, asked
        if asked.device not in ("cpu", "auto"):
            from triscale.commands.running import available

            available(asked.device)
        cores = available_cores()
        self.workers = asked.workers if asked.workers is not None else max(1, cores - spare) if asked.device == "cpu" else 1
        self.threads = asked.threads if asked.threads is not None else max(1, cores // max(1, self.workers))
        self.proxy = ProxyScore(data, asked.data_dir, asked.settings, asked.share, self.threads, asked.device, asked.crop_padding)
        self.counted = len(self.proxy.classes), self.proxy.channels
        self.reference = self._reference()
        self.out = self._folder()
        self.score, self.about = self._score()
        self.say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)

    def _reference(self) -> Arch:
        arch = read_arch(self.asked.arch)
        label = arch.name or Path(self.asked.arch).stem
        return replace(fitted(arch, self.data, self.asked.resolution, self.asked.macs, self.counted, print), name=label)

    def _folder(self) -> Path:
        a, going_on = self.asked, self.asked.resume or self.asked.report
        out = a.out
        if out is None:
            there = sorted(Path("runs").glob(f"{glob.escape(self.label)}*/{BEGUN}"), key=lambda p: p.stat().st_mtime)
            there = [p for p in there if re.fullmatch(rf"{re.escape(self.label)}(-\d+)?", p.parent.name)]
            if not going_on:
                return run_folder(None, self.label, False, True)
            if not there:
                raise ValueError(f"--resume and --report: no search in runs/{self.label}; --out tells another folder")
            return there[-1].parent
        if a.report and not a.storage and not (out / BEGUN).is_file():
            raise ValueError(f"--report: no search in {out}")
        if out.exists() and not (out / BEGUN).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out}: exists already and has no search in it; give another")
        return out

    @property
    def label(self) -> str:
        """What the search is called where nothing else is said, the same on every machine."""
        return f"search-{self.kind}-{Path(self.data).name}-{self.reference.name}"

    def zero_cost(self, name: str) -> Any:
        from triscale.search.zerocost import ZeroCostScore

        return ZeroCostScore(name, self.counted[0], self.counted[1], self.proxy.batch, self.asked.settings.seed)

    def _score(self) -> tuple[Score, dict[str, Any]]:
        """The score, and what it depends on."""
        kind, colon, name = self.asked.score.partition(":")
        if self.asked.score == "train":
            score: Any = self.proxy
        elif kind == "proxy" and colon:
            score = self.zero_cost(name)
        else:
            raise ValueError(f"--score {self.asked.score}: expected train, proxy:naswot or proxy:synflow")
        depends = {**self.proxy.fingerprint(), "score": self.asked.score}
        if self.asked.cache:
            from triscale.search.score_cache import Cached

            score = Cached(score, depends, cache_folder("scores"))
        return score, {"score": depends}

    def running(self, trials: int, pruner: Any) -> Running:
        from triscale.search.events import Running

        a = self.asked
        limit = seconds(a.timeout) if a.timeout else 0.0
        return Running(a.trials or trials, self.workers, limit, a.pruner or pruner)

    def place(self, about: dict[str, Any]) -> Any:
        from triscale.search.find import Place

        name = self.asked.study or (self.label if self.asked.storage else "search")
        return Place(self.asked.storage or self.out / JOURNAL, name, tuple(about.items()), self.say)

    def identity(self) -> dict[str, Any]:
        """What the study that this would join is of; {} where there is none yet."""
        from triscale.search.joining import identity
        from triscale.search.storage import open_storage

        place = self.place({})
        there = self.asked.storage or (self.out / JOURNAL).exists()
        return identity(open_storage(place.storage), place.name) if there else {}

    def join(self, make: Callable[[], Search], args: list[str]) -> Search:
        """The search, whose command line is kept in its folder for whoever goes on with it."""
        from triscale.search.events import SearchError
        from triscale.search.storage import hide_password

        begun, fresh = self.out / BEGUN, not (self.out / BEGUN).exists()
        if self.asked.report and not self.identity():
            raise ValueError(f"--report: no study '{self.place({}).name}' in {hide_password(str(self.place({}).storage))}")
        if fresh:  # before the study: whoever finds that finds this
            write_text(begun, hide_password(shlex.join(["triscale", "search", self.kind, *args])) + "\n")
        try:
            return make()
        except BaseException as error:
            if fresh:
                begun.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.out.rmdir()
                    if self.asked.out is None:
                        self.out.parent.rmdir()
            elif isinstance(error, SearchError):
                raise SearchError(f"{error}. It was begun with: {begun.read_text(encoding='utf-8').strip()}") from None
            raise

    def carry_out(self, search: Search, settings: dict[str, str]) -> int:
        from triscale.search.events import SearchError
        from triscale.search.find import result
        from triscale.search_report import render

        settings = {"data": self.data, "score": self.asked.score, "recipe": self.asked.recipe, **settings, **self._settings()}
        write_text(self.out / "reference.json", self.reference.to_json() + "\n")
        if not self.asked.report:
            from triscale.commands.search_view import follow

            self._describe(search)
            again = f"the same command with --out {self.out} goes on"

            def interim() -> None:
                render(search.record(settings), self.out, *self.counted)  # without importance, which would take long

            try:
                follow(search, again, interim)
            except SearchError:
                self._failures(search, search.record())
                interim()
                raise
        record = self._record(search, settings)
        page = render(record, self.out, *self.counted)
        self._failures(search, record)
        if record.best is not None:
            self._write(result(search))
        print(f"Report: {page}")
        return 2 if record.best is None else 1 if any(t.state == "failed" for t in record.trials) else 0

    def _settings(self) -> dict[str, str]:
        if self.asked.score != "train":
            return {}
        return {
            "images to train on": f"{self.proxy.trained_images}",
            "scored images": f"{self.proxy.scored_images}",
            "epochs": f"{self.asked.settings.epochs}",
        }

    @staticmethod
    def _record(search: Search, settings: dict[str, str]) -> Record:
        from triscale.search.importance import importance

        return search.record(settings, importance(search))

    def _describe(self, search: Search) -> None:
        from triscale.cost_model import cost

        c = cost(self.reference, *self.counted)
        print(
            f"{self.reference.name} at {self.reference.resolution} px: {short(c.macs)} MACs, {short(c.params)} parameters, {self.counted[0]} classes"
        )
        there, _ = search.standing(0)
        at_work = f"{self.workers or 'no'} worker processes of {self.threads} threads"
        print(f"{search.wanted} trials{f', {there} of them done' if there else ''}; {at_work}; in {self.out}")
        if self.asked.score == "train":
            print(f"each trained on {self.proxy.trained_images} images and scored on {self.proxy.scored_images} others of the training images")

    def _failures(self, search: Search, record: Record) -> None:
        """The networks that could not be scored, to be looked into."""
        for number, trace in search.traces().items():
            arch = record.trials[number].arch
            if arch is not None:
                write_text(self.out / "failed" / f"{number:04d}.json", arch.to_json() + "\n")
            if trace:
                write_text(self.out / "failed" / f"{number:04d}.txt", trace)
        if search.traces():
            print(f"{len(search.traces())} trials failed: {self.out / 'failed'}", file=sys.stderr)

    def _write(self, found: Found) -> None:
        """The networks found, as every other command takes them."""
        write_text(self.out / "best.json", found.arch.to_json() + "\n")
        if found.coefficients is not None:
            self._tell_coefficients(found.coefficients, found)
            return
        t, kind = found.trial, (found.record.target or ("macs", 0.0))[0]
        costs = f"{short(t.cost['macs'])} MACs, {short(t.cost['params'])} parameters"
        print(f"best: trial {t.number}, score {_score(t.score)}, {costs}: {self.out / 'best.json'}")
        if found.record.reference_score is not None:
            print(f"the reference, {self.reference.name}, has {_score(found.record.reference_score)}: {self.out / 'reference.json'}")
        shutil.rmtree(self.out / "front", ignore_errors=True)  # of an earlier run of the study
        if len(found.front) > 1:
            for i, member in enumerate(found.front):
                if member.arch is not None:
                    write_text(self.out / "front" / f"{i + 1:02d}.json", member.arch.to_json() + "\n")
            print(f"no other is both better and cheaper in {kind} than these {len(found.front)}: {self.out / 'front'}")
        print(f"go on with: triscale train {self.data} --arch {self.out / 'best.json'}; triscale scale {self.out / 'best.json'} --phi 1")

    def _tell_coefficients(self, chosen: Coefficients, found: Found) -> None:
        trials = [{**t.choices, "score": t.score} for t in found.record.ranked]
        about = {"reference": self.reference.name, "data": self.data, "score": found.trial.score, "trials": len(trials), "best ten": trials[:10]}
        file = self.out / "coefficients.json"
        write_text(file, chosen.to_json(json.loads(json.dumps(about))) + "\n")
        from triscale.cost_model import cost
        from triscale.scaling import compound, scale

        print(f"alpha {chosen.alpha:g}, beta {chosen.beta:g}, gamma {chosen.gamma:g}: {_score(found.trial.score)}")
        rows = []
        for phi in range(8):
            s = compound(phi, chosen.alpha, chosen.beta, chosen.gamma)
            c = cost(arch := scale(self.reference, s), *self.counted)
            rows.append((f"{phi}", f"{s.depth:.2f}", f"{s.width:.2f}", f"{s.resolution:.2f}", f"{arch.resolution}", short(c.params), short(c.macs)))
        print(aligned(("phi", "depth", "width", "resolution", "px", "params", "MACs"), rows))
        print(f"step 2: triscale scale {self.out / 'reference.json'} --phi 1 --coefficients {file}")


def _score(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f} %" if 0 <= value <= 1 else f"{value:.4g}"
