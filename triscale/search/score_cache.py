"""Scores that are kept: a network that was scored before, on the same data by the same recipe, costs nothing.

One small JSON file a score, in FOLDER/ab/abcdef....json by the hash of all that the score depends on. Any number of processes
may share the folder: files are whole or not there, and two that write the same score write the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from triscale.architecture import Arch
from triscale.files import cache_folder, write_text
from triscale.search.events import Score
from triscale.search.space import plain
from triscale.version import __version__

FORMAT = 1
LARGEST = 4 << 20  # bytes of a file that is looked into: 100 000 epochs fit


class Kept(NamedTuple):
    """values: of each epoch, the last one the score. one: the score function gave a number, not an iterator."""

    values: tuple[float, ...]
    one: bool


@dataclass(frozen=True)
class ScoreCache:
    """The scores in a folder; `cache_folder("scores")` is the usual one."""

    folder: Path

    def subject(self, arch: Arch, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """What a score is of, as JSON has it: the network without its name and in its plainest words, the fingerprint, the version.

        Raises ValueError for a fingerprint that JSON can't hold.
        """
        network = json.loads(plain(arch).to_json())
        del network["name"]
        try:
            return json.loads(_canonical({"arch": network, "fingerprint": dict(fingerprint), "triscale": __version__}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"score cache: expected a fingerprint of texts, finite numbers, lists and dicts, found another ({error})") from None

    def path(self, subject: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(_canonical(subject).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.json"

    def get(self, subject: Mapping[str, Any]) -> Kept | None:
        """None where there is none, and where the file is damaged or something else."""
        path = self.path(subject)
        try:
            if path.stat().st_size > LARGEST:
                return None
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # ValueError: no JSON, no UTF-8
            return None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("of") != subject:
            return None
        values, one = data.get("values"), data.get("one")
        if type(one) is not bool or not isinstance(values, list) or not values or not all(type(v) is float and math.isfinite(v) for v in values):
            return None
        return Kept(tuple(values), one)

    def put(self, subject: Mapping[str, Any], kept: Kept) -> None:
        """Writes the file, or says once a process and folder why it can't: the score itself is not lost by that."""
        path, data = self.path(subject), {"format": FORMAT, "values": list(kept.values), "one": kept.one, "of": subject}
        try:
            write_text(path, json.dumps(data, indent=1))
        except OSError as error:
            if self.folder not in _told:
                _told.add(self.folder)
                reason = error.strerror or type(error).__name__
                warnings.warn(f"{path}: scores can't be kept ({reason}); the search goes on without", stacklevel=2)


_told: set[Path] = set()


@dataclass(frozen=True)
class Cached:
    """`score`, with its results kept. fingerprint: all that they depend on beside the network, as `ProxyScore.fingerprint` gives it.
    folder: `cache_folder("scores")` unless given.

    Only whole scores are kept: one that raised, was pruned (its iterator not asked to the end) or isn't finite is computed again.
    """

    score: Score
    fingerprint: Mapping[str, Any]
    folder: Path | None = None

    @property
    def steps(self) -> int:
        """How many values a whole score has; 0 where the score doesn't say."""
        return int(getattr(self.score, "steps", 0))

    @property
    def cache(self) -> ScoreCache:
        return ScoreCache(self.folder or cache_folder("scores"))

    def peek(self, arch: Arch) -> tuple[float, ...] | None:
        """The values that are kept for a network, the last one its score; None where it would be computed."""
        found = self.cache.get(self.cache.subject(arch, self.fingerprint))
        return found.values if found else None

    def __call__(self, arch: Arch) -> float | Iterator[float]:
        cache = self.cache
        subject = cache.subject(arch, self.fingerprint)
        found = cache.get(subject)
        if found:
            return found.values[-1] if found.one else iter(found.values)
        result = self.score(arch)
        if isinstance(result, Iterator):
            return _keeping(result, cache, subject)
        value = float(result)
        if math.isfinite(value):
            cache.put(subject, Kept((value,), True))
        return value


def _keeping(values: Iterator[float], cache: ScoreCache, subject: Mapping[str, Any]) -> Iterator[float]:
    """The values as they come; once they have ended, they are kept."""
    seen: list[float] = []
    try:
        for value in values:
            seen.append(float(value))
            yield seen[-1]
    finally:
        close = getattr(values, "close", None)  # a generator that was left early lets go of what it holds
        if close:
            close()
    if seen and all(map(math.isfinite, seen)):
        cache.put(subject, Kept(tuple(seen), False))


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
