"""Checkpoints: bit for bit, whole or not there, whatever kills the writer or damages the file."""

import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from triscale.train.checkpoint import (
    KEY,
    NAMES,
    PREFIX,
    Checkpoints,
    CheckpointWarning,
    StateError,
    _open_part,
    differences,
    read_checkpoint,
    write_checkpoint,
)

ABOUT = {"recipe": {"lr": 0.1}, "classes": ["cat", "dög", 'quo"te', "\ud800"], "loss": float("inf"), "none": None}


def raw(tensor):
    """All of a tensor's bits; NaNs compare equal by them."""
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def random_bits(dtype, *shape):
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def every_kind():
    """Each type as a matrix, scalar and empty, and in the ways in which a tensor isn't contiguous."""
    state = {}
    for dtype in NAMES:
        name = str(dtype).split(".")[-1]
        wide = random_bits(dtype, 5, 6)
        state |= {f"{name}.plain": wide, f"{name}.scalar": random_bits(dtype, 1).reshape(()), f"{name}.empty": random_bits(dtype, 0, 3)}
        state |= {f"{name}.turned": wide.t(), f"{name}.part": wide[1::2, ::3], f"{name}.spread": wide[:1].expand(4, 6)}
    payloads = torch.tensor([0x7FC00001, 0x7F800001, -4194303, -0x80000000], dtype=torch.int32)  # NaNs quiet, signalling, negative; -0.0
    weight = torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    return {**state, "payloads": payloads.view(torch.float32), "conj": torch.randn(3, dtype=torch.complex64).conj(), "weight": weight}


def equal(step, size=64):
    """A state whose every value is its step."""
    return {"a": torch.full((size,), float(step)), "b": torch.full((3,), step), "c.d": torch.full((2, size), step, dtype=torch.float64)}


def holds(tensors, step):
    return set(tensors) == {"a", "b", "c.d"} and all((value == step).all() for value in tensors.values())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def file(step):
    return f"state-{step:08d}.safetensors"


def newest(folder):
    """(step, messages of warnings) that a fresh reader finds; every value has been held to the step."""
    with Checkpoints(folder) as checkpoints, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.newest()
    assert all(w.category is CheckpointWarning for w in caught)
    messages = [str(w.message) for w in caught]
    if found is None:
        return None, messages
    path, tensors, about = found
    step = int(path.stem.split("-")[1])
    assert holds(tensors, step)
    assert about == {"at": step}
    return step, messages


def save(checkpoints, step, score=None, **more):
    checkpoints.save(step, equal(step, **more), {"at": step}, score=score, wait=True)


# The file.


def test_every_type_and_layout_comes_back_bit_for_bit_in_order(tmp_path):
    state = every_kind()
    path = tmp_path / "new" / "folder" / file(7)
    write_checkpoint(path, state, ABOUT)
    tensors, about = read_checkpoint(path)
    assert list(tensors) == list(state)
    assert {name: raw(t) for name, t in tensors.items()} == {name: raw(t.detach().resolve_conj()) for name, t in state.items()}
    assert about == ABOUT
    assert len({t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}) == sum(t.numel() > 0 for t in tensors.values())
    assert names(path.parent) == [file(7)]
    assert path.stat().st_mode & 0o777 == 0o666 & ~os_umask()


def os_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_safetensors_library_reads_the_file(tmp_path):
    state = every_kind()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, ABOUT, score=0.5)
    loaded = load_file(tmp_path / file(3))
    assert {name: raw(t) for name, t in loaded.items()} == {name: raw(t.detach().resolve_conj()) for name, t in state.items()}
    with safe_open(tmp_path / file(3), "pt") as opened:
        metadata = opened.metadata()
    told = json.loads(metadata[KEY])
    assert set(metadata) == {KEY}
    assert {k: told[k] for k in ("format", "step", "score", "about")} == {"format": 1, "step": 3, "score": 0.5, "about": ABOUT}
    data = (tmp_path / file(3)).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert told["crc32"] == zlib.crc32(data[8 + length :])
    assert length % 8 == 0


def test_an_empty_state_is_one(tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", {}, {})
    assert read_checkpoint(tmp_path / "x.safetensors") == ({}, {})


@pytest.mark.parametrize(
    ("tensors", "about", "kind", "told"),
    [
        ({"w": torch.empty(2, device="meta")}, {}, ValueError, "'w' can't be stored: torch.float32, torch.strided, on meta"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, {}, ValueError, "'w' can't be stored: torch.complex128"),
        ({"w": torch.eye(2).to_sparse()}, {}, ValueError, "'w' can't be stored: .*sparse"),
        ({"__metadata__": torch.eye(2)}, {}, ValueError, "'__metadata__' can't be stored"),
        ({}, {"x": {1, 2}}, TypeError, "set is not JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_at_once(tmp_path, tensors, about, kind, told):
    with pytest.raises(kind, match=told):
        write_checkpoint(tmp_path / file(1), tensors, about)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(kind, match=told):
            checkpoints.save(1, tensors, about)
        save(checkpoints, 2)
    assert names(tmp_path) == [file(2)]


# Damage.


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path):
    good, bad = tmp_path / file(5), tmp_path / "bad" / file(5)
    write_checkpoint(good, {"a": torch.arange(3), "b": torch.ones(2, dtype=torch.bool)}, {"x": "y"})
    data = good.read_bytes()
    bad.parent.mkdir()
    bad.write_bytes(data)
    count = 0

    def refused():
        nonlocal count
        with pytest.raises(StateError) as caught:
            read_checkpoint(bad)
        assert str(caught.value).startswith(f"{bad}: ")
        assert "\n" not in str(caught.value)
        count += 1

    handle = os.open(bad, os.O_RDWR)
    for i, byte in enumerate(data):
        for bit in range(8):
            os.pwrite(handle, bytes([byte ^ 1 << bit]), i)
            refused()
        os.pwrite(handle, bytes([byte]), i)
    assert read_checkpoint(bad)[1] == {"x": "y"}
    for size in (len(data) + 1, *reversed(range(len(data)))):
        os.ftruncate(handle, size)
        refused()
    os.close(handle)
    assert count == 9 * len(data) + 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.one_of(st.sampled_from([0, 0.25, 0.5, 0.75]), st.floats(0, 0.9999)), flip=st.one_of(st.none(), st.integers(0, 7)))
def test_a_damaged_one_is_passed_over_with_one_warning_and_the_older_taken(tmp_path, share, flip):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    path = folder / file(2)
    data = bytearray(path.read_bytes())
    at = int(share * len(data))
    if flip is None:
        del data[at:]
    else:
        data[at] ^= 1 << flip
    path.write_bytes(data)
    step, messages = newest(folder)
    assert step == 1
    assert len(messages) == 1
    assert str(path) in messages[0]


def test_foreign_files_are_passed_over_and_left(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        (tmp_path / file(9)).write_bytes(b"")
        (tmp_path / file(8)).write_text("not one of ours" * 100)
        (tmp_path / file(7)).mkdir()
        shutil.copy(tmp_path / file(1), tmp_path / file(6))
        (tmp_path / file(5)).symlink_to("nowhere")
        for other in ("state-1.safetensors", "state-000000011.safetensors", "model.safetensors", ".state-00000001.safetensors.mine.part"):
            (tmp_path / other).write_text("mine")
        before = names(tmp_path)
    step, messages = newest(tmp_path)
    assert step == 1
    assert [file(n) in message for n, message in zip((9, 8, 7, 6, 5), messages, strict=True)] == [True] * 5
    assert [re.sub(r"^.*safetensors: ", "", m) for m in messages[2:]] == [
        "is a directory; passed over",
        "not a whole checkpoint (renamed: it is of step 1); passed over",
        "no such file or directory; passed over",
    ]
    assert names(tmp_path) == before
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 2)
    assert names(tmp_path) == sorted({*before, file(2)} - {file(1)})


def forge(path, entries, **state):
    """A file with right sums and whatever else."""
    body = {"header": "0" * 8, "format": 1, "crc32": zlib.crc32(b"\0" * 8), "step": 1, "score": None, "about": {}, **state}
    header = json.dumps({"__metadata__": {KEY: json.dumps(body)}, **entries}).encode()
    assert header.startswith(PREFIX)
    header = header.replace(b"0" * 8, b"%08x" % zlib.crc32(header), 1)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


def entry(dtype="F32", shape=(2,), where=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": where}


@pytest.mark.parametrize(
    ("entries", "state"),
    [
        ({"a": entry(dtype="F99")}, {}),
        ({"a": entry(shape=(3,))}, {}),
        ({"a": entry(shape=(-1, -2))}, {}),
        ({"a": entry(shape=(2.0,))}, {}),
        ({"a": entry(shape="xx")}, {}),
        ({"a": entry(where=(0, 8, 9))}, {}),
        ({"a": entry(where=(8, 16))}, {}),
        ({"a": entry(where=(-8, 0))}, {}),
        ({"a": entry(), "b": entry()}, {}),
        ({"a": entry(shape=(1,), where=(0, 4))}, {}),
        ({"a": entry(), "b": entry(shape=(0, 1 << 40, 1 << 40), where=(8, 8))}, {}),
        ({"a": entry(), "b": entry(shape=(1 << 60,), where=(8, 8 + (1 << 62)))}, {}),
        ({"a": 5}, {}),
        ({"a": entry()}, {"format": 2}),
        ({"a": entry()}, {"step": 2}),
        ({"a": entry()}, {"score": "high"}),
        ({"a": entry()}, {"score": True}),
        ({"a": entry()}, {"about": [1]}),
        ({"a": entry()}, {"crc32": 1}),
    ],
)
def test_a_forged_header_is_refused(tmp_path, entries, state):
    forge(tmp_path / file(1), {"a": entry()})
    assert read_checkpoint(tmp_path / file(1))[0]["a"].tolist() == [0, 0]
    forge(tmp_path / file(1), entries, **state)
    with pytest.raises(StateError, match=file(1)):
        read_checkpoint(tmp_path / file(1))


# The writer.


def test_save_copies(tmp_path):
    """What training changes right after doesn't reach the file; so for many in a row, through both buffers."""
    state, about = equal(0, size=50_000), {"at": 0}
    with Checkpoints(tmp_path, keep=30) as checkpoints:
        for step in range(1, 31):
            about["at"] = step
            for value in state.values():
                value.fill_(step)
            checkpoints.save(step, state, about)
            about["at"] = -1
            for value in state.values():
                value.fill_(-1)
    for step in range(1, 31):
        tensors, about = read_checkpoint(tmp_path / file(step))
        assert holds(tensors, step)
        assert about == {"at": step}


def test_reserved_buffers_are_the_ones_that_saves_use(tmp_path):
    state = {"a": torch.arange(100_000.0)}
    with Checkpoints(tmp_path, keep=3) as states:
        states.reserve(state)
        places = [host.bytes.data_ptr() for host in states._hosts]
        for step in (1, 2, 3):
            states.save(step, {"a": state["a"] + step}, {})
        assert sorted(host.bytes.data_ptr() for host in states._hosts) == sorted(places)
        states.wait()
        assert torch.equal(states.newest()[1]["a"], state["a"] + 3)


def test_states_of_other_sizes_share_the_buffers(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, size in enumerate((10, 100_000, 1, 50_000, 200_000, 3)):
            checkpoints.save(step, equal(step, size=size), {"at": step})
    sizes = [read_checkpoint(tmp_path / file(step))[0]["a"].numel() for step in range(6)]
    assert sizes == [10, 100_000, 1, 50_000, 200_000, 3]


def test_save_returns_before_the_file_is_there_and_wait_after(tmp_path):
    state = {"a": torch.ones(16 << 20)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        assert not (tmp_path / file(1)).exists()  # 64 MB
        checkpoints.wait()
        assert (tmp_path / file(1)).exists()
        assert not [name for name in names(tmp_path) if name.endswith(".part")]


def test_an_error_of_the_writer_is_raised_exactly_once(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    checkpoints = Checkpoints(blocked / "run")
    checkpoints.save(1, equal(1), {})
    with pytest.raises(NotADirectoryError, match=file(1)) as caught:
        checkpoints.wait()
    assert caught.value.filename == str(blocked / "run" / file(1))
    checkpoints.wait()
    checkpoints.save(2, equal(2), {})
    while not any(host.job and host.job.done() for host in checkpoints._hosts):
        time.sleep(0.001)
    with pytest.raises(NotADirectoryError, match=file(2)):
        checkpoints.save(3, equal(3), {})
    with pytest.raises(NotADirectoryError, match=file(4)):
        checkpoints.save(4, equal(4), {}, wait=True)
    blocked.unlink()
    checkpoints.save(5, equal(5), {})
    checkpoints.close()
    checkpoints.close()
    assert names(blocked / "run") == [file(5)]


def test_leaving_the_context_raises_the_writers_error_or_notes_it(tmp_path):
    (tmp_path / "blocked").write_text("")
    with pytest.raises(NotADirectoryError, match=file(1)), Checkpoints(tmp_path / "blocked" / "run") as checkpoints:
        checkpoints.save(1, equal(1), {})

    def interrupted():
        with Checkpoints(tmp_path / "blocked" / "run") as checkpoints:
            checkpoints.save(2, equal(2), {})
            raise KeyError("training")

    with pytest.raises(KeyError, match="training") as caught:
        interrupted()
    assert file(2) in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "call", [lambda p: Checkpoints(p, keep=0), lambda p: Checkpoints(p).save(-1, {}, {}), lambda p: Checkpoints(p).save(1.0, {}, {})]
)
def test_senseless_arguments_are_refused(tmp_path, call):
    with pytest.raises(ValueError, match="expected"):
        call(tmp_path)


# What stays.


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scores=st.lists(st.sampled_from([None, 0.1, 0.5, 0.5, 0.9, -1.0, math.nan, math.inf]), min_size=1, max_size=8),
    keep=st.integers(1, 3),
    restart=st.integers(0, 8),
)
def test_the_newest_and_the_best_stay_also_after_a_restart(tmp_path, scores, keep, restart):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder, keep=keep)
    real = {}
    for step, score in enumerate(scores, start=1):
        if step == restart:
            checkpoints.close()
            checkpoints = Checkpoints(folder, keep=keep)
        save(checkpoints, step, score, size=4)
        if score is not None and not math.isnan(score):
            real[step] = score
        best = max(real, key=lambda s: (real[s], s), default=None)
        stay = {*range(max(1, step - keep + 1), step + 1), *([best] if best else [])}
        assert names(folder) == sorted(map(file, stay))
        assert checkpoints.best() == (folder / file(best) if best else None)
    checkpoints.close()
    assert Checkpoints(folder).best() == (folder / file(best) if best else None)


def test_a_broken_newer_one_does_not_push_out_whole_ones(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 100)
    shutil.copy(tmp_path / file(100), tmp_path / file(200))
    write_checkpoint(tmp_path / file(200), equal(200), {"at": 200})
    data = bytearray((tmp_path / file(200)).read_bytes())
    data[-1] ^= 1
    (tmp_path / file(200)).write_bytes(data)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.warns(CheckpointWarning, match="its data are damaged"):
            assert checkpoints.newest()[0] == tmp_path / file(100)
        save(checkpoints, 110)
        assert names(tmp_path) == [file(110), file(200)]
        save(checkpoints, 200)
    assert newest(tmp_path) == (200, [])
    assert names(tmp_path) == [file(200)]


def test_the_one_just_written_stays_even_if_newer_steps_lie_there(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 200)
        save(checkpoints, 100)
        assert names(tmp_path) == [file(100), file(200)]


def test_steps_of_nine_digits_are_ordered_as_numbers(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 99_999_999)
        save(checkpoints, 100_000_000)
    assert names(tmp_path) == ["state-100000000.safetensors"]
    assert newest(tmp_path) == (100_000_000, [])


def test_no_folder_no_checkpoints(tmp_path):
    assert newest(tmp_path / "none") == (None, [])
    assert Checkpoints(tmp_path / "none").best() is None
    assert names(tmp_path) == []
    with pytest.raises(StateError, match="no such file"):
        read_checkpoint(tmp_path / "none")


# Other processes.

FORKS = """
import contextlib, io, json, os, sys, time, resource, signal, traceback
from pathlib import Path
import torch
from triscale.train.checkpoint import *
from triscale.train.checkpoint import _open_part
from test_checkpoint import equal, save
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        try:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(json.loads(line))
        except BaseException:
            printed.write(traceback.format_exc())
        finally:
            os.write(1, f"out {json.dumps(printed.getvalue())}\\n".encode())
            os._exit(0)
    os.write(1, f"pid {pid}\\n".encode())
    os.waitpid(pid, 0)
    os.write(1, b"end\\n")
"""


class Forks:
    """Fresh processes without the two seconds that importing torch takes each time. Each line is one write: none tears another."""

    def __init__(self):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self.server = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.printed = None

    def until(self, kind):
        """The line of that kind; what the process printed, if that line comes before, is kept."""
        while not (line := self.server.stdout.readline()).startswith(kind):
            assert line.startswith("out "), line
            self.printed = json.loads(line[4:])
        return line

    def start(self, code):
        self.printed = None
        self.server.stdin.write(json.dumps(code) + "\n")
        self.server.stdin.flush()
        return int(self.until("pid").split()[1])

    def end(self):
        """What it printed, None if it was killed."""
        self.until("end")
        return self.printed

    def run(self, code):
        self.start(code)
        return self.end()


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.server.stdin.close()
    assert forks.server.wait(20) == 0
    forks.server.stdout.close()


LOOP = """
checkpoints = Checkpoints(Path({folder!r}))
found = checkpoints.newest()
step = found[2]["at"] if found else 0
while True:
    step += 1
    checkpoints.save(step, equal(step, size=200_000), {{"at": step}}, score=-step, wait=step % 5 == 0)
    if step % 5 == 0:
        with open({told!r}, "w") as file:
            file.write(str(step))
"""


def test_after_kills_at_random_moments_the_newest_is_whole(tmp_path, forks):
    folder, told = tmp_path / "run", tmp_path / "told"
    chance, parts, reached = random.Random(0), 0, 0
    for _ in range(10):
        pid = forks.start(LOOP.format(folder=str(folder), told=str(told)))
        time.sleep(chance.uniform(0.03, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert forks.end() is None
        parts += sum(name.endswith(".part") for name in names(folder)) if folder.exists() else 0
        step, messages = newest(folder)
        assert messages == []
        known = (told.read_text() if told.exists() else "") or "0"
        assert (step or 0) >= max(int(known), reached)
        reached = step or 0
        assert not folder.exists() or not [name for name in names(folder) if name.endswith(".part")]
    assert reached > 10
    assert parts > 0, "no kill came while a file was written"


def test_what_a_living_process_writes_is_not_removed(tmp_path, forks):
    save(Checkpoints(tmp_path), 1)
    code = f"part, handle = _open_part(Path({str(tmp_path / file(2))!r})); os.write(handle, b'x'); time.sleep(60)"
    pid = forks.start(code)
    while not (parts := [name for name in names(tmp_path) if name.endswith(".part")]):
        time.sleep(0.01)
    while not (tmp_path / parts[0]).stat().st_size:
        time.sleep(0.01)
    assert newest(tmp_path) == (1, [])
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3)
    assert names(tmp_path) == [parts[0], file(1), file(3)]
    os.kill(pid, signal.SIGKILL)
    assert forks.end() is None
    assert newest(tmp_path) == (3, [])
    assert names(tmp_path) == [file(1), file(3)]


def test_a_part_goes_only_when_its_writer_has_closed_it(tmp_path):
    parts = [_open_part(tmp_path / file(1)) for _ in range(2)]
    for gone in range(3):
        assert newest(tmp_path) == (None, [])
        assert names(tmp_path) == sorted(part.name for part, _ in parts[gone:])
        if gone < 2:
            os.close(parts[gone][1])


def test_readers_beside_a_writer_neither_disturb_it_nor_find_anything_broken(tmp_path, forks):
    """They sweep while its files appear, and files vanish while they read."""
    forks.start(
        f"checkpoints = Checkpoints(Path({str(tmp_path)!r}), keep=1)\n"
        "for step in range(1, 101): checkpoints.save(step, equal(step), {'at': step})\n"
        "checkpoints.close(); print('done')"
    )
    reached = 0
    while reached < 100:
        step, messages = newest(tmp_path)
        assert messages == []
        assert (step or 0) >= reached
        reached = step or 0
    assert forks.end() == "done\n"
    assert names(tmp_path) == [file(100)]


FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
checkpoints = Checkpoints(Path({folder!r}))
save(checkpoints, 1, 0.5)
checkpoints.save(2, equal(2, size=100_000), {{}})
for call in (checkpoints.wait, checkpoints.wait, lambda: save(checkpoints, 3), checkpoints.close):
    try:
        call()
        print("fine")
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_is_one_error_and_the_older_stay(tmp_path, forks):
    """A limit on the size of written files stands in for the full disk."""
    told = forks.run(FULL.format(folder=str(tmp_path))).splitlines()
    assert told == [f"OSError [Errno 27] File too large: '{tmp_path / file(2)}'", "fine", "fine", "fine"]
    assert names(tmp_path) == [file(1), file(3)]
    assert newest(tmp_path) == (3, [])


def test_the_best_is_known_to_a_fresh_process(tmp_path, forks):
    start = f"checkpoints = Checkpoints(Path({str(tmp_path)!r}), keep=1)\n"
    assert forks.run(start + "save(checkpoints, 1, 0.9); save(checkpoints, 2, 0.5); print(checkpoints.best().name)") == f"{file(1)}\n"
    assert forks.run(start + "save(checkpoints, 3, 0.6); print(checkpoints.best().name)") == f"{file(1)}\n"
    assert names(tmp_path) == [file(1), file(3)]
    assert forks.run(start + "save(checkpoints, 4, 0.9); print(checkpoints.best().name)") == f"{file(4)}\n"
    assert names(tmp_path) == [file(4)]


MEMORY = """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
checkpoints = Checkpoints(Path({folder!r}))
state = equal(1, size=100_000)
for step in range(200):
    checkpoints.save(step, state, {{"order": list(range(1000))}}, score=step % 7)
    if step == 20:
        checkpoints.wait()
        early = resident()
checkpoints.wait()
print(resident() - early)
"""


def test_memory_does_not_grow_over_200_saves(tmp_path, forks):
    assert int(forks.run(MEMORY.format(folder=str(tmp_path)))) < 4_000_000  # a state is 2 MB


def test_a_program_that_ends_without_waiting_leaves_a_whole_file(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from triscale.train.checkpoint import Checkpoints; from test_checkpoint import equal; "
        "Checkpoints(Path(sys.argv[1])).save(4, equal(4, size=1_000_000), {'at': 4})"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env, timeout=60)
    assert newest(tmp_path) == (4, [])
    assert names(tmp_path) == [file(4)]


# Differences.


@pytest.mark.parametrize(
    ("saved", "now", "told"),
    [
        ({"recipe": {"lr": 0.1, "epochs": 3}}, {"recipe": {"lr": 0.2, "epochs": 3}}, ["recipe.lr: 0.1 then, 0.2 now"]),
        ({"classes": ["ant", "dog"]}, {"classes": ["ant", "cat"]}, ["classes: 'cat' is new, 'dog' is gone"]),
        ({"classes": ["a", "b", "c"]}, {"classes": ("a",)}, ["classes: 'b', 'c' are gone"]),
        ({"classes": ["a", "b"]}, {"classes": ["b", "a"]}, ["classes[0]: 'a' then, 'b' now", "classes[1]: 'b' then, 'a' now"]),
        ({"files": ["a", "b"]}, {"files": ["a", "b", "b"]}, ["files: 2 items then, 3 now"]),
        ({"a": 1, "b": {"c": 2}}, {"b": {"d": 2}}, ["a: 1 then, not there now", "b.c: 2 then, not there now", "b.d: not there then, 2 now"]),
        ({"mean": [1, 2, 3]}, {"mean": [1, 2, 4.5]}, ["mean[2]: 3 then, 4.5 now"]),
        ({"s": [{"k": 3}, {"k": 5}]}, {"s": [{"k": 3}, {"k": 7}]}, ["s[1].k: 5 then, 7 now"]),
        ({"x": list(range(20))}, {"x": [0, *range(2, 21)]}, ["x: 19 of 20 items differ, first [1]: 1 then, 2 now"]),
        (
            {"c": []},
            {"c": [f"n{i}" for i in range(13)]},
            ["c: " + ", ".join(f"'n{i}'" for i in range(10)) + " and 3 more are new"],
        ),
        ({"flip": True}, {"flip": 1}, ["flip: True then, 1 now"]),
        ({"a": {"b": 1}}, {"a": None}, ["a: {'b': 1} then, None now"]),
        ({"a": "x" * 100}, {"a": "y\nz"}, ["a: '" + "x" * 56 + "... then, 'y\\nz' now"]),
        ({"a\nb": 1}, {}, ["'a\\nb': 1 then, not there now"]),
        ({"lr": 1, "loss": math.nan, "ids": {"5": 1}}, {"lr": 1.0, "loss": math.nan, "ids": {5: 1}}, []),
        ({"loss": math.nan}, {"loss": 1.0}, ["loss: nan then, 1.0 now"]),
    ],
)
def test_differences(saved, now, told):
    assert differences(saved, now) == told


def nested(leaves):
    inner = st.recursive(leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=4), max_leaves=12)
    return st.dictionaries(st.text(max_size=2), inner, max_size=4)


ANY = nested(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5))
PLAIN = nested(st.none() | st.integers(0, 3) | st.sampled_from(["a", "b"]))  # few values, so that equal ones are met; == is exact on them


@settings(max_examples=100, deadline=None)
@given(a=ANY, b=ANY, c=PLAIN, d=PLAIN)
def test_differences_are_one_line_each_and_none_only_between_equals(a, b, c, d):
    assert differences(a, json.loads(json.dumps(a))) == []
    assert all(len(line.splitlines()) == 1 for line in differences(a, b))
    assert bool(differences(c, d)) == (c != d)
