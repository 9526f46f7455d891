"""How processes wait for each other where data is fetched, copied or packed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from triscale.data.sources import DataError
from triscale.files import lock


@contextlib.contextmanager
def locked(path: Path, remedy: str = "set TRISCALE_HOME to a folder that can be written") -> Iterator[None]:
    """One process at a time, by the file PATH.lock. The system takes the lock back from one that was killed. Raises DataError."""
    try:
        file = lock(path)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written ({error.strerror}); {remedy}") from None
    with file:
        yield
