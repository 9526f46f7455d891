"""Data sets from folders, tar shards, Parquet and by name: every image with its own label and name, and what is said of bad ones."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import operator
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_server import Served, serving
from PIL import Image

from triscale import download
from triscale.data import named, sources
from triscale.data.datasets import DataError, find, load, picture
from triscale.data.decode import BadImage
from triscale.data.shards import expand
from triscale.data.sources import Arrays, Texts, hold_out, split_of, take
from triscale.data.tar import END, member, members
from triscale.download import FetchError
from triscale.recipe import Preprocess

CLASSES = ("ant", "bee", "cat")
# Spaces, dots, a line break, right to left, emoji, combining marks, and bytes that are no UTF-8.
SCRIPTS = ("a b.jpg", "x.y.z.jpg", "new\nline.jpg", "שלום.jpg", "猫🐈.jpg", "é-e\u0301.jpg", os.fsdecode(b"\xff\xfe.jpg"))


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TRISCALE_HOME", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSES", (0.01,) * 4)
    return folder


def encoded(value, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (value, value, value)).save(file, kind)
    return file.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def class_folders(root, count, first=0, classes=CLASSES):
    """count images in all; number n in class n % 3 has value n."""
    for n in range(first, first + count):
        put(root / classes[n % len(classes)] / f"{n:03}.png", encoded(n))


def told(samples):
    """The value that each image has, and its label."""
    return [(int(picture(samples, i)[0, 0, 0]), int(samples.labels[i])) for i in range(len(samples))]


def shard(path, numbers, kind="cls", form=tarfile.USTAR_FORMAT, prefix=""):
    """By the tarfile of the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for n in numbers:
            label = {"cls": str(n % 3).encode(), "json": json.dumps({"label": n % 3, "other": "x"}).encode()}[kind]
            for suffix, data in (("png", encoded(n)), (kind, label)):
                info = tarfile.TarInfo(f"{prefix}{n:05}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def table(numbers, labels=None, names=None, column="label"):
    images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers]
    out = pa.table({"image": images, column: pa.array([n % 3 for n in numbers] if labels is None else labels)})
    return out.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}})} if names else None
    )


def make(kind, root):
    """30 training images 0..29 and 6 held out, 30..35, as `kind`; what `find` is given."""
    if kind == "folder":
        class_folders(root / "train", 30)
        class_folders(root / "val", 6, 30)
    elif kind == "shards":
        for i in range(3):
            shard(root / f"train-{i:06}.tar", range(10 * i, 10 * i + 10))
        shard(root / "val-000000.tar", range(30, 36))
        put(root / "classes.txt", "\n".join(CLASSES).encode())
    else:
        root.mkdir(parents=True)
        pq.write_table(table(range(18), names=CLASSES), root / "train-00000-of-00002.parquet", row_group_size=4)
        pq.write_table(table(range(18, 30), names=CLASSES), root / "train-00001-of-00002.parquet")
        pq.write_table(table(range(30, 36), names=CLASSES), root / "validation-00000-of-00001.parquet")
    return str(root)


@pytest.mark.parametrize("kind", ["folder", "shards", "parquet"])
def test_every_image_has_its_own_label_and_name_in_another_process_too(kind, tmp_path):
    listing = find(make(kind, tmp_path / "set"))
    assert (listing.kind, listing.classes) == (kind, CLASSES)
    assert sorted(told(listing.train)) == [(n, n % 3) for n in range(30)]
    assert sorted(told(listing.held_out)) == [(n, n % 3) for n in range(30, 36)]
    for part in (listing.train, listing.held_out):
        assert part.labels.dtype == np.int64
        assert all(str(value) in part.name(i) for i, (value, _) in enumerate(told(part)))
        sent = pickle.loads(pickle.dumps(part))
        assert told(sent) == told(part)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(operator.methodcaller("read", 7), (listing.train,)) == listing.train.read(7)


@pytest.mark.parametrize("kind", ["folder", "shards", "parquet"])
def test_what_is_sent_to_workers_has_no_pixels(kind, tmp_path):
    listing = find(make(kind, tmp_path / "set"))
    told(listing.train)  # opened
    sent = pickle.dumps(listing.train)
    assert b"PNG" not in sent
    assert len(sent) < 3000


def test_memory_holds_the_same_whatever_the_source(tmp_path):
    splits = [load(find(make(kind, tmp_path / kind)), Preprocess(4, 0)) for kind in ("folder", "shards", "parquet")]
    for part in ("train", "held_out"):
        values = [sorted(zip(getattr(s, part).images[:, 0, 0, 0].tolist(), getattr(s, part).labels.tolist(), strict=True)) for s in splits]
        assert values[0] == values[1] == values[2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60).map(lambda labels: [*labels, *range(6), *range(6)]))
def test_what_is_held_out_is_a_fifth_of_each_class_and_the_rest_is_trained_on(labels):
    samples = Arrays(lambda: np.zeros((1, 1, 1, 3)), np.array(labels), "x")
    train, held_out = hold_out(samples, 6)
    again = hold_out(samples, 6)
    names = [[p.name(i) for i in range(len(p))] for p in (train, held_out)]
    assert names == [[p.name(i) for i in range(len(p))] for p in again]
    assert sorted(names[0] + names[1]) == sorted(samples.name(i) for i in range(len(labels)))
    for label in range(6):
        n = labels.count(label)
        assert (held_out.labels == label).sum() == min(n - 1, max(1, round(0.2 * n)))
    for part in (train, held_out):
        assert all(labels[int(part.name(i).split("/")[1])] == part.labels[i] for i in range(len(part)))


def test_a_part_of_a_part_is_a_part(tmp_path):
    train = find(make("folder", tmp_path / "set")).train
    part = take(take(train, np.array([9, 4, 4, 0])), np.array([3, 1]))
    assert [part.name(i) for i in range(2)] == [train.name(0), train.name(4)]
    assert [part.read(i) for i in range(2)] == [train.read(0), train.read(4)]
    assert part.labels.tolist() == train.labels[[0, 4]].tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=5)))
def test_texts_are_kept(texts):
    kept = pickle.loads(pickle.dumps(Texts(texts)))
    assert [kept[i] for i in range(len(kept))] == texts


# Folders


def test_names_in_any_script_are_read_and_named_in_one_line(tmp_path):
    for i, name in enumerate(SCRIPTS):
        for folder in ("größe und π", os.fsdecode(b"\xe9t\xe9")):
            put(Path(os.fsdecode(os.fsencode(tmp_path / "set" / folder / name))), encoded(i, "JPEG"))
    listing = find(str(tmp_path / "set"))
    samples = [s for part in (listing.train, listing.held_out) for s in told(part)]
    assert sorted(value for value, _ in samples) == sorted(2 * list(range(len(SCRIPTS))))
    names = [part.name(i) for part in (listing.train, listing.held_out) for i in range(len(part))]
    assert len(set(names)) == 2 * len(SCRIPTS)
    assert all(name.isprintable() and name.encode() for name in names)
    assert any("猫🐈.jpg" in name for name in names)


@pytest.fixture
def in_memory():
    """A folder that no disk has to write, where there is such a thing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


def test_twenty_thousand_files_are_listed_without_one_being_opened(in_memory):
    for c in range(4):
        (in_memory / f"c{c}").mkdir()
        for i in range(5000):
            os.close(os.open(in_memory / f"c{c}" / f"{i}.jpg", os.O_CREAT))
    listing = find(str(in_memory))
    assert (len(listing.train), len(listing.held_out)) == (16_000, 4000)
    assert np.bincount(listing.train.labels).tolist() == [4000] * 4
    with pytest.raises(BadImage, match="empty file"):
        picture(listing.train, 0)


def test_other_files_are_told_and_hidden_ones_are_not(tmp_path):
    class_folders(tmp_path, 9)
    for name in ("ant/notes.txt", "ant/.hidden.png", "empty/readme.md", ".git/x.png"):
        put(tmp_path / name, b"x")
    listing = find(str(tmp_path))
    assert listing.passed_over == ("ant/notes.txt", "empty/ (no images)", "empty/readme.md")
    assert sorted(value for part in (listing.train, listing.held_out) for value, _ in told(part)) == list(range(9))


def test_a_class_may_be_called_train(tmp_path):
    class_folders(tmp_path, 9, classes=("bus", "car", "train"))
    listing = find(str(tmp_path), draw=False)
    assert listing.classes == ("bus", "car", "train")
    assert sorted(told(listing.train)) == [(n, n % 3) for n in range(9)]
    class_folders(tmp_path / "flat", 9, classes=("train", "val", "test"))  # splits without classes
    with pytest.raises(DataError, match="no images found"):
        find(str(tmp_path / "flat"))


def test_images_in_folders_of_a_class_are_told(tmp_path):
    class_folders(tmp_path, 9)
    put(tmp_path / "ant" / "more" / "x.png", encoded(1))
    assert find(str(tmp_path)).passed_over == ("ant/more (a folder; images in folders of a class's folder are not read)",)


@pytest.mark.parametrize("text", ['{"wids_version": 1, "shardlist": []}', "<html>", "[" * 100_000, "[1]"])
@pytest.mark.parametrize("kind", ["folder", "shards", "parquet"])
def test_an_index_json_of_something_else_is_ignored_and_told_once(kind, text, tmp_path):
    root = make(kind, tmp_path / "set")
    before = find(root)
    put(tmp_path / "set" / "index.json", text.encode())
    listing = find(root)
    assert told(listing.train) == told(before.train)
    assert [note for note in listing.notes if "index.json is ignored" in note] == [f"{root}/index.json is ignored: it is no index of a pack"]


def test_a_folder_of_classes_beside_its_archive_is_a_folder(tmp_path):
    class_folders(tmp_path, 9)
    put(tmp_path / "flowers.tar", b"")
    assert find(str(tmp_path)).kind == "folder"


def test_all_images_broken_and_one_class_empty(tmp_path):
    class_folders(tmp_path, 9)
    for path in (tmp_path / "bee").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no image of class 'bee' can be read; the first: .*bee/.*: not an image"):
        load(find(str(tmp_path)), Preprocess(4, 0))
    with pytest.raises(DataError, match="no images found; expected one folder of images per class"):
        find(str(tmp_path / "ant"))


def test_a_pipe_a_folder_and_a_huge_file_are_no_images(tmp_path):
    class_folders(tmp_path, 6)
    os.mkfifo(tmp_path / "ant" / "a_pipe.jpg")
    (tmp_path / "ant" / "b_folder.jpg").mkdir()
    with open(tmp_path / "ant" / "c_huge.jpg", "wb") as file:
        file.truncate(sources.LARGEST_FILE + 1)
    put(tmp_path / "ant" / "d_lost.jpg", b"x")
    listing = find(str(tmp_path), draw=False)
    (tmp_path / "ant" / "d_lost.jpg").unlink()
    said = {}
    for i in range(len(listing.train)):
        with contextlib.suppress(BadImage):
            picture(listing.train, i)
            continue
        with pytest.raises(BadImage) as caught:
            picture(listing.train, i)
        said[listing.train.name(i).split("/")[-1]] = str(caught.value)
    assert list(said) == ["a_pipe.jpg", "b_folder.jpg", "c_huge.jpg", "d_lost.jpg"]
    assert "found a device, pipe or socket" in said["a_pipe.jpg"]
    assert "found a folder" in said["b_folder.jpg"]
    assert "more than the limit" in said["c_huge.jpg"]
    assert "No such file" in said["d_lost.jpg"]


@contextlib.contextmanager
def nobody():
    """Not root, who may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        root = Path(name)
        root.chmod(0o755)
        class_folders(root, 9)
        closed = next((root / "bee").iterdir())
        closed.chmod(0)
        with nobody():
            splits = load(find(name), Preprocess(4, 0))
        left_out = splits.train.left_out + splits.held_out.left_out
        assert len(left_out) == 1
        assert left_out[0].endswith(f"bee/{closed.name}: cannot be opened (Permission denied)")
        (root / "cat").chmod(0)
        with nobody(), pytest.raises(DataError, match=r"/cat: cannot be opened \(permission denied\)"):
            find(name)
        (root / "cat").chmod(0o755)


# Shards


def test_braces_are_written_out():
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("{a,b}{1..0}") == ["a1", "a0", "b1", "b0"]
    assert expand("plain.tar") == ["plain.tar"]
    for pattern in ("{0..100000}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(DataError, match="more than 100000 shards"):
            expand(pattern)


def test_patterns_name_the_same_shards(tmp_path):
    root = make("shards", tmp_path / "set")
    for pattern in (f"{root}/train-{{000000..000002}}.tar", f"{root}/train-*.tar", f"{root}/train-00000{{0,1,2}}.tar"):
        listing = find(pattern)
        assert sorted(told(listing.train) + told(listing.held_out)) == [(n, n % 3) for n in range(30)]
        assert "fixed draw" in listing.held_out_is
    assert find(f"{root}/{{train,val}}-*.tar").held_out_is == "set/val"
    with pytest.raises(DataError, match=r"train-000003\.tar: cannot be opened"):
        find(f"{root}/train-{{000000..000003}}.tar")
    with pytest.raises(DataError, match="no such file or shard"):
        find(f"{root}/other-*.tar")
    with pytest.raises(DataError, match="compressed"):
        find(f"{root}/train.tar.gz")


def test_the_split_is_found_anywhere_in_a_name():
    for name, split in (
        ("train-000.tar", "train"),
        ("Train_0.tar", "train"),
        ("val00.tar", "val"),
        ("imagenet1k-train-0000.tar", "train"),
        ("imagenet1k-validation-00.tar", "validation"),
        ("my-test-train-0.tar", "train"),
        ("train-val-0.tar", "train"),
        ("contest-trains.tar", ""),
    ):
        assert split_of(name) == split


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_evaluation_files_never_become_training_data(kind, tmp_path):
    def write(name, numbers):
        path = tmp_path / f"{name}.{kind}"
        shard(path, numbers) if kind == "tar" else pq.write_table(table(numbers), path)

    write("in1k-train-0", range(6))
    write("in1k-validation-0", range(6, 9))
    write("extra", range(9, 12))
    write("._in1k-train-0", range(12, 15))
    listing = find(str(tmp_path))
    assert sorted(told(listing.train)) == [(n, n % 3) for n in range(6)]
    assert sorted(told(listing.held_out)) == [(n, n % 3) for n in range(6, 9)]
    assert listing.held_out_is == f"{tmp_path.name}/validation"
    assert listing.passed_over == (f"extra.{kind} (neither train nor validation by its name)",)
    (tmp_path / f"in1k-train-0.{kind}").unlink()
    with pytest.raises(DataError, match=rf"in1k-validation-0\.{kind} is there to evaluate on .* beside extra\.{kind}"):
        find(str(tmp_path))
    (tmp_path / f"extra.{kind}").unlink()
    assert sorted(told(find(str(tmp_path), draw=False).train)) == [(n, n % 3) for n in range(6, 9)]


def test_what_macos_adds_to_archives_is_no_image(tmp_path):
    files = [(f"{pre}{n}.{suffix}", b"x" if pre else data) for n in range(6) for suffix, data in (("png", encoded(n)), ("cls", b"%d" % (n % 3)))
             for pre in ("._", "")]  # fmt: skip
    listing = find(write_members(tmp_path / "x.tar", *files), draw=False)
    assert told(listing.train) == [(n, n % 3) for n in range(6)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_json_labels_in_every_tar_format(form, tmp_path):
    long = "very/long/" * 12 + "ünï/" if form != tarfile.USTAR_FORMAT else "some/" * 20
    shard(tmp_path / "x.tar", range(12), "json", form, prefix=long)
    listing = find(str(tmp_path / "x.tar"))
    assert sorted(told(listing.train) + told(listing.held_out)) == [(n, n % 3) for n in range(12)]
    assert listing.train.name(0).startswith(f"x.tar/{long}")
    assert listing.classes == ("0", "1", "2")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=99), st.binary(max_size=1500)), max_size=8)
)
def test_members_are_found_where_the_standard_library_finds_them_and_written_as_it_reads_them(files):
    ours = b"".join(member(name, data) for name, data in files) + END
    with tarfile.open(fileobj=io.BytesIO(ours)) as tar:
        theirs = [(i.name, i.offset_data, i.size, i.mode, i.mtime, i.uid) for i in tar]
        assert [tar.extractfile(i).read() for i in tar.getmembers()] == [data for _, data in files]
    assert theirs == [(*m, 0o644, 0, 0) for m in members(ours, "x")]


def test_a_shard_cut_anywhere_is_named_with_the_byte(tmp_path):
    shard(tmp_path / "whole.tar", range(4))
    data = (tmp_path / "whole.tar").read_bytes()
    end = len(data.rstrip(b"\0"))  # within the last member's data: what follows is padding and the end mark
    for cut in [1, 511, 512, 700, *range(1024, end, 512), end]:
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        with pytest.raises(DataError, match=rf"cut\.tar: truncated at byte {cut}\b"):
            find(str(tmp_path / "cut.tar"))
    (tmp_path / "cut.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"cut\.tar: empty file"):
        find(str(tmp_path / "cut.tar"))


def test_zeros_where_members_should_be_are_never_taken_for_the_end(tmp_path):
    path = tmp_path / "x.tar"
    shard(path, range(30))
    data = path.read_bytes()
    starts = [m.offset - 512 for m in members(data, "x")]

    def said(changed):
        path.write_bytes(changed)
        with pytest.raises(DataError) as caught:
            find(str(path))
        return str(caught.value)

    at = starts[20]
    assert f"{path}: only zeros from byte {at} to its end at {len(data)}" in said(data[:at].ljust(len(data), b"\0"))
    assert f"{path}: corrupt at byte {at}: zeros, then other data from byte {at + 512}" in said(data[:at] + bytes(512) + data[at + 512 :])
    assert f"{path}: corrupt at byte {at}: zeros, then other data from byte {starts[23]}" in said(
        data[:at] + bytes(starts[23] - at) + data[starts[23] :]
    )
    end = len(data.rstrip(b"\0")) + 511 & ~511
    assert f"only zeros from byte {end}" in said(data[:end] + bytes(3 << 20))
    assert "within the archive's end mark" in said(data[:end] + bytes(512))
    for size in (end + 1024, end + 1024 + (20 << 10), -(-(end + 1024) // (1 << 20)) << 20):  # no padding, 20 KiB, a record of 1 MiB
        path.write_bytes(data[:end].ljust(size, b"\0"))
        assert len(find(str(path), draw=False).train) == 30


def test_a_shard_cut_after_it_was_listed_gives_an_error_and_never_other_bytes(tmp_path):
    root = make("shards", tmp_path / "set")
    train = find(root).train
    path = tmp_path / "set" / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(BadImage, match=r"train-000001\.tar/.*: cannot be opened \(.*bytes, expected"):
        picture(train, 15)
    assert len(picture(train, 2)) == 4


def write_members(path, *files):
    path.write_bytes(b"".join(member(name, data) for name, data in files) + END)
    return str(path)


def test_labels_that_are_missing_wrong_or_huge(tmp_path):
    path, image = tmp_path / "x.tar", encoded(1)
    for files, said in (
        ([("a.png", image)], "a: no label beside the image"),
        ([("a.png", image), ("a.cls", b"dog")], "a: .cls at byte .* has no class number from 0, found b'dog'"),
        ([("a.png", image), ("a.cls", b"-1")], "has no class number from 0"),
        ([("a.png", image), ("a.cls", b"9" * 20)], "has no class number from 0"),
        ([("a.png", image), ("a.cls", b"0" * 2000)], "more than the limit of 32"),
        ([("a.png", image), ("a.json", b'{"label": true}')], "has no class number"),
        ([("a.png", image), ("a.json", b'{"caption": "x"}')], "has no class number"),
        ([("a.png", image), ("a.json", b"[" * 100_000)], "has no class number"),
        ([("a.txt", b"x"), ("a.cls", b"1")], "no images in it"),
        ([("a.png", image), ("a.cls", b"0"), ("b.png", image), ("b.cls", b"0")], "one class only"),
    ):
        with pytest.raises(DataError, match=said):
            find(write_members(path, *files))


def test_archives_that_lie_about_sizes_are_refused(tmp_path):
    good = member("a.png", encoded(1))
    for at, field, said in (
        (124, b"77777777777\0", "truncated at byte"),
        (124, b"\x80" + b"\xff" * 11, "truncated at byte"),
        (124, b"garbage8888\0", "no size"),
        (0, b"changed", "no tar archive"),
    ):
        head = bytearray(good)
        head[at : at + len(field)] = field
        if at:
            head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:512]))
        (tmp_path / "x.tar").write_bytes(bytes(head) + END)
        with pytest.raises(DataError, match=said):
            find(str(tmp_path / "x.tar"))


# Remote shards


@pytest.fixture
def server():
    with serving() as running:
        yield running


def serve_folder(server, folder, at="/set/"):
    for path in Path(folder).iterdir():
        server.files[at + path.name] = Served(path.read_bytes(), etag=f'"{path.name}"')


def test_remote_shards_are_fetched_once_through_stalls_and_drops(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    serve_folder(server, make("shards", tmp_path / "set"))
    server.files["/set/train-000000.tar"].cuts += [3000, 2000]
    server.files["/set/train-000001.tar"].stalls += [5000]
    server.files["/set/train-000002.tar"].statuses += [503]
    seen = []
    url = server.url("/set/train-{000000..000002}.tar")
    listing = find(url, watch=lambda *told: seen.append(told))
    assert sorted(told(listing.train) + told(listing.held_out)) == [(n, n % 3) for n in range(30)]
    total = sum(len(served.data) for path, served in server.files.items() if "train" in path)
    assert ("fetching shards", total, total) in seen
    assert any("Range" in headers for headers in server.gets("/set/train-000001.tar"))  # went on, not anew
    before = len(server.requests)
    assert len(find(url).train) == len(listing.train)
    assert len(server.requests) == before


def test_a_server_that_never_gives_all_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    serve_folder(server, make("shards", tmp_path / "set"))
    server.files["/set/train-000001.tar"].stalls += [3000 + i for i in range(9)]
    with pytest.raises(FetchError, match=r"train-000001\.tar: the connection was cut .*nothing came for 0\.05 s"):
        find(server.url("/set/train-{000000..000001}.tar"))
    with pytest.raises(FetchError, match=r"train-000009\.tar: HTTP 404"):
        find(server.url("/set/train-{000000,000009}.tar"))
    for address, said in (("/set", "expected shards, e.g."), ("/set/x.tar?token=1", "without a query")):
        with pytest.raises(DataError, match=said):
            find(server.url(address))


def test_a_page_in_place_of_a_shard_or_an_index_is_not_kept(server, tmp_path, home):
    serve_folder(server, make("shards", tmp_path / "set"))
    page, good = Served(b"<html>rate limited</html>" * 40), server.files["/set/train-000000.tar"]
    server.files |= {"/set/index.json": page, "/set/train-000000.tar": page}
    url = server.url("/set/train-00000{0..2}.tar")
    with pytest.raises(DataError, match=r"http://.*/set/train-000000\.tar: no tar archive, but 1000 bytes that begin b'<html>rate"):
        find(url)
    server.files["/set/train-000000.tar"] = good
    listing = find(url, draw=False)
    assert sorted(told(listing.train)) == [(n, n % 3) for n in range(30)]
    assert ["/set/index.json is ignored" in note for note in listing.notes] == [True]
    assert sorted(p.suffix for p in home.rglob("*") if p.is_file() and p.stat().st_size) == [".tar"] * 3
    with pytest.raises(DataError, match=r"/set/index\.json: no index of a pack; give its shards"):
        find(server.url("/set/"))


# Parquet


def test_parquet_is_copied_once_and_told(tmp_path, home):
    root = make("parquet", tmp_path / "set")
    first = find(root)
    assert len(first.notes) == 2
    path = Path(first.train.path)
    assert path.is_relative_to(home)
    assert str(path) in first.notes[0]
    made = path.stat().st_mtime_ns
    assert told(find(root).train) == told(first.train)
    assert path.stat().st_mtime_ns == made
    pq.write_table(table(range(0, 60, 2), names=CLASSES), tmp_path / "set" / "train-00000-of-00002.parquet")
    assert len(find(root).train) == 42


def test_class_names_of_parquet_come_from_its_schema_then_classes_txt_then_numbers(tmp_path):
    path = tmp_path / "set.parquet"
    pq.write_table(table(range(12), names=CLASSES), path)
    assert find(str(path)).classes == CLASSES
    pq.write_table(table(range(12)), path)
    assert find(str(path)).classes == ("0", "1", "2")
    put(tmp_path / "classes.txt", b"x y\nz\nw")
    listing = find(str(path))
    assert listing.classes == ("x y", "z", "w")
    assert sorted(told(listing.train) + told(listing.held_out)) == [(n, n % 3) for n in range(12)]
    put(tmp_path / "classes.txt", b"x\nz")
    with pytest.raises(DataError, match=r"classes\.txt has 2 class names, but there is a label 2"):
        find(str(path))


def test_parquet_that_is_not_what_it_should_be_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    for made, said in (
        (table(range(6), column="caption"), r"x\.parquet: no column 'label', so no labels.*found image, caption"),
        (table(range(6), labels=[0, 1, None, 1, 0, 2]), "1 rows have no label"),
        (table(range(6), labels=[-1] * 6), "labels from -1 to -1"),
        (table(range(6), labels=list("abcdef")), "holds string, expected class numbers"),
        (pa.table({"label": [0, 1]}), "no column 'image', so no images"),
        (pa.table({"image": ["a.jpg", "b.jpg"], "label": [0, 1]}), "holds string, expected a struct of bytes and path"),
        (table([]), r"no column|no rows|holds null"),
    ):
        pq.write_table(made, path)
        with pytest.raises(DataError, match=said):
            find(str(path))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"x\.parquet: no Parquet file that can be read"):
        find(str(path))


def test_parquet_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path):
    path, count = tmp_path / "x.parquet", 200_000
    images = pa.StructArray.from_arrays([pa.nulls(count, pa.binary()), pa.nulls(count, pa.string())], ["bytes", "path"])
    pq.write_table(pa.table({"image": images, "label": np.arange(count) % 2}), path)
    with pytest.raises(DataError, match=r"x\.parquet: 200000 rows in \d+ bytes; expected a file of images"):
        find(str(path))
    pq.write_table(pa.table({"image": [{"bytes": bytes(3_000_000), "path": "x"}] * 2, "label": [0, 1]}), path, compression="zstd")
    with pytest.raises(DataError, match=r"x\.parquet: a row group unpacks to \d+ bytes, more than 100 times"):
        find(str(path))
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "y" * 500_000}] * 9, "label": [0, 1, 1] * 3}), path, compression="zstd")
    with pytest.raises(DataError, match=r"x\.parquet: the names of its images take more than 100 times"):
        find(str(path))


def test_rows_without_bytes_are_broken_images_and_binary_columns_will_do(tmp_path):
    path = tmp_path / "x.parquet"
    images = [{"bytes": None if n == 3 else encoded(n), "path": None} for n in range(9)]
    pq.write_table(pa.table({"image": images, "label": [n % 3 for n in range(9)]}), path)
    train = find(str(path), draw=False).train
    with pytest.raises(BadImage, match=r"x\.parquet:3: empty file"):
        picture(train, 3)
    assert int(picture(train, 4)[0, 0, 0]) == 4
    pq.write_table(pa.table({"img": [encoded(n) for n in range(9)], "fine_label": [n % 3 for n in range(9)]}), path)
    assert told(find(str(path), draw=False).train) == [(n, n % 3) for n in range(9)]


# Names


def lay_out(name, root):
    """A small data set as torchvision expects it: 6 images to train on (4 + 2 where there is a validation part), 3 to test on."""
    from scipy.io import savemat

    numbers = {"train": [0, 1, 2, 3], "val": [4, 5], "trainval": range(6), "test": [6, 7, 8]}
    if name == "flowers102":
        for n in range(9):
            put(root / "flowers-102" / "jpg" / f"image_{n + 1:05}.jpg", encoded(n))
        savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.array([n % 3 + 1 for n in range(9)])})
        ids = {key: np.array(numbers[part]) + 1 for key, part in (("trnid", "train"), ("valid", "val"), ("tstid", "test"))}
        savemat(root / "flowers-102" / "setid.mat", ids)
    elif name == "fgvc-aircraft":
        data = root / "fgvc-aircraft-2013b" / "data"
        put(data / "variants.txt", "\n".join(CLASSES).encode())
        for split in ("train", "val", "trainval", "test"):
            put(data / f"images_variant_{split}.txt", "\n".join(f"{n:07} {CLASSES[n % 3]}" for n in numbers[split]).encode())
        for n in range(9):
            put(data / "images" / f"{n:07}.jpg", encoded(n))
    elif name == "oxford-iiit-pet":
        for split in ("trainval", "test"):
            lines = "".join(f"{CLASSES[n % 3]}_{n} {n % 3 + 1} 1 1\n" for n in numbers[split])
            put(root / name / "annotations" / f"{split}.txt", lines.encode())
        for n in range(9):
            put(root / name / "images" / f"{CLASSES[n % 3]}_{n}.jpg", encoded(n))
    elif name == "food101":
        for split, of in (("train", "trainval"), ("test", "test")):
            by_class = {c: [f"{c}/{n}" for n in numbers[of] if n % 3 == i] for i, c in enumerate(CLASSES)}
            put(root / "food-101" / "meta" / f"{split}.json", json.dumps(by_class).encode())
        for n in range(9):
            put(root / "food-101" / "images" / CLASSES[n % 3] / f"{n}.jpg", encoded(n))
    elif name == "stanford-cars":
        folder = root / "stanford_cars"
        (folder / "devkit").mkdir(parents=True)
        kind = [("fname", object), ("class", np.uint8)]
        for where, split, of in (("devkit/cars_train_annos", "train", "trainval"), ("cars_test_annos_withlabels", "test", "test")):
            savemat(folder / f"{where}.mat", {"annotations": np.array([(f"{n}.jpg", n % 3 + 1) for n in numbers[of]], kind)})
            for n in numbers[of]:
                put(folder / f"cars_{split}" / f"{n}.jpg", encoded(n))
        savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(CLASSES, object)})


@pytest.mark.parametrize("name", ["flowers102", "fgvc-aircraft", "oxford-iiit-pet", "food101", "stanford-cars"])
def test_named_sets_as_torchvision_lays_them_out(name, tmp_path, monkeypatch):
    lay_out(name, tmp_path)
    if name == "flowers102":  # its class checks the sums of the published files
        from torchvision.datasets import Flowers102

        sums = {
            k: (f, hashlib.md5((tmp_path / "flowers-102" / f).read_bytes()).hexdigest())
            for k, (f, _) in Flowers102._file_dict.items()
            if k != "image"
        }
        monkeypatch.setattr(Flowers102, "_file_dict", Flowers102._file_dict | sums)
    if name != "flowers102":
        monkeypatch.setitem(named.COUNTS, name, 3)
    listing = find(name, str(tmp_path))
    assert sorted(told(listing.train)) == [(n, n % 3) for n in range(6)]
    assert sorted(told(listing.held_out)) == [(n, n % 3) for n in (6, 7, 8)]
    assert listing.held_out_is.endswith("test set")
    assert len(listing.classes) == 102 or [c.lower() for c in listing.classes] == list(CLASSES)
    assert told(pickle.loads(pickle.dumps(listing.train))) == told(listing.train)


def test_cifar_pickles_are_copied_to_where_all_processes_can_map_them(tmp_path, monkeypatch, home):
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    files = {}
    for part, numbers in (("train", range(6)), ("test", range(6, 9))):
        data = np.array([np.full(3072, n, np.uint8) for n in numbers])
        files[part] = pickle.dumps({"data": data, "fine_labels": [n % 3 for n in numbers]})
    files["meta"] = pickle.dumps({"fine_label_names": list(CLASSES)})
    for part, data in files.items():
        put(folder / part, data)
    sums = {part: hashlib.md5(data).hexdigest() for part, data in files.items()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})
    monkeypatch.setitem(named.COUNTS, "cifar100", 3)
    listing = find("cifar100", str(tmp_path))
    assert told(listing.train) == [(n, n % 3) for n in range(6)]
    assert told(listing.held_out) == [(n, n % 3) for n in range(6, 9)]
    assert listing.classes == CLASSES
    assert str(home) in listing.notes[0]
    assert told(pickle.loads(pickle.dumps(listing.held_out))) == told(listing.held_out)
    put(folder / "train", files["train"] + b" ")
    with pytest.raises(DataError, match=r"cifar100: .*corrupted"):
        find("cifar100", str(tmp_path))


def test_class_folders_of_a_named_set_train_on_its_validation_part_too(tmp_path, monkeypatch):
    monkeypatch.setitem(named.COUNTS, "birdsnap", 3)
    for part, first in (("train", 0), ("val", 3), ("test", 6)):
        class_folders(tmp_path / "birdsnap" / part, 3, first)
    listing = find("birdsnap", str(tmp_path))
    assert sorted(told(listing.train)) == [(n, n % 3) for n in range(6)]
    assert sorted(told(listing.held_out)) == [(n, n % 3) for n in (6, 7, 8)]
    assert listing.held_out_is == "Birdsnap's test set"
    assert told(pickle.loads(pickle.dumps(listing.train))) == told(listing.train)


def test_parquet_of_a_named_set_trains_on_its_validation_part_too(tmp_path, monkeypatch):
    monkeypatch.setitem(named.COUNTS, "flowers102", 3)
    folder = tmp_path / "flowers102" / "data"
    folder.mkdir(parents=True)
    for part, numbers in (("train", range(3)), ("validation", range(3, 6)), ("test", range(6, 9))):
        pq.write_table(table(numbers, names=CLASSES), folder / f"{part}-00000-of-00001.parquet")
    listing = find("flowers102", str(tmp_path))
    assert told(listing.train) == [(n, n % 3) for n in range(6)]
    assert told(listing.held_out) == [(n, n % 3) for n in (6, 7, 8)]


def test_imagenet_has_its_names_in_the_order_of_every_checkpoint(tmp_path):
    from triscale.imagenet import imagenet_classes

    for part, classes in (("train", imagenet_classes()), ("val", imagenet_classes()[:3])):
        for c in classes:
            (tmp_path / part / c.wnid).mkdir(parents=True)
            (tmp_path / part / c.wnid / "1.JPEG").touch()
    listing = find("imagenet", str(tmp_path))
    assert listing.classes == tuple(c.name for c in imagenet_classes())
    assert listing.train.name(207) == f"train/{imagenet_classes()[207].wnid}/1.JPEG"
    assert listing.train.labels.tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("birdsnap", "birdsnap/train"),
        ("flowers102", "flowers-102"),
        ("cifar100", "cifar-100-python"),
        ("imagenet", "n01440764"),
        ("stanford-cars", "devkit"),
    ],
)
def test_a_named_set_that_is_not_there_tells_the_layout(name, layout, tmp_path):
    with pytest.raises(DataError, match=rf"^{name}: not found in .*{layout}.*--data-dir"):
        find(name, str(tmp_path))


def test_a_set_with_another_number_of_classes_is_not_taken_for_the_named_one(tmp_path):
    for part, numbers in (("train", range(6)), ("test", range(6, 9))):
        pq.write_table(table(numbers, names=CLASSES), tmp_path / f"{part}-00000.parquet")
    class_folders(tmp_path / "train", 6)
    for name, count in (("cifar10", 10), ("cifar100", 100), ("imagenet", 1000)):
        with pytest.raises(DataError, match=rf"^{name}: expected {count} classes, found 3 \(ant, bee, cat and so on\)"):
            find(name, str(tmp_path))


def test_names_are_suggested():
    with pytest.raises(DataError, match="nearest is 'food101'"):
        find("food-101x")
