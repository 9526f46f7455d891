"""The cache of published checkpoints: an entry's file, from the network once and from the disk from then on."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import socket
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from triscale import files
from triscale.download import FetchError, Progress, download
from triscale.files import lock
from triscale.text import first_line
from triscale.weights.zoo import Entry

HUB_FILE = "model.safetensors"
ARCHIVES = (".tar.gz", ".tgz")
WANTED = re.compile(r"checkpoint|[^.].*\.(index|data-\d{5}-of-\d{5})")  # of an archive; the rest is graphs, logs and TFLite files


def cache_folder() -> Path:
    """`weights` in the cache: $TRISCALE_HOME, else $XDG_CACHE_HOME/triscale, else ~/.cache/triscale."""
    return files.cache_folder("weights")


def fetch(entry: Entry, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The entry's file in the cache, or the folder that its archive was unpacked to, fetched if it isn't there.

    What is there is taken as it is, and the network is left alone. A URL's file lies under its host and path, so that one
    fetched by hand can be put there; hub files lie in the hub's own layout under `hub`. Calls at the same time, from several
    processes too, wait for one another. offline: only what is there. progress: called with (bytes so far, bytes in all or
    None) for URLs; the hub's client shows its own. Raises FetchError.
    """
    if not entry.is_url:
        return _from_hub(entry, offline)
    path, folder = _places(entry.where)
    target = folder or path
    if target.exists():
        return target
    if offline and not path.exists():
        raise FetchError(f"{entry.where}: not in the cache, and offline; fetch it once with a network, or put it at {path}")
    with _lock(path):
        if not target.exists():
            if not path.exists():
                download(entry.where, path, digest=entry.hash, progress=progress)
            if folder:
                unpack(path, folder)
    return target


def _places(url: str) -> tuple[Path, Path | None]:
    """(the file in the cache, the folder of its contents where it is an archive)."""
    parts = urlsplit(url)
    names = [quote(name, safe="+,=@~") for name in (parts.netloc, *parts.path.split("/")) if name not in ("", ".", "..")]
    if parts.query:
        names[-1] += quote(f"?{parts.query}", safe="")
    path = cache_folder().joinpath(*names)
    suffix = next((suffix for suffix in ARCHIVES if path.name.endswith(suffix)), None)
    return path, path.with_name(path.name[: -len(suffix)]) if suffix else None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time. The system takes the lock back from one that was killed."""
    try:
        file = lock(path)
    except OSError as error:
        raise FetchError(f"{path.parent}: {error.strerror}; set TRISCALE_HOME to a folder that can be written") from None
    with file:
        yield


class _Bounded:
    """Reads at most `left` bytes: a small archive can hold any number of zeros, and weights hardly compress."""

    def __init__(self, stream: Any, left: int) -> None:
        self.stream, self.left = stream, left

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.TarError("it unpacks to far more than weights would")
        return data


def unpack(archive: Path, folder: Path) -> None:
    """The TensorFlow checkpoint of a .tar.gz as a flat folder, which is there whole or not at all; the archive is deleted.

    Only the index, data files and `checkpoint` are written, under their own names. An archive with links, devices, or names
    outside its folder, one that unpacks to over four times its size, or without a checkpoint, is deleted and raises FetchError.
    """
    temporary = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed; this one holds the lock
    try:
        temporary.mkdir()
        budget = 4 * archive.stat().st_size + (1 << 20)
        with gzip.open(archive) as stream, tarfile.open(fileobj=_Bounded(stream, budget), mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                _extract(tar, member, temporary)
        if not any(temporary.glob("*.index")):
            raise tarfile.TarError("no TensorFlow checkpoint in it")
        os.rename(temporary, folder)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        archive.unlink()
        raise FetchError(f"{archive}: not a checkpoint's archive ({error}); deleted, fetch it again or take another source") from None
    except OSError as error:
        raise FetchError(f"{archive}: could not be unpacked ({error.strerror or error}); make room and call again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    archive.unlink()


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or member.issparse() or not (member.isreg() or member.isdir()):
        raise tarfile.TarError(f"it holds {member.name[:80]!r}, which is no plain file within it")
    source = tar.extractfile(member) if member.isreg() and WANTED.fullmatch(name.name) else None
    if source is not None:
        if (folder / name.name).exists():
            raise tarfile.TarError(f"it holds {name.name[:80]!r} twice")
        with source, open(folder / name.name, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())


def _from_hub(entry: Entry, offline: bool) -> Path:
    by_hand = f"fetch https://huggingface.co/{entry.where}/resolve/main/{HUB_FILE} elsewhere and give the file as weights"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise FetchError(f"{entry.where}: lies on the Hugging Face hub; pip install 'triscale[weights]', or {by_hand}") from None
    folder = cache_folder() / "hub"
    problem = ""
    for local in (True,) if offline else (True, False):  # what is there is looked for without a connection first
        if not local and (problem := _no_way_to_the_hub()):  # else its client tries for 25 s
            break
        try:
            return Path(hf_hub_download(entry.where, HUB_FILE, cache_dir=folder, local_files_only=local, token=False))
        except Exception as error:  # its own, and those of whichever library it makes connections with
            reason = error.__cause__ or error  # the client says "locate the file" of everything; below it lies what happened
            problem = first_line(reason)
    what = "not in the cache, and offline" if offline else f"the Hugging Face hub: {problem}"
    raise FetchError(f"{entry.where}: {what}; {by_hand}") from None


def _no_way_to_the_hub() -> str:
    """Why the hub's host can't be found, "" where it can, or where a proxy would."""
    from huggingface_hub.constants import ENDPOINT

    host = urlsplit(ENDPOINT).hostname or ""
    if {"http", "https", "all"} & urllib.request.getproxies().keys() and not urllib.request.proxy_bypass(host):
        return ""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"no connection to {host} ({error.strerror or error})"
    return ""
