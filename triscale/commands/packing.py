"""pack: a data set as tar shards with an index, made once, that training reads several times faster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from triscale.commands.bars import bars
from triscale.quantities import count, size
from triscale.text import printable

if TYPE_CHECKING:
    from triscale.data.datasets import Listing, Watch
    from triscale.data.index import Index
    from triscale.data.pack import Packing

SHOWN = 20  # lines of what was left out


def pack(
    data: str,
    out: Path,
    /,
    *,
    short_side: int = 256,
    quality: int = 90,
    shard_size: str = "256MB",
    verify: bool = False,
    workers: int | None = None,
    data_dir: str | None = None,
    draw: bool = True,
) -> int:
    """Pack a data set once into tar shards with an index, from which training reads without most of the decoding.

    Training images go to train-000000.tar and so on, shuffled once, held-out ones to val-000000.tar; any WebDataset reader
    reads them. Stopped or killed at any point, the same command goes on and gives the same bytes. Unreadable images are left
    out, listed in the index, and make the exit status 1.

    Args:
        data: a folder of class folders, shards, Parquet, or a name, as for train.
        out: the folder of the pack, new or begun.
        short_side: images whose shorter side is longer are resized to it and kept as JPEG, others as they are; 0: all as they are.
        quality: of that JPEG, 1 to 100.
        shard_size: bytes that a shard stays under.
        verify: check every byte of the pack against its check sums, after packing or of one that is there, which DATA isn't
            read for.
        workers: processes that decode and encode; as many as there are cores unless given.
        data_dir: where a named data set lies.
        draw: hold a fifth of each class out where DATA has no part for that; without, all images become training shards.
    """
    from triscale.data.datasets import find
    from triscale.data.index import INDEX, read_index
    from triscale.data.pack import Packing

    if workers is not None and workers < 1:
        raise ValueError(f"--workers: expected 1 or more, found {workers}")
    packing = Packing(short_side, quality, round(count(shard_size)))
    if verify and (out / INDEX).is_file():
        index = read_index(out / INDEX)
        _same(out, index, packing)
    else:
        index = _pack(lambda watch: find(data, data_dir, watch, draw=draw), out, packing, workers or os.cpu_count() or 1)
    _tell(out, index)
    broken = verify and not _verified(out)
    return 1 if index.left_out or broken else 0


def _pack(find: Callable[[Watch], Listing], out: Path, packing: Packing, workers: int) -> Index:
    from triscale.data.pack import pack
    from triscale.data.sources import DataError, LoneImageError

    with bars() as bar:
        task = bar.add_task("listing images", total=None)

        def watch(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        try:
            listing = find(watch)
        except LoneImageError as error:
            raise DataError(f"{error}; or, to hold none out, give --no-draw") from None
        for note in listing.notes:
            bar.console.print(note, highlight=False)
        if listing.passed_over:
            names = ", ".join(listing.passed_over[:5]) + (f" and {len(listing.passed_over) - 5} more" if len(listing.passed_over) > 5 else "")
            bar.console.print(f"passed over: {names}", highlight=False, markup=False)
        bar.remove_task(task)
        task = bar.add_task("packing", total=None, unit="images")
        try:
            return pack(listing, out, packing, workers=workers, progress=lambda done, total: bar.update(task, completed=done, total=total))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command goes on from the last whole shard in {out}") from None


def _same(out: Path, index: Index, packing: Packing) -> None:
    """Raises ValueError where a pack that is only to be verified has other settings than were given."""
    other = [f"{k} {index.about.get(k)!r}, not {v!r}" for k, v in asdict(packing).items() if index.about.get(k) != v]
    if other:
        raise ValueError(f"{out}: a pack with {'; '.join(other)}; give its own settings to verify it")


def _tell(out: Path, index: Index) -> None:
    for part, what in (("train", "to train on"), ("val", "held out")):
        shards = [s for s in index.shards if s.split == part]
        print(f"{sum(s.samples for s in shards)} images {what} in {len(shards)} shards, {size(sum(s.bytes for s in shards))}")
    print(f"{len(index.classes)} classes; held out are {index.held_out_is}. Pack: {out}")
    for reason in index.left_out[:SHOWN]:
        print(f"left out: {printable(reason)}", file=sys.stderr)
    if index.left_out:
        more = f", {SHOWN} of them named here" if len(index.left_out) > SHOWN else ""
        total = len(index.left_out) + sum(s.samples for s in index.shards)
        print(f"{len(index.left_out)} of {total} images could not be read and were left out{more}; index.json lists them", file=sys.stderr)


def _verified(out: Path) -> bool:
    from triscale.data.verify import verify

    with bars() as bar:
        task = bar.add_task("verifying", total=None)
        wrong = verify(out, lambda done, total: bar.update(task, completed=done, total=total))
    for line in wrong[:SHOWN]:
        print(line, file=sys.stderr)
    if wrong:
        more = f", {SHOWN} of them named" if len(wrong) > SHOWN else ""
        print(f"{len(wrong)} fault{'s' * (len(wrong) > 1)}{more}; take those shards from a copy, or delete the pack and pack again", file=sys.stderr)
    else:
        print("every byte is as it was packed")
    return not wrong
