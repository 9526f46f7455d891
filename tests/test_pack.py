"""The pack: its bytes whatever stops it, what is in it, who can read it, and what is told when it isn't sound."""

import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from local_server import Served, serving
from PIL import Image

from triscale import cli
from triscale.data.datasets import DataError, find, picture
from triscale.data.decode import BadImage, decode
from triscale.data.encode import _jpeg
from triscale.data.index import INDEX, ROWS, Rows, index_text, read_index, read_rows, write_rows
from triscale.data.pack import Packing, pack
from triscale.data.sources import Texts, take
from triscale.data.verify import verify

SMALL = Packing(short_side=48, shard_size=20_000)
# What a process of its own runs; no torch, so that it starts at once. Arguments: source, out, workers.
PROCESS = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from triscale.data.pack import Packing, pack
from triscale.data.sources import Folder

def listing(root):
    files = sorted(p.name for p in Path(root).iterdir())
    make = lambda names: Folder(root, names, np.array([int(n.split("_")[1][0]) for n in names]))
    held = len(files) // 5
    return SimpleNamespace(data="set", train=make(files[held:]), held_out=make(files[:held]), classes=("a", "b"), held_out_is="a fifth")

def run(root, out, workers):
    pack(listing(root), Path(out), Packing(short_side=48, shard_size=20_000), workers=workers)

if __name__ == "__main__":
    print("ready", flush=True)
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
"""
# Kills itself at the n-th time that it opens, renames or removes something in `out`, for n from 1 until a run gets through; after
# each kill another process goes on. Prints a digest of what the folder then holds, for each n.
KILLED_EVERYWHERE = (
    PROCESS.split("if __name__")[0]
    + """
import hashlib, os, shutil, signal

def forked(task):
    child = os.fork()
    if not child:
        try:
            task()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]

def attempt(out, n):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") and out in str(arguments[0]):
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    run(sys.argv[1], out, 1)

n, out = 0, sys.argv[2]
while True:
    n += 1
    shutil.rmtree(out, ignore_errors=True)
    killed = forked(lambda: attempt(out, n))
    forked(lambda: run(sys.argv[1], out, 1))
    print({p: hashlib.sha256(Path(out, p).read_bytes()).hexdigest() for p in sorted(os.listdir(out))}, flush=True)
    if not killed:
        break
"""
)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter to the right


def noise(size, seed, kind="JPEG", **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 12 + 1, size[0] // 12 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """24 images in one folder, for the processes."""
    root = tmp_path_factory.mktemp("flat")
    for i in range(24):
        (root / f"{i:03}_{i % 2}.jpg").write_bytes(noise((60 + i, 80), i))
    return root


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Class folders with images of every kind; where a pack leaves them alone they are below 48 pixels."""
    root = tmp_path_factory.mktemp("mixed") / "set"
    for part in ("train", "val"):
        for c in ("größe", "b.c"):
            (root / part / c).mkdir(parents=True)
            files = {"large.jpg": noise((120, 90), 1), "small.jpg": noise((40, 200), 2), "small.png": noise((40, 40), 3, "PNG")}
            files |= {"猫 1.x.gif": noise((30, 20), 4, "GIF"), "large.png": noise((64, 128), 5, "PNG"), "misnamed.png": noise((20, 20), 6)}
            files |= {"huge.jpg": noise((801, 403), 7), "turned.jpg": noise((500, 333), 8, exif=TURNED)}
            files |= {f"more{i}.jpg": noise((100 + i, 100), 10 + i) for i in range(4)}
            for name, data in files.items():
                (root / part / c / name).write_bytes(data)
    return root


def contents(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def process(*arguments, code=PROCESS, **options):
    script = Path(arguments[1]).parent / "process.py"
    script.write_text(code)
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)


@pytest.fixture(scope="module")
def whole(flat, tmp_path_factory):
    """The pack of `flat` that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    assert process(flat, out, 1, stdout=subprocess.DEVNULL).wait() == 0
    assert len(list(out.glob("train-*.tar"))) > 3
    return out


def by_name(samples):
    return {samples.name(i): i for i in range(len(samples))}


def test_what_is_large_is_resized_and_the_rest_is_as_it_was(mixed, tmp_path):
    pack(find(str(mixed)), tmp_path / "pack", SMALL)
    before, after = find(str(mixed)), find(str(tmp_path / "pack"))
    assert (after.classes, after.held_out_is, after.kind) == (before.classes, "pack/val", "shards")
    for old, new in ((before.train, after.train), (before.held_out, after.held_out)):
        places, were = by_name(new), by_name(old)
        assert places.keys() == were.keys()
        for name, place in places.items():
            number = were[name]
            assert new.labels[place] == old.labels[number]
            data, pixels = new.read(place), decode(old.read(number))
            if min(pixels.shape[:2]) > 48:
                scale = 48 / min(pixels.shape[:2])
                size = [max(48, round(side * scale)) for side in pixels.shape[:2]]
                assert data.startswith(b"\xff\xd8")
                assert list(decode(data).shape[:2]) == size
                exact = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
                grey, expected = (np.asarray(i.convert("L"), float) for i in (Image.fromarray(decode(data)), exact))
                assert abs(grey - expected).mean() < 4
            elif name.endswith("gif"):
                assert data.startswith(b"\x89PNG")
                assert np.array_equal(decode(data), pixels)
            else:
                assert data == old.read(number)


def test_a_large_jpeg_that_is_broken_is_left_out(tmp_path):
    listing = find(str(broken_set(tmp_path / "set", lambda c, i: False)))
    for n, i in enumerate((0, 3)):
        Path(listing.train.samples.path(int(listing.train.numbers[i]))).write_bytes(noise((800, 700), 3)[: 20_000 - 19_000 * n])
    index = pack(listing, tmp_path / "pack", SMALL)
    assert sorted(index.left_out) == sorted(f"{listing.train.name(i)}: truncated, the JPEG data ends early" for i in (0, 3))


def test_short_side_0_keeps_every_byte(mixed, tmp_path):
    listing = find(str(mixed))
    pack(listing, tmp_path / "pack", Packing(short_side=0))
    packed = find(str(tmp_path / "pack")).train
    were = by_name(listing.train)
    assert all(packed.read(i) == listing.train.read(were[name]) for name, i in by_name(packed).items())


def test_scans_without_files_are_kept_to_the_pixel(tmp_path):
    listing = find("digits")
    few = listing._replace(train=take(listing.train, np.arange(40)), held_out=take(listing.held_out, np.arange(10)))
    pack(few, tmp_path / "pack", Packing())
    packed = find(str(tmp_path / "pack")).train
    were = by_name(few.train)
    assert len(packed) == 40
    assert all(np.array_equal(picture(packed, i), few.train.read(were[name])) for name, i in by_name(packed).items())


def test_packed_twice_and_by_any_number_of_workers_the_bytes_are_the_same(flat, whole, tmp_path):
    for i, workers in enumerate((1, 3)):
        assert process(flat, tmp_path / str(i), workers, stdout=subprocess.DEVNULL).wait() == 0
        assert contents(tmp_path / str(i)) == contents(whole)


def test_two_that_pack_the_same_wait_for_each_other(flat, whole, tmp_path):
    both = [process(flat, tmp_path / "pack", 1, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [running.wait() for running in both] == [0, 0]
    assert contents(tmp_path / "pack") == contents(whole)


@pytest.fixture
def in_memory():
    """A folder that no disk has to write, where there is such a thing: the kills come between system calls, not in them."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


def test_killed_between_any_two_changes_of_the_folder_it_goes_on_to_the_same_bytes(flat, in_memory):
    few = in_memory / "few"
    few.mkdir()
    for path in sorted(flat.iterdir())[:5]:
        shutil.copy(path, few)
    lines = process(few, in_memory / "out", code=KILLED_EVERYWHERE, stdout=subprocess.PIPE, text=True).communicate()[0].splitlines()
    assert len(lines) > 25, len(lines)
    assert len(set(lines)) == 1
    assert INDEX in lines[0]
    assert ".packing" not in lines[0]


def test_killed_at_random_again_and_again_it_goes_on_to_the_same_bytes(flat, whole, tmp_path):
    out, kills = tmp_path / "pack", 0
    for delay in (0.01, 0.03, 0.06, 0.4, 0.5, 0.6):
        running = process(flat, out, 2 if delay > 0.1 else 1, stdout=subprocess.PIPE, text=True)
        running.stdout.readline()
        time.sleep(delay * random.uniform(0.5, 1.5))
        running.kill()
        kills += running.wait() == -signal.SIGKILL
    assert process(flat, out, 1, stdout=subprocess.DEVNULL).wait() == 0
    assert kills > 0
    assert contents(out) == contents(whole)


def test_workers_end_with_a_process_that_is_killed(flat, tmp_path):
    running = process(flat, tmp_path / "pack", 2, stdout=subprocess.PIPE, text=True, start_new_session=True)
    running.stdout.readline()
    children, deadline = [], time.monotonic() + 20
    while len(children) < 2 and time.monotonic() < deadline:
        children = [int(p) for p in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
        time.sleep(0.01)
    running.kill()
    running.wait()
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) >= 2
    assert not any(alive(pid) for pid in children)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(flat, whole, tmp_path):
    limited = PROCESS.replace(
        '    print("ready"', '    import resource\n    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))\n    print("ready"'
    )
    running = process(flat, tmp_path / "pack", 1, code=limited, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = running.communicate()[1].strip().splitlines()[-1]
    assert "could not be written (File too large); whole shards stay: make room, and the same command goes on" in said
    assert not list((tmp_path / "pack").rglob("*.part"))
    assert process(flat, tmp_path / "pack", 1, stdout=subprocess.DEVNULL).wait() == 0
    assert contents(tmp_path / "pack") == contents(whole)


def test_a_flipped_byte_is_found_wherever_it_is(flat, whole, tmp_path):
    folder = tmp_path / "pack"
    shutil.copytree(whole, folder)
    assert verify(folder) == ()
    index = read_index(folder / INDEX)
    rows = read_rows(folder / ROWS, index)
    draw = random.Random(0)
    for number, shard in enumerate(index.shards):
        path, mine = folder / shard.file, np.flatnonzero(rows.shard == number)
        data = path.read_bytes()
        for at in [*draw.sample(range(len(data)), 12), len(data) - 1, 0, 513, int(rows.offset[mine[-1]])]:
            flipped = bytearray(data)
            flipped[at] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            (line,) = verify(folder)
            assert line.startswith(str(path))
            inside = mine[(rows.offset[mine] - 512 <= at)][-1:]
            if at < len(data) - 1024:
                assert rows.names[int(inside[0])] in line
            else:
                assert "its end" in line
        path.write_bytes(data)
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{path.name}: truncated at byte {len(data) - 1}, expected {len(data)} bytes"):
        find(str(folder))
    assert verify(folder) == (f"{path}: {len(data) - 1} bytes, expected {len(data)}",)
    path.unlink()
    assert verify(folder) == (f"{path}: cannot be read (No such file or directory)",)
    again = process(flat, folder, 1, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert f"{path.name}: no such file, expected {len(data)} bytes; take it from a copy, or delete" in again.communicate()[1]


@pytest.mark.parametrize("file", [INDEX, ROWS])
def test_a_flipped_byte_of_the_index_is_found(file, whole, tmp_path):
    folder = tmp_path / "pack"
    shutil.copytree(whole, folder)
    data = (folder / file).read_bytes()
    draw = random.Random(1)
    for at in draw.sample(range(len(data)), 40):
        flipped = bytearray(data)
        flipped[at] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(flipped)
        if file == INDEX and same_json(data, flipped):
            continue  # of the white space between values
        with pytest.raises(DataError, match="index"):
            verify(folder)


def same_json(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_an_index_made_to_mislead_is_refused(whole, tmp_path):
    folder = tmp_path / "pack"
    shutil.copytree(whole, folder)
    index = read_index(folder / INDEX)
    rows = read_rows(folder / ROWS, index)
    fields = {name: getattr(rows, name) for name in ("shard", "offset", "size", "label", "crc")}

    def changed(name, value):
        array = fields[name].copy()
        array[3] = value
        return Rows(**{**fields, name: array}, names=rows.names)

    for bad, said in (
        (changed("offset", 1 << 40), "outside its shard"),
        (changed("offset", -5), "outside its shard"),
        (changed("size", np.int64(2**63 - 1)), "outside its shard"),
        (changed("label", 2), "a label without a class"),
        (changed("shard", 99), "a shard that isn't there"),
        (Rows(**{k: v[:-1] for k, v in fields.items()}, names=rows.names), "rows"),
        (Rows(**fields, names=Texts.of(rows.names.data, rows.names.ends[::-1].copy())), "names that overlap"),
    ):
        lying = replace(index, rows_sha256=write_rows(folder / ROWS, bad))
        (folder / INDEX).write_text(index_text(lying))
        with pytest.raises(DataError, match=said):
            find(str(folder))
    for file in ("../x.tar", "/etc/x.tar", "a\\x.tar", "x.txt"):
        (folder / INDEX).write_text(index_text(replace(index, shards=(replace(index.shards[0], file=file), *index.shards[1:]))))
        with pytest.raises(DataError, match="no index of a pack"):
            find(str(folder))
    for text, said in (("{}", "no index"), ("[" * 100_000, "no index"), ('{"format": 2}', "format 2, this version reads 1")):
        (folder / INDEX).write_text(text)
        with pytest.raises(DataError, match=said):
            find(str(folder))


def test_an_index_with_numbers_and_texts_that_no_pack_has(whole, tmp_path):
    folder = tmp_path / "pack"
    shutil.copytree(whole, folder)
    index = read_index(folder / INDEX)
    first, *rest = index.shards
    for change in ({"bytes": 2**70}, {"samples": 2**70}, {"split": "../x"}, {"file": "train-\0.tar"}, {"file": "\x1b[2J.tar"}):
        (folder / INDEX).write_text(index_text(replace(index, shards=(replace(first, **change), *rest))))
        with pytest.raises(DataError, match="no index of a pack"):
            find(str(folder))
    (folder / INDEX).write_text(index_text(replace(index, shards=())))
    with pytest.raises(DataError, match=r"no index of a pack \(no shards\)"):
        find(str(folder))
    (folder / INDEX).write_text(index_text(replace(index, held_out_is="\x1b[2J", classes=("a\x1b[31m", "می\u200cخواهم"), left_out=("x\x07",))))
    found = read_index(folder / INDEX)
    assert (found.held_out_is, found.classes, found.left_out) == ("\\x1b[2J", ("a\\x1b[31m", "می\u200cخواهم"), ("x\\x07",))


def test_a_picture_too_long_for_jpeg_becomes_png(tmp_path):
    root = broken_set(tmp_path / "set", lambda c, i: False)
    Image.new("RGB", (80_000, 9), (3, 140, 250)).save(root / "a" / "long.png")
    assert not pack(find(str(root), draw=False), tmp_path / "pack", Packing(short_side=8)).left_out
    packed = find(str(tmp_path / "pack"), draw=False).train
    long = by_name(packed)["set/a/long.png"]
    assert packed.read(long).startswith(b"\x89PNG")
    assert picture(packed, long).shape == (8, 71_111, 3)
    assert (picture(packed, long) == (3, 140, 250)).all()


def test_what_an_encoder_refuses_is_left_out_and_named():
    with pytest.raises(BadImage, match=r"^a\.png: cannot be encoded as JPEG"):
        _jpeg(Image.new("L", (65_501, 1)), 90, "a.png")


def test_a_source_with_other_images_under_the_same_names_is_refused(tmp_path):
    root = broken_set(tmp_path / "set", lambda c, i: False)
    pack(find(str(root)), tmp_path / "pack", SMALL)
    before = contents(tmp_path / "pack")
    (root / "a" / "3.jpg").touch()  # copied: the same images
    pack(find(str(root)), tmp_path / "pack", SMALL)
    (root / "a" / "3.jpg").write_bytes(noise((75, 60), 99))
    with pytest.raises(DataError, match="a pack with other images, by their names, labels or sizes; give another folder"):
        pack(find(str(root)), tmp_path / "pack", SMALL)
    assert contents(tmp_path / "pack") == before


def test_a_class_of_one_image_tells_of_the_option(tmp_path, capsys):
    for c in ("a", "b"):
        (tmp_path / "set" / c).mkdir(parents=True)
        (tmp_path / "set" / c / "1.jpg").write_bytes(noise((30, 30), 1))
    with pytest.raises(SystemExit) as ended:
        cli.main(["pack", str(tmp_path / "set"), str(tmp_path / "pack")])
    assert ended.value.code == 2
    assert "set/a/1.jpg: the only image of its class; at least two are needed, one of them to test on; or, to hold none out, give --no-draw" in (
        capsys.readouterr().err
    )


def test_the_webdataset_library_reads_it(mixed, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pack(find(str(mixed)), tmp_path / "pack", SMALL)
    listing = find(str(tmp_path / "pack"))
    count = len(list((tmp_path / "pack").glob("train-*.tar")))
    pattern = f"{tmp_path}/pack/train-{{000000..{count - 1:06}}}.tar"
    read = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("jpg;png", "cls"))
    assert count > 1
    assert [label for _, label in read] == listing.train.labels.tolist()
    assert all(np.array_equal(pixels, picture(listing.train, i)) for i, (pixels, _) in enumerate(read))


def test_a_pack_on_a_server_is_fetched_by_its_index(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    here = find(str(whole))
    with serving() as server:
        for path in whole.iterdir():
            server.files[f"/some/{path.name}"] = Served(path.read_bytes(), etag=f'"{path.name}"')
        server.files["/some/train-000001.tar"].cuts += [4000]
        monkeypatch.setattr("triscale.download.PAUSES", (0.01,) * 4)
        there = find(server.url("/some/"))
        data = bytearray((whole / "train-000002.tar").read_bytes())
        data[5000] ^= 1
        server.files["/other/index.json"] = server.files["/some/index.json"]
        server.files["/other/index.safetensors"] = server.files["/some/index.safetensors"]
        server.files["/other/train-000002.tar"] = Served(bytes(data))
        with pytest.raises(OSError, match=r"train-000002\.tar: its sha256 begins with"):
            find(server.url("/other/train-000002.tar"))
    assert by_name(there.train) == by_name(here.train)
    assert all(there.train.read(i) == here.train.read(i) for i in range(len(here.train)))
    assert there.classes == here.classes


def broken_set(root, spoil):
    for c in ("a", "b"):
        (root / c).mkdir(parents=True)
        for i in range(6):
            (root / c / f"{i}.jpg").write_bytes(b"no image" if spoil(c, i) else noise((70, 60), i))
    return root


def test_broken_images_are_left_out_listed_and_make_the_status_1(tmp_path, capsys):
    root = broken_set(tmp_path / "set", lambda c, i: c == "a" and i in (1, 4))
    with pytest.raises(SystemExit) as ended:
        cli.main(["pack", str(root), str(tmp_path / "pack"), "--workers", "1", "--shard-size", "8kB", "--verify"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "2 of 12 images could not be read and were left out" in said.err
    assert "every byte is as it was packed" in said.out
    index = read_index(tmp_path / "pack" / INDEX)
    assert sorted(reason.split(":")[0] for reason in index.left_out) == ["set/a/1.jpg", "set/a/4.jpg"]
    assert sum(s.samples for s in index.shards) == 10
    packed = find(str(tmp_path / "pack"))
    assert sorted([*by_name(packed.train), *by_name(packed.held_out)]) == sorted(
        f"set/{c}/{i}.jpg" for c in "ab" for i in range(6) if f"set/{c}/{i}.jpg" not in ("set/a/1.jpg", "set/a/4.jpg")
    )
    shard = tmp_path / "pack" / index.shards[0].file
    data = bytearray(shard.read_bytes())
    data[700] ^= 4
    shard.write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        cli.main(["pack", "not there any more", str(tmp_path / "pack"), "--shard-size", "8kB", "--verify"])
    assert ended.value.code == 1
    assert "are not those that were packed" in capsys.readouterr().err


def test_all_images_broken_is_an_error_that_names_one(tmp_path, capsys):
    root = broken_set(tmp_path / "set", lambda c, i: True)
    with pytest.raises(SystemExit) as ended:
        cli.main(["pack", str(root), str(tmp_path / "pack"), "--workers", "1"])
    assert ended.value.code == 2
    assert "no image of 10 can be read; the first: set/" in capsys.readouterr().err
    assert not list((tmp_path / "pack").glob("*.tar"))


def test_a_folder_that_holds_something_else_is_refused(mixed, whole, tmp_path):
    listing = find(str(mixed))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("x")
    for out, said in ((tmp_path / "other", "is no pack that was begun"), (tmp_path / "file", "is no folder"), (whole, "a pack with .*images")):
        before = contents(out) if out.is_dir() else None
        with pytest.raises(DataError, match=said):
            pack(listing, out, SMALL)
        assert out.is_file() or contents(out) == before
    with pytest.raises(ValueError, match="quality: expected a whole number from 1 to 100, found 101"):
        Packing(quality=101)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_on_request_the_command_exits_3_and_goes_on(number, shared, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for path in sorted((shared / "data" / "cifar10-mini" / "train" / name).iterdir())[:50]:
            shutil.copy(path, tmp_path / "set" / name)
    command = [sys.executable, "-m", "triscale", "pack", str(tmp_path / "set"), str(tmp_path / "pack"), "--workers", "1", "--shard-size", "8kB"]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("pack/train-*.tar")) and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(number)
    said = running.communicate()[1]
    assert running.returncode == 3
    assert "stopped: the same command goes on from the last whole shard" in said
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "pack" / INDEX).exists()
    if number == signal.SIGINT:
        for out in ("pack", "at once"):
            pack(find(str(tmp_path / "set")), tmp_path / out, Packing(shard_size=8000))
        assert contents(tmp_path / "pack") == contents(tmp_path / "at once")


# ---- real weights


def test_a_pack_keeps_the_accuracy_of_real_weights(shared, tmp_path):
    """V2-B0 on 256 ImageNet pictures, packed as the command packs them and read as training reads them: one picture more or less."""
    from triscale.data.normalising import normalise
    from triscale.data.stream import evaluation_stream
    from triscale.weights.open import open_model

    net, card = open_model(shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors")
    folder = shared / "data/imagenet-samples"
    with open(folder / "labels.csv", encoding="utf-8") as file:
        index = {row["wnid"]: int(row["index"]) for row in csv.DictReader(file)}
    pack(find(str(folder), draw=False), tmp_path / "pack", Packing())
    packed = find(str(tmp_path / "pack"), draw=False)
    net, right = net.to(memory_format=torch.channels_last), []
    with torch.inference_mode():
        for images, numbers in evaluation_stream(packed.train, card.preprocess, batch=64, workers=0):
            labels = torch.tensor([index[packed.classes[packed.train.labels[i]]] for i in numbers.tolist()])
            right += net(normalise(images, card.preprocess)).argmax(1).eq(labels).tolist()
    assert len(right) == 256
    assert abs(sum(right) - 236) <= 1  # 236: from the files, tests/test_evaluate.py
