"""One file over http(s): resumed where it broke off, checked, and under its name only when it is whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from triscale.version import __version__

TIMEOUT = 30.0  # seconds without a byte
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt
LIMIT = 16 << 30  # bytes; the largest published archive, L2 with its optimiser slots, has about half
CHUNK = 1 << 20
AGAIN = (408, 429)  # and 5xx: the server may answer another time

Progress = Callable[[int, int | None], object]  # bytes so far, bytes in all where the server tells


class FetchError(OSError):
    """A file that could not be fetched. The message is one line: where from, what happened, what to do."""


class _CutError(Exception):
    """An attempt that failed in a way that the next may not."""


def download(url: str, path: Path, *, digest: str = "", progress: Progress | None = None) -> None:
    """Puts the file at `url` at `path`; makes its folder.

    What has come lies in `PATH.part`, and in `PATH.part.tag` the ETag or date of the file that it is a part of: a later call
    goes on from there, or starts anew where the file has changed. Attempts are bounded: one, and one after each of PAUSES.
    digest: "sha256:" or "md5:" and hex digits, all or the first ones. Raises FetchError; the part stays unless its hash is
    wrong.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _complete(url, part, path, digest, progress)
        _check(url, part, digest)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        _tag(part).unlink(missing_ok=True)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"{url}: could not be written ({error.strerror or error}); {_stays(part)}, see to the disk and call again") from None


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _stays(part: Path) -> str:
    return f"{_size(part)} bytes stay in {part}"


def _complete(url: str, part: Path, path: Path, digest: str, progress: Progress | None) -> None:
    problem = ""
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        try:
            return _attempt(url, part, path, digest, progress)
        except _CutError as error:
            problem = str(error)
    raise FetchError(f"{url}: {problem}, {len(PAUSES) + 1} attempts; {_stays(part)}, call again to go on")


def _attempt(url: str, part: Path, path: Path, digest: str, progress: Progress | None) -> None:
    """One request, to its end. Without a validator a part is gone on with only where a hash will tell whether that was right."""
    have = _size(part)
    validator = _tag(part).read_text() if _tag(part).exists() else ""
    headers = {"User-Agent": f"triscale/{__version__}", "Accept-Encoding": "identity"}
    if have and (validator or digest):
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    with _open(url, headers, path) as response:
        status, (start, total) = response.status, _extent(response)
        if status == 416:
            if total == have:
                return  # the last attempt was stopped between its last byte and the renaming
            part.unlink()
            raise _CutError("the part was no part of the file that is there now")
        if total is not None and total > LIMIT:
            raise FetchError(f"{url}: {total} bytes, more than any checkpoint has")
        if start not in (0, have):
            raise _CutError(f"the server sent bytes from {start}, asked from {have}")
        with open(part, "ab" if start else "wb") as file:
            if not start:  # after the part is emptied, so that a tag never stands beside bytes of another file
                _tag(part).write_text(_validator(response))
            _copy(url, response, file, start, total, progress)
    if total is not None and _size(part) != total:
        raise _CutError(f"the connection was cut at {_size(part)} of {total} bytes")


def _extent(response: Any) -> tuple[int, int | None]:
    """(first byte, bytes in all) of an answer."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if response.status in (206, 416) and found:
        return int(found[1] or 0), int(found[2]) if found[2] != "*" else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _validator(response: Any) -> str:
    """What If-Range may name: a strong ETag, else the date. Weak tags don't promise equal bytes."""
    etag = response.headers.get("ETag", "").strip()
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "").strip()


def _copy(url: str, response: Any, file: IO[bytes], done: int, total: int | None, progress: Progress | None) -> None:
    while True:
        try:
            data = response.read1(CHUNK)  # what is there: a cut loses nothing that has arrived
        except (OSError, http.client.HTTPException) as error:
            raise _CutError(f"the connection was cut at {done} of {total or 'unknown'} bytes ({_reason(error)})") from None
        if not data:
            return
        done += len(data)
        if done > LIMIT:
            raise FetchError(f"{url}: more than {LIMIT} bytes, more than any checkpoint has")
        file.write(data)
        if progress is not None:
            progress(done, total)


def _reason(error: BaseException | str) -> str:
    """In one line."""
    if isinstance(error, TimeoutError):
        return f"nothing came for {TIMEOUT:g} s"
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects within http and https, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("https://", "http://") if req.type == "http" else "https://"):
            raise FetchError(f"{req.full_url}: refused a redirect from {req.type} to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str], path: Path) -> Any:
    """The answer, of status 200, 206 or 416."""
    by_hand = f"fetch it elsewhere and put it at {path}, or give a file as weights; once there, no network is needed"
    try:
        return urllib.request.build_opener(_Redirects).open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        error.close()
        what = f"HTTP {error.code} {_reason(error.reason)}"  # of redirects without end, or to files, it tells
        if error.code in AGAIN or error.code >= 500:
            raise _CutError(what) from None
        raise FetchError(f"{url}: {what}; {by_hand}") from None
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, (TimeoutError, ConnectionResetError)):
            raise _CutError(f"no connection ({_reason(reason)})") from None
        raise FetchError(f"{url}: no connection ({_reason(reason)}); {by_hand}") from None
    except FetchError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"no answer ({_reason(error)})") from None


def _check(url: str, part: Path, digest: str) -> None:
    """Deletes the part and raises where its hash is another."""
    kind, _, wanted = digest.partition(":")
    if not kind:
        return
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if not found.startswith(wanted.lower()):
        part.unlink()
        _tag(part).unlink(missing_ok=True)
        raise FetchError(f"{url}: its {kind} begins with {found[: len(wanted)]}, expected {wanted}; deleted, call again or take another source")
