"""results.jsonl: one line a finished training, written to the disk before anything else happens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from studies.scaling.plan import Run
from triscale.recipe import Recipe


class Ledger:
    """Open for appending by one process alone. A line that a kill cut off is taken out when it is opened.

    Raises ValueError where another process has it, or where a whole line is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "a+b")  # noqa: SIM115 - held until close, its lock with it
        try:
            self._lock()
            self.lines = self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two studies in one folder are the user's to avoid
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.path}: another process is running this study; give another --out or wait for it") from None

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._file.truncate(whole)
        lines = []
        for number, text in enumerate(data[:whole].splitlines(), 1):
            try:
                lines.append(json.loads(text))
            except ValueError:
                raise ValueError(f"{self.path}, line {number}: expected a JSON object, found {text[:40]!r}; take the line out") from None
        return lines

    def has(self, scale: str, run: Run) -> bool:
        """Whether this network was trained by this recipe and seed."""
        arch, recipe = json.loads(run.arch.to_json()), run.recipe.to_dict()
        defaults = Recipe().to_dict()  # of fields that came after a line was written
        done = (line for line in self.lines if line.get("scale") == scale and line.get("arch") == arch)
        return any(defaults | line.get("recipe", {}) == recipe for line in done)

    def append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(line)

    def close(self) -> None:
        self._file.close()
