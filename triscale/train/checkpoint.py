"""Checkpoints to resume training from: whole or not there, written beside the training, read without executing anything.

A checkpoint is a safetensors file, `state-00001234.safetensors` for step 1234. Its metadata carry one key, "triscale-state":
JSON with "format": 1, the step, the score, what the caller says of it ("about"), and two CRC-32: of the data, and of the
header itself with that sum's eight digits as zeros. So any flipped bit is seen. Keep a run's checkpoints in a folder of their
own run: steps of two runs in one folder can't be told apart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from triscale.text import first_line

FORMAT = 1
KEY = "triscale-state"
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
PREFIX = b'{"__metadata__": {"%s": "{\\"header\\": \\"' % KEY.encode()  # the header's sum follows, so that it is found without parsing
ZEROS = b"00000000"
LISTED = 10  # of the things that differ in a list
NAME = re.compile(r"state-([0-9]{8}|[1-9][0-9]{8,})\.safetensors")
PART = re.compile(rf"\.{NAME.pattern}\.[0-9a-f]{{8}}\.part")
# The safetensors library's names of types. Older versions of it don't know the two FNUZ.
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64, "BOOL": torch.bool}
TYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
TYPES |= {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8}
TYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over. The message is one line that names the file and says why."""


class StateError(ValueError):
    """A file that is no checkpoint, or not whole. The message is one line that names the file."""


def write_checkpoint(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes one checkpoint now, whole or not at all, and makes its folder. Its step is the one in its name, if there is one.

    tensors: of any device and layout in memory; stored contiguous, bit for bit. about: what JSON can hold; tuples come back as
    lists. Raises OSError with the name of the file, ValueError for a tensor that can't be stored, TypeError for such an `about`.
    """
    path, host = Path(path), _Host()
    data = host.fill(places := _places(tensors), tensors)
    _write(path, places, data, json.dumps({"step": _step(path), "score": None, "about": dict(about)}))


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU and in the order they were given in, and `about`. Each has memory of its own.

    Raises StateError unless the file is whole: header, sizes and both sums.
    """
    with _told(Path(path)), open(path, "rb") as file:
        header = _read_header(Path(path), file)
        return _read_tensors(header, file), header.about


class Checkpoints:
    """The checkpoints of a run in `folder`: written by one thread in the background, the newest `keep` and the best kept.

    `save` copies into one of two host buffers, each allocated once, the second only when a save comes while the first is still
    being written; it waits only while both are. EfficientNet-B0 with average and RMSProp's two slots (85 MB) stops training for
    17 to 30 ms a save on an EPYC core, 50 to 80 ms where a buffer is allocated. Use from one thread, as a context manager or with
    `close`. What was handed over is written even if the program ends without either.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.folder, self.keep = Path(folder), keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")  # its thread starts with the first save
        self._hosts: deque[_Host] = deque()  # the one handed over longest ago first
        self._scores: dict[Path, float | None] = {}  # of files whose header was whole when it was read or written
        self._broken: set[Path] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, score: float | None = None, wait: bool = False) -> None:
        """Copies the state and hands it to the writer. tensors, about: as in write_checkpoint; both may change afterwards.

        score: the highest is the best; none, or not a number, never is. wait: return when the file is whole on the disk.
        First raises, once, the error of an earlier save whose writing failed (OSError with the name of its file, on a full
        disk for one); then nothing is saved by this call, and the next one works again.
        """
        if type(step) is not int or step < 0:
            raise ValueError(f"step: expected a whole number from 0, found {step!r}")
        self._raise_first([host for host in self._hosts if host.job and host.job.done()])
        path = self.folder / f"state-{step:08d}.safetensors"
        score = None if score is None or math.isnan(score) else float(score)
        text = json.dumps({"step": step, "score": score, "about": dict(about)})  # here, as `about` may change
        places = _places(tensors)
        if len(self._hosts) < 2 and all(host.job and not host.job.done() for host in self._hosts):
            self._hosts.appendleft(_Host())
        self._raise_first([self._hosts[0]])
        data = self._hosts[0].fill(places, tensors)
        self._hosts[0].job = self._pool.submit(self._write_next, path, places, data, text, score)
        self._hosts.rotate(-1)
        if wait:
            self.wait()

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocates both buffers for states of this size now, so that no later save stops a step for it. Before the first save."""
        places = _places(tensors)
        while len(self._hosts) < 2:
            self._hosts.append(_Host())
        for host in self._hosts:
            host.fill(places, tensors)

    def wait(self) -> None:
        """Returns when all that was saved is whole on the disk. Raises the writer's error, once; of two, the second next time."""
        self._raise_first(list(self._hosts))

    def newest(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """The whole checkpoint of the highest step, read, or None. One that isn't whole is passed over with a CheckpointWarning.

        What this object is still writing doesn't count yet. Also removes what killed writers left, in no case what a living one
        is writing.
        """
        _sweep(self.folder)
        for path in self._files():
            try:
                tensors, about = read_checkpoint(path)
            except StateError as error:
                if not os.path.lexists(path):  # deleted by a living run, which has newer ones by now
                    return self.newest()
                self._broken.add(path)
                warnings.warn(f"{error}; passed over", CheckpointWarning, stacklevel=2)
            else:
                self._broken.discard(path)
                return path, tensors, about
        return None

    def best(self) -> Path | None:
        """The file of the highest score, of equal ones the newer; None without a score. Its header is verified, its data aren't."""
        return self._best(self._whole())

    def close(self) -> None:
        """wait(), then the thread ends."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except OSError as late:
            if error is None:
                raise
            error.add_note(f"and a checkpoint could not be written: {late}")  # what ended the run matters more

    @staticmethod
    def _raise_first(hosts: list[_Host]) -> None:
        """Waits for all of them. An error is forgotten as it is raised."""
        for host in hosts:
            if host.job:
                host.job.exception()  # waits
        for host in hosts:
            job, host.job = host.job, None
            if job:
                job.result()

    def _write_next(self, path: Path, places: list[_Place], data: memoryview, text: str, score: float | None) -> None:
        """The writer's work. Older files go only when the new one is whole."""
        _write(path, places, data, text)
        self._scores[path] = score
        self._broken.discard(path)
        whole = self._whole()
        for old in set(whole) - {path, self._best(whole), *whole[: self.keep]}:
            old.unlink(missing_ok=True)
            self._scores.pop(old, None)
        _sweep(self.folder)

    def _files(self) -> list[Path]:
        """Files named like checkpoints, the highest step first."""
        with contextlib.suppress(FileNotFoundError):
            found = [(int(match[1]), name) for name in os.listdir(self.folder) if (match := NAME.fullmatch(name))]
            return [self.folder / name for _, name in sorted(found, reverse=True)]
        return []

    def _whole(self) -> list[Path]:
        """Of _files, those with a whole header, but for those found broken: they neither count nor are they deleted."""
        for path in self._files():
            if path not in self._scores and path not in self._broken:
                try:
                    with _told(path), open(path, "rb") as file:
                        self._scores[path] = _read_header(path, file).score
                except StateError:
                    self._broken.add(path)
        return [path for path in self._files() if path in self._scores and path not in self._broken]

    def _best(self, whole: list[Path]) -> Path | None:
        scored = [(score, -i) for i, path in enumerate(whole) if (score := self._scores.get(path)) is not None]
        return whole[-max(scored)[1]] if scored else None


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie in the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class _Header:
    score: float | None
    about: dict[str, Any]
    crc32: int
    places: list[_Place]


class _Host:
    """A state in host memory. job: its writing, which must end before the next `fill`."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.job: Future[None] | None = None

    @torch.no_grad()
    def fill(self, places: list[_Place], tensors: Mapping[str, Tensor]) -> memoryview:
        size = max((place.end for place in places), default=0)
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if size > self.bytes.numel():  # page-locked memory lets a GPU copy at full speed, and all tensors without a stop between
            self.bytes = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=bool(devices))
        for place in places:
            target = self.bytes[place.start : place.end].view(place.dtype).view(place.shape)
            target.copy_(tensors[place.name], non_blocking=bool(devices))
        for device in devices:
            torch.cuda.synchronize(device)
        return memoryview(self.bytes.numpy())[:size]  # type: ignore[arg-type]  # numpy's arrays are buffers


def _places(tensors: Mapping[str, Tensor]) -> list[_Place]:
    """In the order of `tensors`; in the data, larger items come first, so that each tensor is aligned."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_meta or name == "__metadata__":
            raise ValueError(f"'{name}' can't be stored: {tensor.dtype}, {tensor.layout}, on {tensor.device}")
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
        starts[name], end = end, end + tensors[name].nbytes
    return [_Place(n, t.dtype, tuple(t.shape), starts[n], starts[n] + t.nbytes) for n, t in tensors.items()]


def _step(path: Path) -> int | None:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _write(path: Path, places: list[_Place], data: memoryview, text: str) -> None:
    """text: the JSON of step, score and about. The long parts (sum, write, sync) leave the interpreter to other threads."""
    codes = {place.name: {"dtype": NAMES[place.dtype], "shape": place.shape, "data_offsets": (place.start, place.end)} for place in places}
    state = f'{{"header": "{ZEROS.decode()}", "format": {FORMAT}, "crc32": {zlib.crc32(data)}, {text[1:]}'
    header = json.dumps({"__metadata__": {KEY: state}, **codes}).encode()
    header += b" " * (-len(header) % 8)  # the data begin aligned, as the format wants
    if len(header) > MAX_HEADER:
        raise ValueError(f"{path}: names and 'about' take {len(header)} bytes, more than the {MAX_HEADER} of a header")
    header = header.replace(ZEROS, b"%08x" % zlib.crc32(header), 1)
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part, handle = _open_part(path)
        with open(handle, "wb", buffering=0) as file:
            for block in (memoryview(struct.pack("<Q", len(header)) + header), data):
                while block:
                    block = block[file.write(block) :]
            os.fsync(handle)
            os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = os.fspath(path)  # the user knows the file by this name
            if error.filename2 is not None:  # of a renaming
                del error.filename2
        if part:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        raise


def _open_part(path: Path) -> tuple[Path, int]:
    """A new file beside `path`. Its lock says that its writer lives, across containers too; it ends with the process."""
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody gets one, and nothing is swept
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return part, handle
        os.close(handle)  # swept between the two calls


def _sweep(folder: Path) -> None:
    """Removes what killed writers left."""
    with contextlib.suppress(OSError):
        for name in filter(PART.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError), open(folder / name, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error while its writer lives
                os.unlink(folder / name)


def _sync_folder(folder: Path) -> None:
    """The renaming itself reaches the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't, and say so
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong in reading, as a StateError."""
    try:
        yield
    except OSError as error:
        raise StateError(f"{path}: {(error.strerror or type(error).__name__).lower()}") from None
    except (ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
        reason = first_line(error)
        raise StateError(f"{path}: not a whole checkpoint ({reason})") from None


def _read_header(path: Path, file: BufferedReader) -> _Header:
    """Leaves `file` at the data. Nothing is parsed before its sum is right."""
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
    if length > min(MAX_HEADER, size - 8):
        raise ValueError("cut short in its header, or another kind of file")
    raw = file.read(length)
    if not raw.startswith(PREFIX):
        raise ValueError("another kind of file, or its header is damaged")
    told, rest = raw[len(PREFIX) : len(PREFIX) + len(ZEROS)], raw[len(PREFIX) + len(ZEROS) :]
    if told != b"%08x" % zlib.crc32(PREFIX + ZEROS + rest):
        raise ValueError("its header is damaged")
    entries = json.loads(raw)
    state = json.loads(entries.pop("__metadata__")[KEY])
    if state["format"] != FORMAT:
        raise ValueError(f'"format": {state["format"]!r}, expected {FORMAT}')
    if state["step"] != _step(path):
        raise ValueError(f"renamed: it is of step {state['step']}")
    places = [_Place(name, TYPES[e["dtype"]], tuple(e["shape"]), *e["data_offsets"]) for name, e in entries.items()]
    end = 0
    for place in sorted(places, key=lambda place: (place.start, place.end)):
        count = math.prod(place.shape) * place.dtype.itemsize
        sane = all(type(n) is int and n >= 0 for n in (*place.shape, place.end)) and math.prod(max(n, 1) for n in place.shape) < 1 << 48
        if not sane or place.start != end or place.end - end != count:
            raise ValueError(f"'{place.name[:80]}' lies elsewhere than its shape says")
        end = place.end
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, expected {8 + length + end}")
    if not isinstance(state["about"], dict) or not isinstance(state["score"], float | None):
        raise ValueError("its metadata are of another kind")
    return _Header(state["score"], state["about"], state["crc32"], places)


def _read_tensors(header: _Header, file: BufferedReader) -> dict[str, Tensor]:
    """Raises ValueError if the data's sum is another than the header's."""
    tensors = {place.name: torch.empty(place.shape, dtype=place.dtype, device="cpu") for place in header.places}
    crc = 0
    for place in sorted(header.places, key=lambda place: place.start):
        if place.end > place.start:
            view = memoryview(tensors[place.name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            if file.readinto(view) != len(view):
                raise ValueError("cut short while it was read")
            crc = zlib.crc32(view, crc)
    if crc != header.crc32:
        raise ValueError("its data are damaged")
    return tensors


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dicts and lists, one short line each: "recipe.lr: 0.1 then, 0.2 now". Empty if equal.

    Both are compared as JSON keeps them: tuples are lists, NaN equals NaN, 1 equals 1.0 but not True. Lists of names are
    compared as sets first: "classes: 'cat' is new, 'dog' is gone". Of a list at most 10 things are told.
    Raises TypeError for what JSON can't hold.
    """
    return list(_compare("", json.loads(json.dumps(saved)), json.loads(json.dumps(now))))


def _compare(where: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            inner = f"{where}.{_name(key)}" if where else _name(key)
            if key not in now:
                yield f"{inner}: {_short(then[key])} then, not there now"
            elif key not in then:
                yield f"{inner}: not there then, {_short(now[key])} now"
            else:
                yield from _compare(inner, then[key], now[key])
    elif isinstance(then, list) and isinstance(now, list):
        yield from _compare_lists(where, then, now)
    elif (then != now and (then == then or now == now)) or isinstance(then, bool) != isinstance(now, bool):
        yield f"{where}: {_short(then)} then, {_short(now)} now"


def _compare_lists(where: str, then: list[Any], now: list[Any]) -> Iterator[str]:
    if all(isinstance(item, str) for item in then + now) and set(then) != set(now):
        before, after = set(then), set(now)
        kinds = {"new": [x for x in dict.fromkeys(now) if x not in before], "gone": [x for x in dict.fromkeys(then) if x not in after]}
        yield f"{where}: " + ", ".join(_several(names, kind) for kind, names in kinds.items() if names)
    elif len(then) != len(now):
        yield f"{where}: {len(then)} items then, {len(now)} now"
    else:
        inner = [list(_compare(f"{where}[{i}]", a, b)) for i, (a, b) in enumerate(zip(then, now, strict=True))]
        lines = [line for found in inner for line in found]
        if len(lines) > LISTED:
            yield f"{where}: {sum(map(bool, inner))} of {len(then)} items differ, first {lines[0].removeprefix(where)}"
        else:
            yield from lines


def _several(names: list[str], kind: str) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(map(_short, names[:LISTED]))}{more} {'is' if len(names) == 1 else 'are'} {kind}"


def _name(key: str) -> str:
    return key if key.isprintable() else _short(key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
