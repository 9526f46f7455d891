"""Files that are whole or not there: written beside their place, synced, renamed; and the cache, with its locks."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """`write(temporary path)` in the folder of `path`, then fsync and rename. On any error nothing is left behind.

    Makes the folder. Raises OSError as it comes (a full disk, no permission).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == name:
            error.filename = os.fspath(path)  # the user knows the file by this name
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`text` as UTF-8, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it; mkstemp's files are private, ordinary ones aren't
    os.umask(mask)
    return mask


def cache_folder(kind: str) -> Path:
    """$TRISCALE_HOME/kind, else $XDG_CACHE_HOME/triscale/kind, else ~/.cache/triscale/kind. Raises ValueError where there is no home."""
    home = os.environ.get("TRISCALE_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "triscale"
    try:
        return base.expanduser() / kind
    except RuntimeError:  # a user without an entry, as containers have
        raise ValueError("no home directory for the cache; set TRISCALE_HOME to a folder that can be written") from None


def lock(path: Path) -> IO[str]:
    """The file PATH.lock, which one process holds at a time until it closes it; waits for that. Makes its folder.

    The system takes the lock back from a process that was killed. Raises OSError where the folder can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115 - closed by the caller; never deleted, or two files would be locked
    with contextlib.suppress(ImportError, OSError):  # Windows, and network file systems, have none
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    return file
