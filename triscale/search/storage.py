"""Where a study lies: a journal file, or a database that several machines share; and patience with one that goes away.

The journal is Optuna's, with two differences: its lock is the system's, which a killed process gives back at once, and the half
line that a killed writer or a full disk leaves is cut off before the next line is written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation  # the journal's own numbers of what a line does

PATIENCE = 600.0  # seconds that a storage may be away
# SQLAlchemy's own choice for a bare postgresql:// and mysql:// are drivers that have to be compiled
DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql"}
KNOWN = "postgresql://, mysql://, redis://, sqlite:///FILE, or a path for a journal file"


# What a power cut must not lose: studies and the trials' ends. Of a trial that goes on, the rest would be lost with it anyway.
LASTING = (JournalOperation.CREATE_STUDY, JournalOperation.SET_STUDY_USER_ATTR, JournalOperation.SET_TRIAL_STATE_VALUES)


class StorageError(ValueError):
    """A storage that can't be opened: an address of no known kind, or one where nothing answers."""


class Journal(JournalFileBackend):
    """A journal file whose every line is whole."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(str(path))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The system's lock; where there is none (Windows, some network file systems) Optuna's, which a killed process keeps for a while."""
        with open(f"{self._file_path}.flock", "w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            except (ImportError, OSError):
                self._lock.acquire()
                try:
                    yield
                finally:
                    self._lock.release()
                return
            yield

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._locked(), open(self._file_path, "r+b", buffering=0) as file:
            _cut_torn_line(file)
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if any(log["op_code"] in LASTING for log in logs):
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), end)
                raise


def _cut_torn_line(file: IO[bytes]) -> None:
    """Takes away what follows the last line's end."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    position = size
    while position:
        start = max(0, position - 65536)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            file.truncate(start + found + 1)
            return
        position = start
    file.truncate(0)


def _is_away(error: BaseException) -> bool:
    """Whether the storage can't be reached now, and may be later."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError))
    if isinstance(error, OSError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("redis")}
    return bool(names & {"ConnectionError", "TimeoutError", "BusyLoadingError"})


def _patiently(name: str) -> Callable[..., Any]:
    def call(self: Patient, *args: Any, **more: Any) -> Any:
        deadline, wait, tries = time.monotonic() + self.patience, 0.25, 0
        while True:
            try:
                result = getattr(self.inner, name)(*args, **more)
            except UpdateFinishedTrialError:
                if tries and name == "set_trial_state_values":  # the first try had come through, its answer had not
                    return True
                raise
            except Exception as error:
                if not _is_away(error):
                    raise
                if time.monotonic() + wait > deadline:
                    raise StorageError(f"the study's storage stayed away for {self.patience:g} s: {_reason(error)}") from None
                if not tries:
                    self.tell(f"the study's storage doesn't answer ({_reason(error)}); trying again for {self.patience:g} s")
                time.sleep(wait)
                tries, wait = tries + 1, min(2 * wait, 10.0)
                continue
            if tries:
                self.tell("the study's storage answers again")
            return result

    call.__name__ = name
    return call


class Patient(BaseStorage):
    """A storage whose every call is tried again while it is away, for `patience` seconds; `tell` is told at its beginning and end.

    A call whose answer was lost is made twice; a trial that is thereby begun twice stays without parameters and is dropped later.
    """

    def __init__(self, inner: BaseStorage, patience: float = PATIENCE, tell: Callable[[str], None] = lambda text: None) -> None:
        self.inner, self.patience, self.tell = inner, patience, tell


for _name in [n for n in dir(BaseStorage) if not n.startswith("_") and callable(getattr(BaseStorage, n))]:
    setattr(Patient, _name, _patiently(_name))
Patient.__abstractmethods__ = frozenset()  # all of them are there now


def patient(inner: BaseStorage, patience: float, tell: Callable[[str], None]) -> BaseStorage:
    return Patient(inner, patience, tell)  # type: ignore[abstract]


def open_storage(where: str | Path | None, *, patience: float = PATIENCE, tell: Callable[[str], None] = lambda text: None) -> BaseStorage:
    """The storage at an address: None for memory, a path for a journal file, else a URL of PostgreSQL, MySQL, Redis or SQLite.

    Raises StorageError, in one line and without a password, for an unknown kind, a missing driver, or where nothing answers.
    """
    if where is None:
        return InMemoryStorage()
    text = str(where)
    scheme, colon, rest = text.partition("://")
    if not colon:
        return patient(_journal(Path(text)), patience, tell)
    shown = hide_password(text)
    try:
        if scheme in ("redis", "rediss", "unix"):
            return patient(_redis(text), patience, tell)
        if scheme.split("+")[0] not in (*DRIVERS, "sqlite", "mariadb"):
            raise StorageError(f"--storage {shown}: expected {KNOWN}")
        more = {} if scheme.startswith("sqlite") else {"pool_pre_ping": True}
        return patient(get_storage(_database(f"{DRIVERS.get(scheme, scheme)}://{rest}", more)), patience, tell)
    except StorageError:
        raise
    except ImportError as error:
        raise StorageError(f"--storage {shown}: its driver isn't installed ({_reason(error)})") from None
    except Exception as error:  # each driver has its own errors
        raise StorageError(f"--storage {shown}: {_reason(error)}") from None


def _database(url: str, options: dict[str, Any]) -> RDBStorage:
    """Tried again where another worker makes the tables at the same time: one of the two then fails."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    for wait in (0.2, 0.5, 1.0):
        try:
            return RDBStorage(url, engine_kwargs=dict(options))
        except (IntegrityError, ProgrammingError):
            time.sleep(wait)
    return RDBStorage(url, engine_kwargs=dict(options))


def _journal(path: Path) -> BaseStorage:
    try:
        return JournalStorage(Journal(path))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: no journal of a study ({_reason(error)})") from None


def _redis(url: str) -> BaseStorage:
    from optuna.storages.journal import JournalRedisBackend

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return JournalStorage(JournalRedisBackend(url, prefix="triscale"))


def hide_password(url: str) -> str:
    return re.sub(r"(//[^:/@]*):[^/]*@", r"\1:***@", url)


def _reason(error: BaseException) -> str:
    """The first line of what a driver says, without its advertisement of documentation."""
    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    error = getattr(error, "orig", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return hide_password(lines[0])[:200] if lines else type(error).__name__
