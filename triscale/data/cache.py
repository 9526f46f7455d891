"""Where data that is fetched or copied once lies, and how processes wait for each other there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from triscale.data.sources import DataError


def cache_folder(kind: str) -> Path:
    """$TRISCALE_HOME/kind, else $XDG_CACHE_HOME/triscale/kind, else ~/.cache/triscale/kind; weights lie beside it."""
    home = os.environ.get("TRISCALE_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "triscale"
    return base.expanduser() / kind


@contextlib.contextmanager
def locked(path: Path, remedy: str = "set TRISCALE_HOME to a folder that can be written") -> Iterator[None]:
    """One process at a time, by the file PATH.lock. The system takes the lock back from one that was killed. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115 - closed below; never deleted, or two files would be locked
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written ({error.strerror}); {remedy}") from None
    with file:
        with contextlib.suppress(ImportError, OSError):  # Windows, and network file systems, have none
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
