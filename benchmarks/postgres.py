"""A PostgreSQL server of our own for as long as it is needed, in a temporary folder, from the system's package."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """database(name) makes one and returns its URL; stop() ends the server at once, as a crash does, start() has it back."""

    database: Callable[[str], str]
    start: Callable[[], object]
    stop: Callable[[], object]


def binaries() -> Path | None:
    """Where the newest PostgreSQL's programs are; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3])) or [p for p in [shutil.which("initdb")] if p]
    return Path(found[-1]).parent if found else None


@contextmanager
def server() -> Iterator[Server]:
    """Raises FileNotFoundError where PostgreSQL isn't installed."""
    programs = binaries()
    if programs is None:
        raise FileNotFoundError("no PostgreSQL here (Debian's package postgresql)")
    folder, user = Path(tempfile.mkdtemp(prefix="triscale-pg-", dir="/tmp")), []  # a short path: a socket's has 107 bytes at most
    if os.getuid() == 0:  # it refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run(name: str, *arguments: object) -> None:
        command = [*user, str(programs / name), *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/")
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip()}")

    def control(*what: str) -> None:
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options, *what)

    def database(name: str) -> str:
        run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "triscale", name)
        return f"postgresql://triscale@127.0.0.1:{port}/{name}"

    try:
        run("initdb", "-D", folder / "data", "-A", "trust", "-U", "triscale", "--no-sync")
        control("start")
        try:
            yield Server(database, lambda: control("start"), lambda: control("-m", "immediate", "stop"))
        finally:
            control("-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
