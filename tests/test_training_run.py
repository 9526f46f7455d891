"""Whole runs with their folder: the same curve with workers, killed at any point, on two processes; and what goes wrong."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

import triscale as ts
from triscale.classify import Evaluated, Resumed, ResumeError, Running, Stopped, preprocess_for, run_folder
from triscale.classify.pictures import Feeding, Streamed, prepare
from triscale.classify.run import _judged, _part
from triscale.data.datasets import ImageData, Splits, find, part_of
from triscale.data.sources import DataError
from triscale.recipe import Recipe
from triscale.recipes import PAPER
from triscale.train.checkpoint import CheckpointWarning
from triscale.train.loop import Step
from triscale.weights.model_file import load_model

GOLDEN = Path(__file__).parent / "data" / "loss_curve.json"
NET = ts.Arch(
    ts.Stem(8),
    (ts.Stage("mbconv", 3, 1, 1, 0.25, "identity", 8, 1), ts.Stage("mbconv", 5, 2, 4, 0.25, "identity", 16, 3)),
    ts.Head(32),
    24,
    0.0,
    ts.Numerics(drop_path=0.3),
    name="small",
)
# 20 steps of all that the paper's recipe has, and the augmentation that there is.
RECIPE = replace(
    PAPER,
    epochs=5,
    batch_size=24,
    lr=0.3,
    warmup_epochs=1.0,
    decay_epochs=0.5,
    augment="none",
    crop_area=0.0,
    shift=0.1,
    erase=0.2,
    minival=0.1,
    ema=0.99,
    clip=5.0,
)


def splits(classes=4, images=112):
    """Colours with noise, by integer arithmetic, so that they are the same on every machine."""
    g = torch.Generator().manual_seed(0)

    def part(count, name):
        labels = torch.arange(count) % classes
        pixels = torch.randint(0, 120, (count, 3, 24, 24), dtype=torch.uint8, generator=g)
        pixels += (labels.view(-1, 1, 1, 1) * torch.tensor([30, 20, 10]).view(1, 3, 1, 1)).to(torch.uint8)
        return ImageData(pixels, labels, tuple(f"{name}/{i:03d}.png" for i in range(count)))

    return Splits(part(images, "train"), part(40, "val"), tuple(f"class {i}" for i in range(classes)), "val")


def run(out, recipe=RECIPE, data=None, **running):
    torch.set_num_threads(1)
    return list(run_folder(Path(out), data or splits(), NET, preprocess_for(24, 3), recipe, "made", Running(**running)))


def losses(events):
    return [e.loss for e in events if isinstance(e, Step)]


def weights(out):
    return load_file(Path(out) / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (its folder, its events)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(out)


def test_the_loss_curve_is_the_golden_one(whole):
    got = losses(whole[1])
    assert len(got) == 20
    assert got == pytest.approx(json.loads(GOLDEN.read_text())["losses"], rel=1e-5)
    assert got[-1] < 0.9 * got[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_bit(whole, tmp_path, workers):
    assert losses(run(tmp_path / "run", workers=workers)) == losses(whole[1])
    assert same_weights(tmp_path / "run", whole[0])


def work(out):
    """A child process: goes on with the run, and writes down what it sees."""
    with open(f"{out}.log", "a") as log:
        for event in run_folder(Path(out), splits(), NET, preprocess_for(24, 3), RECIPE, "made", Running(save_every=1, resume=True, workers=1)):
            if isinstance(event, Step):
                log.write(json.dumps([event.step, event.loss]) + "\n")
                log.flush()


def test_killed_at_random_points_it_ends_as_if_it_had_not_been(whole, tmp_path):
    """Ten SIGKILLs; what each life saw of a step is bit for bit what the uninterrupted run saw."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triscale.classify", "torch._dynamo", "torch.distributed"])  # else each life begins with imports
    out, seen, rng = tmp_path / "run", Path(f"{tmp_path / 'run'}.log"), random.Random(0)
    killed = 0
    for _ in range(40):
        child = context.Process(target=work, args=(str(out),))
        child.start()
        before = len(seen.read_text().splitlines()) if seen.exists() else 0
        wanted = before + rng.randint(1, 3)
        if killed < 10:
            while child.is_alive() and (len(seen.read_text().splitlines()) if seen.exists() else 0) < wanted:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.02)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                killed += 1
        child.join(60)
        if child.exitcode == 0:
            break
    else:
        pytest.fail("40 lives were not enough")
    assert killed >= 5
    rows = [json.loads(line) for line in seen.read_text().splitlines() if line.endswith("]")]
    want = dict(enumerate(losses(whole[1]), 1))
    assert {step for step, _ in rows} == set(want)
    assert all(loss == want[step] for step, loss in rows)
    assert same_weights(out, whole[0])


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_stopping_saves_the_step_and_going_on_gives_the_same(whole, tmp_path, stop_at):
    steps = iter(range(1, 99))
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "run", stop=lambda: next(steps) == stop_at)
    assert stopped.value.step == stop_at
    events = run(tmp_path / "run", resume=True)
    assert events[0] == Resumed(stop_at, (stop_at - 1) // 4 + 1)
    assert losses(events) == losses(whole[1])[stop_at:]
    assert same_weights(tmp_path / "run", whole[0])


def test_a_finished_run_resumed_does_nothing_and_says_how_good_it_is(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    events = run(tmp_path / "run", resume=True)
    assert not losses(events)
    assert [e.top1 for e in events if isinstance(e, Evaluated)] == [whole[1][-1].top1]
    assert same_weights(tmp_path / "run", whole[0])


def test_the_minival_chooses_and_the_untouched_images_judge(whole):
    evaluated = [e for e in whole[1] if isinstance(e, Evaluated)]
    assert [e.on for e in evaluated] == ["minival"] * 5 + ["held-out"]
    best = max(evaluated[:5], key=lambda e: e.top1)
    _, card = load_model(whole[0] / "model.safetensors")
    assert card.provenance["epoch"] == evaluated[-1].epoch == best.epoch
    last = evaluated[-1]
    assert card.measured == {"minival_top1": best.top1, "top1": last.top1, "mean_per_class": last.mean_per_class}


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_a_cut_checkpoint_is_skipped_with_a_warning(whole, tmp_path, quarter):
    shutil.copytree(whole[0], tmp_path / "run")
    states = sorted((tmp_path / "run/states").iterdir())
    assert [p.name for p in states] == ["state-00000016.safetensors", "state-00000020.safetensors"]
    states[-1].write_bytes(states[-1].read_bytes()[: states[-1].stat().st_size * quarter // 4])
    with pytest.warns(CheckpointWarning, match="state-00000020"):
        events = run(tmp_path / "run", resume=True)
    assert events[0] == Resumed(16, 5)
    assert losses(events) == losses(whole[1])[16:]
    assert same_weights(tmp_path / "run", whole[0])


def test_another_recipe_network_or_data_set_is_refused_with_the_difference(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ResumeError, match=r"recipe\.lr: 0\.3 then, 0\.4 now"):
        run(tmp_path / "run", replace(RECIPE, lr=0.4), resume=True)
    renamed = replace(splits(), classes=("class 0", "class 1", "class 2", "cats"))
    with pytest.raises(ResumeError, match=r"'cats' is new, 'class 3' is gone"):
        run(tmp_path / "run", data=renamed, resume=True)
    with pytest.raises(ResumeError, match="data"):
        run(tmp_path / "run", data=splits(images=108), resume=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_label_out_of_range_is_told_with_its_file(tmp_path):
    data = splits()
    data.train.labels[5] = 9
    with pytest.raises(ValueError, match=r"train/005\.png: label 9, expected 0 to 3 \(1 such images\)"):
        run(tmp_path / "run", data=data)


def test_random_crops_of_images_in_memory_are_refused(tmp_path):
    with pytest.raises(ValueError, match="crop_area"):
        run(tmp_path / "run", replace(RECIPE, crop_area=0.08))


@pytest.mark.parametrize("more", [{"augment": "autoaugment"}, {"augment": "randaugment", "mixup": 0.2, "cutmix": 1.0}])
def test_policies_and_mixing_go_on_after_a_stop_as_if_there_had_been_none(tmp_path, more):
    recipe = replace(RECIPE, epochs=2, minival=0.0, **more)
    want = losses(run(tmp_path / "whole", recipe))
    steps = iter(range(100))
    with pytest.raises(Stopped):
        run(tmp_path / "run", recipe, stop=lambda: next(steps) == 5)
    assert losses(run(tmp_path / "run", recipe, resume=True, workers=2)) == want[6:]
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def start(out, *more, processes=0, net=NET):
    code = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=1"]
    command = (code if processes else [sys.executable]) + [
        "-m",
        "triscale",
        "train",
        "digits",
        "--arch",
        str(out.parent / "net.json"),
        "--out",
        str(out),
    ]
    (out.parent / "net.json").write_text(replace(net, resolution=16).to_json())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *map(str, more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def logged(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


def read_held_out(out):
    with np.load(out / "held_out.npz") as arrays:
        return dict(arrays)


def evaluated(out):
    """Top-1, top-5 and the classes' mean of the model in the file on digits, judged in this process."""
    torch.set_num_threads(1)
    net, card = load_model(out / "model.safetensors")
    data = prepare(find("digits"), card.preprocess, Recipe(crop_area=0.0))
    return _judged([_part(net.to(memory_format=torch.channels_last), data.held_out, card.preprocess, Feeding())], data.held_out)[:3]


def test_parts_of_an_evaluation_make_the_whole_also_where_one_of_them_cannot_be_read(tmp_path):
    """28 images in four batches of 8: of one, two and five processes, with two images and the whole last batch unreadable."""
    rng = np.random.default_rng(0)
    for i in range(28):
        path = tmp_path / f"{'cat' if i < 15 else 'dog'}/{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
        if i in (3, 17) or i >= 24:
            path.write_bytes(b"no image")
    preprocess, net = preprocess_for(24, 3), ts.build(NET, 2).eval()
    found = []
    for processes, sizes in ((1, [22]), (2, [15, 7]), (5, [7, 8, 7])):
        pictures = Streamed(part_of(tmp_path, ("cat", "dog")))
        parts = [_part(net, pictures, preprocess, Feeding(share=(rank, processes)), 8) for rank in range(processes)]
        found.append((_judged(parts, pictures), sorted(pictures.left_out())))
        assert [len(part[1]) for part in parts if isinstance(part, tuple)] == sizes
        assert [type(part) for part in parts[-1:] + parts[:1]] == [DataError, type(None)] or processes < 5
    assert found[0][0].numbers.tolist() == [i for i in range(24) if i not in (3, 17)]
    assert [len(reasons) for _, reasons in found] == [6, 6, 6]
    for judged, reasons in found[1:]:
        assert judged[:3] == found[0][0][:3]
        assert torch.equal(judged.logits, found[0][0].logits)
        assert torch.equal(judged.numbers, found[0][0].numbers)
        assert reasons == found[0][1]
    gone = pictures.rows(torch.tensor([3, 17]))
    with pytest.raises(DataError, match=r"none of 1 images can be read; the first: .*03"):
        _judged([_part(net, gone, preprocess, Feeding(share=(rank, 2)), 1) for rank in (0, 1)], gone)


def test_two_processes_learn_what_one_learns_and_one_can_go_on_with_it(tmp_path):
    """Batch norm over all images of the batch in both; drop connect, which differs by process, is off. Both judge: the 359 images are
    two batches, and one process says of them, bit for bit, what two have said of the same weights."""
    options = ("--epochs", 2, "--batch-size", 64, "--norm-batch", 64, "--ema", 0.9, "--resolution", 16)
    net = NET.with_numerics(drop_path=0.0)
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    for out in (one, two):
        out.parent.mkdir()
    children = [start(one, *options, net=net), start(two, *options, net=net, processes=2)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    for a, b in zip(logged(one), logged(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["top1"] == pytest.approx(a["top1"], abs=0.01)
    said = read_held_out(two)
    top1, _, by_class = evaluated(two)
    assert (logged(two)[-1]["top1"], logged(two)[-1]["mean_per_class"]) == (top1, by_class)
    (two / "held_out.npz").unlink()
    resumed = start(two, *options, "--resume", net=net)
    out, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, errors
    assert "trained already, 44 steps" in errors
    assert f"{100 * logged(two)[-1]['top1']:.2f} % of the held-out images right" in out
    again = read_held_out(two)
    assert len(said["names"]) == 359
    assert said.keys() == again.keys()
    assert all(np.array_equal(said[key], again[key]) for key in said)


def test_a_killed_worker_is_replaced_and_the_run_ends_as_it_should(tmp_path):
    options = ("--epochs", 3, "--batch-size", 64, "--save-every", 1, "--resolution", 16, "--resume")
    out, plain = tmp_path / "killed" / "run", tmp_path / "plain" / "run"
    for folder in (out, plain):
        folder.parent.mkdir()
    child = start(out, *options, processes=2)
    deadline = time.monotonic() + 90
    while not list((out / "states").glob("state-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = child.communicate(timeout=150)
    assert child.returncode == 0, errors
    other = start(plain, *options, processes=2)
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    assert any('"resumed"' in line for line in (out / "log.jsonl").read_text().splitlines())
    last = [logged(folder)[-1] for folder in (out, plain)]
    assert last[0]["step"] == last[1]["step"] == 66
    assert last[0]["loss"] == last[1]["loss"]
    assert same_weights(out, plain)


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_end_it_with_status_3(tmp_path, signals):
    (tmp_path / "a").mkdir()
    out = tmp_path / "a" / "run"
    child = start(out, "--epochs", 1000, "--save-every", 5, "--resolution", 16)
    deadline = time.monotonic() + 60
    while not list((out / "states").glob("state-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(signals):
        child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 3, errors[-2000:]
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
    assert "--resume goes on" in errors or signals == 2
    assert not [p for p in out.rglob("*") if p.name.endswith(".part")]


def test_memory_does_not_grow(tmp_path):
    """5 000 steps of a small network with everything on, from the 500th on."""
    tiny = ts.Arch(ts.Stem(4), (ts.Stage("mbconv", 3, 2, 1, 0.25, "identity", 8, 1),), ts.Head(8), 8, 0.1)
    data = splits(images=1008)
    small = Splits(*(ImageData(p.images[:, :, :8, :8].contiguous(), p.labels, p.names) for p in (data.train, data.held_out)), data.classes, "val")
    recipe = Recipe(epochs=80, batch_size=16, ema=0.9, erase=0.3, optimizer="rmsprop", lr=0.001)
    sizes = []
    for event in run_folder(tmp_path / "run", small, tiny, preprocess_for(8, 3), recipe, "made", Running(save_every=50, workers=1)):
        if isinstance(event, Step) and event.step % 500 == 0:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert len(sizes) == 10
    assert sizes[-1] - sizes[0] < 50 << 20
