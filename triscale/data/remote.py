"""Remote shards: fetched whole into the cache, several at a time."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from triscale.data.cache import locked
from triscale.data.index import INDEX, ROWS, Index, has_index, read_index
from triscale.data.sources import DataError
from triscale.data.tar import BLOCK, is_header
from triscale.download import FetchError, download
from triscale.files import cache_folder
from triscale.text import printable

if TYPE_CHECKING:
    from triscale.data.datasets import Watch

AT_A_TIME = 4  # connections


def fetch_shards(data: str, urls: list[str], watch: Watch | None) -> tuple[list[Path], tuple[str, ...]]:
    """(the shards' files in the cache, in the order of `urls`, what is to be told); no urls: those of the pack whose folder is `data`.

    What is there is taken as it is. A pack's index.json beside them gives their check sums. A server that stalls or drops is asked
    again, from where it broke off (`triscale/download.py`). Raises FetchError, DataError.
    """
    base = (urls[0] if urls else data).rpartition("/")[0] + "/"
    places = {url: _place(url) for url in urls}
    with locked(_place(base + INDEX)):
        if urls and all(p.exists() for p in places.values()):
            return list(places.values()), ()
        index, notes = _index(base, needed=not urls)
        if not urls and index is not None:
            urls = [base + quote(s.file) for s in index.shards]
            places = {url: _place(url) for url in urls}
        sums = {_place(base + quote(s.file)): f"sha256:{s.sha256}" for s in index.shards} if index else {}
        _fetch_all([(url, path, sums.get(path, "")) for url, path in places.items() if not path.exists()], watch)
    return list(places.values()), notes


def _place(url: str) -> Path:
    """HOST/PATH in the cache, so that one fetched by hand can be put there."""
    parts = urlsplit(url)
    names = [quote(name, safe="+,=@~%") for name in (parts.netloc, *parts.path.split("/")) if name not in ("", ".", "..")]
    if parts.query:
        raise DataError(f"{url}: expected an address without a query; fetch the shards by hand and give their folder")
    return cache_folder("shards").joinpath(*names)


def _index(base: str, *, needed: bool) -> tuple[Index | None, tuple[str, ...]]:
    """(the pack's index, with its rows beside it in the cache, or None where the server has none; what is to be told).

    One that can't be read isn't kept, or it would be in the way for ever.
    """
    path = _place(base + INDEX)
    if not has_index(path.parent):
        try:
            download(base + INDEX, path)
        except FetchError as error:
            if not needed and re.search(r": HTTP 40[134]\b", str(error)):  # 401, 403: what object stores say of what isn't there
                return None, ()
            raise
    if not has_index(path.parent):
        path.unlink()
        if needed:
            raise DataError(f"{base + INDEX}: no index of a pack; give its shards, e.g. {base}train-{{000000..000146}}.tar")
        return None, (f"{base + INDEX} is ignored: it is no index of a pack, so the shards come without check sums",)
    try:
        index = read_index(path)
    except DataError:
        path.unlink()
        raise
    if not _place(base + ROWS).exists():
        download(base + ROWS, _place(base + ROWS), digest=f"sha256:{index.rows_sha256}")
    return index, ()


def _fetch(url: str, path: Path, digest: str, progress: Callable[[int, int | None], None]) -> None:
    """A shard, under its name once it begins as one: servers send error pages with status 200."""
    fetched = path.with_name(path.name + ".fetched")
    download(url, fetched, digest=digest, progress=progress)
    with open(fetched, "rb") as file:
        head = file.read(BLOCK)
    if not is_header(head):
        size = fetched.stat().st_size
        fetched.unlink()
        raise DataError(f"{url}: no tar archive, but {size} bytes that begin {printable(repr(head[:40]))}; see to the address, then call again")
    os.replace(fetched, path)


def _fetch_all(wanted: list[tuple[str, Path, str]], watch: Watch | None) -> None:
    """Each (URL, file, check sum). After one has failed none is begun. watch: bytes so far, and in all of those begun."""
    sizes: dict[str, tuple[int, int]] = {}
    lock, failed = threading.Lock(), threading.Event()

    def teller(url: str) -> Callable[[int, int | None], None]:
        def tell(done: int, total: int | None) -> None:
            with lock:
                sizes[url] = done, total or done
                if watch:
                    watch("fetching shards", sum(d for d, _ in sizes.values()), sum(t for _, t in sizes.values()))

        return tell

    def one(item: tuple[str, Path, str]) -> None:
        url, path, digest = item
        if failed.is_set():
            return
        try:
            _fetch(url, path, digest, teller(url))
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for done in [pool.submit(one, item) for item in wanted]:
            done.result()
