"""The streaming loader when things go wrong: broken images, killed workers, a killed parent, reads that never end."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numbered
import numpy as np
import pytest
import torch
from conftest import ROOT

from triscale.data import stream as stream_module
from triscale.data import workers as pool_module
from triscale.data.sources import DataError, Folder
from triscale.data.stream import StreamedBatches, evaluation_stream
from triscale.data.workers import WorkerError
from triscale.recipe import Preprocess, Recipe

SMALL = Preprocess(16, 0)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to find processes by"),
]


class AsTheyAre:
    def __call__(self, images, labels, generator, part, whole):
        return images, labels


def stream(samples, *, batch=8, workers=0, **options):
    batches = StreamedBatches(samples, SMALL, Recipe(batch_size=batch), finish=AsTheyAre(), workers=workers, **options)
    return contextlib.closing(batches)


def told(batches):
    """Of each batch the numbers that its pictures and its labels tell of; they have to be those it says."""
    out = []
    for images, labels, numbers in batches:
        assert torch.equal(numbered.numbers_in(images), numbers)
        assert torch.equal(labels, numbers % numbered.CLASSES)
        out.append(numbers.tolist())
    return out


def whole(count, batch=8, epoch=0):
    with stream(numbered.Pixels(count), batch=batch) as batches:
        return told(batches.epoch(epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_left_out_of_their_batch_and_listed_once(workers):
    flaws = {3: "truncated", 11: "vanished", 12: "empty", 30: "forbidden"}
    with stream(numbered.Flawed(40, flaws), workers=workers, broken_share=0.1) as batches:
        for epoch in range(2):
            assert told(batches.epoch(epoch)) == [[n for n in batch if n not in flaws] for batch in whole(40, epoch=epoch)]
        assert sorted(batches.left_out) == [
            "picture 11: cannot be read (No such file or directory)",
            "picture 12: empty file",
            "picture 30: cannot be read (Permission denied)",
            "picture 3: truncated, the JPEG data ends early",
        ]
        assert batches.notes == []


def test_others_are_finished_as_if_none_were_broken():
    """Random numbers stay with their images, and a neighbour stands in where images are mixed."""

    class Mixing:
        def __call__(self, images, labels, generator, part, whole):
            draws = torch.randint(0, 100, (whole,), generator=generator)[part]
            return images.float() + draws.view(-1, 1, 1, 1), labels * 1000 + labels.roll(1)

    def run(flaws):
        samples = numbered.Flawed(16, flaws)
        with contextlib.closing(StreamedBatches(samples, SMALL, Recipe(batch_size=8), finish=Mixing(), workers=0, broken_share=0.5)) as batches:
            return {int(n): (x, int(y)) for images, labels, numbers in batches.epoch(0) for x, y, n in zip(images, labels, numbers, strict=True)}

    sound, flawed = run({}), run({5: "empty", 9: "empty"})
    assert flawed.keys() == sound.keys() - {5, 9}
    assert all(torch.equal(flawed[n][0], sound[n][0]) for n in flawed)
    assert all(mixed // 1000 == n % numbered.CLASSES for n, (_, mixed) in flawed.items())
    assert sum(flawed[n][1] != sound[n][1] for n in flawed) <= 2


@pytest.mark.parametrize(("broken", "fails"), [(4, False), (5, True)])
def test_more_than_the_stated_share_is_an_error(broken, fails):
    samples = numbered.Flawed(40, dict.fromkeys(range(broken), "empty"))
    with stream(samples, workers=1, broken_share=0.1) as batches:
        if not fails:
            assert sum(map(len, told(batches.epoch(0)))) == 36
            return
        with pytest.raises(DataError, match=r"^5 of 40 images can't be read, more than 10 %; the first: picture \d: empty file$"):
            told(batches.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_all_images_broken_is_an_error_at_once(workers):
    flaws = dict.fromkeys(range(1000), "vanished")
    with stream(numbered.Flawed(1000, flaws), workers=workers, broken_share=1.0, batch=20) as batches:
        with pytest.raises(DataError, match=r"^none of 20 images can be read; the first: picture \d+: cannot be read \(No such file"):
            next(batches.epoch(0))
        assert len(batches.left_out) == 20
    with pytest.raises(DataError, match="none of 1000 images can be read"):
        next(evaluation_stream(numbered.Flawed(1000, flaws), SMALL, batch=20, workers=workers))
    with stream(numbered.Flawed(3, flaws), workers=workers, broken_share=1.0, batch=1) as batches, pytest.raises(DataError, match="none of 3"):
        next(batches.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_part_of_broken_images_has_a_stand_in(workers):
    """So that every process has a batch for every step. The next part stands in, with a neighbour in its broken image's place: all parts alike."""
    plain = whole(24, batch=6)
    first, second = plain[1][:3], plain[1][3:]  # the parts of two processes
    flaws = dict.fromkeys([*first, second[0]], "vanished")
    parts = []
    for rank in range(2):
        with stream(numbered.Flawed(24, flaws), batch=6, workers=workers, broken_share=0.5, share=(rank, 2)) as batches:
            parts.append(told(batches.epoch(0)))
            assert batches.notes == ["nothing of a batch's part could be read (3 images); others of the epoch stood in for it"][rank:]
    filled = [second[1], *second[1:]]
    assert parts[1] == [plain[0][3:], filled, plain[2][3:], plain[3][3:]]
    assert parts[0] == [plain[0][:3], filled, plain[2][:3], plain[3][:3]]


def test_evaluation_leaves_broken_ones_out_and_goes_on():
    flaws = dict.fromkeys(range(4, 12), "vanished")
    batches = evaluation_stream(numbered.Flawed(20, flaws), SMALL, batch=4, workers=1)
    seen = [(numbered.numbers_in(images).tolist(), numbers.tolist()) for images, numbers in batches]
    assert seen == [(list(range(n, n + 4)),) * 2 for n in (0, 12, 16)]
    assert batches.left_out == [f"picture {n}: cannot be read (No such file or directory)" for n in range(4, 12)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_permissions(tmp_path):
    numbered.folder(tmp_path / "data", 0, 6)
    paths = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "data" / "train").rglob("*.png"))
    (tmp_path / paths[2]).chmod(0)
    with stream(Folder(tmp_path, paths, [0, 0, 1, 1, 2, 2]), batch=6, broken_share=0.2) as batches:
        assert len(next(batches.epoch(0))[1]) == 5
        assert batches.left_out == [f"{paths[2]}: cannot be read (Permission denied)"]


def test_a_worker_killed_in_mid_epoch_changes_nothing(tmp_path):
    samples = numbered.Flawed(64, {7: "killed once", 40: "killed once"}, tmp_path)
    with stream(samples, workers=2) as batches:
        assert told(batches.epoch(0)) == whole(64)
        assert 1 <= len(batches.notes) <= 2  # two may die at once
        assert batches.notes[0] == "a worker process of the loader died (SIGKILL) and was started again; what it had in hand is done again"
        assert batches.left_out == []
        assert told(batches.epoch(1)) == whole(64, epoch=1)


def children():
    return set(Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split())


def test_a_worker_killed_from_outside_changes_nothing():
    before = children()
    with stream(numbered.Pixels(64), workers=2) as batches:
        epoch = batches.epoch(0)
        seen = [next(epoch)]
        workers = children() - before
        assert len(workers) == 2
        os.kill(int(workers.pop()), signal.SIGKILL)
        assert told([*seen, *epoch]) == whole(64)
        next(batches.epoch(1))
        assert len(batches.notes) == 1


def test_an_image_that_kills_workers_counts_as_broken():
    with stream(numbered.Flawed(40, {9: "kills"}), workers=1, broken_share=0.1) as batches:
        assert told(batches.epoch(0)) == [[n for n in batch if n != 9] for batch in whole(40)]
        assert batches.left_out == ["picture 9: a worker process died over it 2 times (SIGSEGV)"]
        assert len(batches.notes) == 2


def test_workers_that_keep_dying_are_an_error():
    with stream(numbered.Flawed(40, dict.fromkeys(range(40), "is killed")), workers=1, broken_share=0.5) as batches:
        with pytest.raises(WorkerError, match=r"died 6 times \(SIGKILL; the last over picture \d+\): out of memory\? Fewer --workers need less"):
            told(batches.epoch(0))
        assert len(batches.notes) == pool_module.DEATHS
        with pytest.raises(WorkerError):  # not a hang
            told(batches.epoch(0))


def test_images_that_crash_workers_cost_their_deaths_once():
    """Three of them, two deaths each: more than a lack of memory may cost. The next epoch knows them."""
    flaws = {5: "kills", 20: "kills", 33: "kills"}
    with stream(numbered.Flawed(40, flaws), workers=1, broken_share=0.1) as batches:
        for epoch in range(2):
            assert told(batches.epoch(epoch)) == [[n for n in batch if n not in flaws] for batch in whole(40, epoch=epoch)]
            assert len(batches.notes) == 6 > pool_module.DEATHS
        assert sorted(batches.left_out) == [f"picture {n}: a worker process died over it 2 times (SIGSEGV)" for n in (20, 33, 5)]


def test_crashes_without_end_are_an_error(monkeypatch):
    monkeypatch.setattr(pool_module, "CRASHES", 2)
    samples, said = numbered.Flawed(40, dict.fromkeys(range(40), "kills")), r"died 3 times \(SIGSEGV; the last over picture \d+\)"
    with stream(samples, workers=1, broken_share=0.5) as batches, pytest.raises(WorkerError, match=said):
        told(batches.epoch(0))


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_an_abandoned_stream_ends_its_workers_at_once(kind):
    """Not when the garbage collector next runs."""
    gc.collect()
    before = children()
    gc.disable()
    try:
        if kind == "training":
            batches = StreamedBatches(numbered.Pixels(40), SMALL, Recipe(batch_size=4), finish=AsTheyAre(), workers=1)
            run = batches.epoch(0)
        else:
            run = batches = evaluation_stream(numbered.Pixels(40), SMALL, batch=4, workers=1)
        next(run)
        (child,) = children() - before
        assert alive(child)
        del batches, run
        assert not alive(child)
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_no_broken_image(workers):
    flawed = numbered.Flawed(8, {2: "a bug"})
    with stream(flawed, workers=workers, broken_share=1.0) as batches, pytest.raises(WorkerError, match=r"^picture 2: TypeError: no such thing$"):
        next(batches.epoch(0))


def test_samples_that_cannot_go_to_a_worker():
    class Local(numbered.Pixels):
        pass

    with stream(Local(8), workers=1) as batches, pytest.raises(ValueError, match=r"Local: can't be sent to worker processes .*--workers 0 goes"):
        next(batches.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_that_does_not_end_is_told(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(pool_module, "STALL", 0.2)
    with stream(numbered.Flawed(8, {5: "stalls"}, tmp_path), workers=workers) as batches:
        heard = []
        batches.tell = lambda text: (heard.append(text), (tmp_path / "go on").touch())
        assert told(batches.epoch(0)) == whole(8)
        assert len(heard) == 1
        assert heard[0].startswith("picture 5: being read for ")
        assert heard == batches.notes


def test_interrupted_at_any_place_it_goes_on(tmp_path, monkeypatch):
    """Here while a worker is in a read that never ends; the next epoch has new workers."""
    monkeypatch.setattr(pool_module, "STALL", 0.2)

    def interrupt(text):
        raise KeyboardInterrupt

    with stream(numbered.Flawed(16, {5: "stalls"}, tmp_path), workers=2) as batches:
        batches.tell = interrupt
        with pytest.raises(KeyboardInterrupt):
            told(batches.epoch(0))
        (tmp_path / "go on").touch()
        assert told(batches.epoch(0)) == whole(16)


PARENT = """
    import sys, time
    import numbered
    from test_stream_faults import stream, told, whole
    if __name__ == "__main__":
        with stream(numbered.Flawed(400, {stalling}, sys.argv[1]), workers=2) as batches:
            epoch = batches.epoch(0)
            seen = [next(epoch)]
            try:
                print("running", flush=True)
                while True:
                    time.sleep(0.05) if {waits} else seen.append(next(epoch))
            except KeyboardInterrupt:
                assert told([*seen, *epoch]) == whole(400)
                assert batches.notes == []
                print("the same", flush=True)
"""


@contextlib.contextmanager
def running(tmp_path, **values):
    """A process with two workers, in a process group of its own; with its pid and theirs."""
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT).format(**values))
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}, process_group=0
    )
    try:
        assert parent.stdout.readline() == "running\n"
        yield parent, [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_workers_end_with_their_parent_and_leave_nothing(tmp_path):
    """Killed while one worker is in a read that never ends and the other waits for work."""
    shm = set(os.listdir("/dev/shm"))
    with stream(numbered.Pixels(400)) as batches:
        stalls = next(batches.epoch(0, 2))[2][0].item()
    with running(tmp_path, stalling={stalls: "stalls"}, waits=True) as (parent, children):
        deadline = time.monotonic() + 20
        while not (tmp_path / f"stalls-{stalls}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(children) == 2
        assert all(map(alive, children))
        parent.kill()
        while any(map(alive, children)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, children))
    assert set(os.listdir("/dev/shm")) <= shm


def test_ctrl_c_is_for_the_parent_alone(tmp_path):
    with running(tmp_path, stalling={}, waits=True) as (parent, children):
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stdout.readline() == "the same\n"
        assert parent.wait(20) == 0
        assert not any(map(alive, children))


def test_nothing_readable_is_told_after_a_few_even_in_small_batches():
    """Not after the whole set: the search for what stands in for a part counts too."""
    flawed = numbered.Flawed(600, dict.fromkeys(range(600), "vanished"))
    with stream(flawed, batch=8, broken_share=0.5) as batches, pytest.raises(DataError, match=r"none of (\d+) images can be read") as error:
        list(batches.epoch(0))
    assert 20 <= int(re.search(r"none of (\d+)", str(error.value))[1]) <= 32


def test_the_search_for_what_stands_in_has_an_end(monkeypatch):
    """Where the disk goes in mid-epoch: not only after all that is left of it was asked for."""
    monkeypatch.setattr(stream_module, "SEARCH", 40)
    first = whole(400)[0]
    flawed = numbered.Flawed(400, {n: "vanished" for n in range(400) if n not in first})
    with (
        stream(flawed, batch=8, broken_share=1.0) as batches,
        pytest.raises(DataError, match=r"^none of 48 images in a row can be read; the first: "),
    ):
        list(batches.epoch(0))
    assert len(batches.left_out) == 48


def test_evaluation_passes_over_a_long_row_of_broken_ones_at_its_start():
    batches = evaluation_stream(numbered.Flawed(60, dict.fromkeys(range(25), "vanished")), SMALL, batch=8, workers=0)
    assert sum(len(numbers) for _, numbers in batches) == 35
    with pytest.raises(DataError, match="none of 30 images"):
        list(evaluation_stream(numbered.Flawed(30, dict.fromkeys(range(30), "vanished")), SMALL, batch=8, workers=0))


def test_a_worker_takes_no_module_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("open('taken', 'w')")
    monkeypatch.chdir(tmp_path)
    with stream(numbered.Flawed(12, {}), batch=6, workers=1) as batches:
        assert len(list(batches.epoch(0))) == 2
    assert not (tmp_path / "taken").exists()


def test_workers_that_die_before_they_have_read_their_order_are_one_clear_error(tmp_path, monkeypatch):
    """An order longer than a socket holds, and an interpreter that ends at once: the system resets the connection."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 7\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    many = Folder(tmp_path, [f"{i}.png" for i in range(3000)], np.arange(3000) % 3)
    with stream(many, batch=6, workers=1) as batches, pytest.warns(RuntimeWarning), pytest.raises(WorkerError, match="died 6 times"):
        next(batches.epoch(0))
