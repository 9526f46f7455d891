"""The command line as a person runs it: real processes, their output, their exit status, the files they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import triscale as ts
from triscale.cli import main
from triscale.weights.model_file import load_model

TINY = ts.Arch(
    ts.Stem(8, 3, 2), (ts.Stage("mbconv", 3, 2, 1, 0.25, "identity", 8, 1),), ts.Head(16), 32, 0.0, ts.Numerics(norm_momentum=0.1), name="tiny"
)


def triscale(*args, cwd, timeout=120, **more):
    return subprocess.run([sys.executable, "-m", "triscale", *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=timeout, **more)


@pytest.fixture
def here(monkeypatch, capfd):
    """`here(cwd, *arguments)`: the same command in this process, which has loaded torch already; (status, output, errors)."""
    before = signal.getsignal(signal.SIGTERM)

    def call(cwd, *args):
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        with pytest.raises(SystemExit) as status:
            main([str(a) for a in args])
        out = capfd.readouterr()
        return subprocess.CompletedProcess(args, status.value.code, out.out, out.err)

    yield call
    signal.signal(signal.SIGTERM, before)


def refused(result, *words):
    """Exit status 2, one line on standard error that has all the words, no traceback."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 12 images each that a network can tell apart: reddish and bluish noise."""
    root = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
            pixels[:, :, channel] += 100
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished training: (its folder, the process's result, the working directory)."""
    cwd = tmp_path_factory.mktemp("work")
    (cwd / "tiny.json").write_text(TINY.to_json())
    options = ("--arch", "tiny.json", "--epochs", 12, "--batch-size", 8, "--lr", 0.05, "--threads", 1, "--out", "out")
    return cwd / "out", triscale("train", folder, *options, cwd=cwd), cwd


def test_help_lists_every_command_and_needs_no_torch(tmp_path):
    result = triscale("--help", cwd=tmp_path)
    assert result.returncode == 0
    for command in ("models", "show", "scale", "demo", "train", "predict", "eval", "explain", "convert", "bench", "reproduce"):
        assert f"  {command} " in result.stdout
    code = "import sys; from triscale.cli import main\ntry: main(['show', 'efficientnet_b0'])\nexcept SystemExit: print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path).stdout.endswith("False\n")


def test_models_lists_the_counted_family(tmp_path):
    lines = triscale("models", cwd=tmp_path).stdout.splitlines()
    assert any(line.split()[:3] == ["efficientnet_b7", "600", "66,347,960"] for line in lines)
    assert len([line for line in lines if line.startswith(("efficientnet", "mobilenet", "mnasnet", "resnet"))]) == len(ts.names())


def test_wrong_names_and_impossible_budgets_are_one_line(tmp_path, here):
    assert refused(here(tmp_path, "show", "efficientnet_b9"), "efficientnet_b9", "efficientnet_b8")
    assert refused(here(tmp_path, "shwo"), "show")
    assert refused(here(tmp_path, "scale", "efficientnet_b0", "--macs", "10"), "smallest", "macs")
    assert refused(here(tmp_path, "scale", "efficientnet_b0", "--macs", "many"), "many")
    assert refused(here(tmp_path, "scale", "efficientnet_b0"), "--phi")
    assert refused(here(tmp_path, "scale", "efficientnet_b0", "--width", "-1"), "width")
    assert refused(here(tmp_path, "show", "none.json"), "none.json")
    assert refused(here(tmp_path, "reproduce", "table9"), "table")
    assert refused(here(tmp_path, "bench", "resnet51"), "resnet50")
    assert refused(here(tmp_path, "train", "digits", "--recipe", "quik"), "quick")
    assert not list(tmp_path.iterdir())


def test_an_installation_that_was_stopped_is_one_line(tmp_path):
    """A virtual environment that has the package's own files but none of what it needs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "bare"], cwd=tmp_path, check=True)
    command = [tmp_path / "bare" / "bin" / "python", "-m", "triscale", "show", "efficientnet_b0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert refused(result, "installation is incomplete", "tyro")


def test_a_scaled_network_is_saved_and_read_again(tmp_path, here):
    made = here(tmp_path, "scale", "mobilenet_v2", "--macs", "100M", "--params", "2M", "--save", "small.json")
    assert made.returncode == 0
    arch = ts.Arch.from_json((tmp_path / "small.json").read_text())
    assert arch == ts.fit_budget(ts.arch("mobilenet_v2"), macs=100e6, params=2e6).arch
    assert f"{ts.cost(arch).params:,}" in here(tmp_path, "show", "small.json").stdout


def test_latency_budget_measures_this_machine(tmp_path, here):
    made = here(tmp_path, "scale", "mobilenet_v2", "--latency", "200ms", "--macs", "60M")
    assert made.returncode == 0, made.stderr
    assert "latency" in made.stdout
    assert "bound by" in made.stdout


def test_bad_data_folders_are_one_line_and_leave_nothing(tmp_path, here):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "cat" / "1.png")
    (tmp_path / "junk" / "a").mkdir(parents=True)
    (tmp_path / "junk" / "b").mkdir()
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        (tmp_path / "junk" / name).write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    assert refused(here(tmp_path, "train", "empty", "--arch", "mobilenet_v2"), "empty", "no images")
    assert refused(here(tmp_path, "train", "one", "--arch", "mobilenet_v2"), "one class")
    assert refused(here(tmp_path, "train", "missing"), "missing", "no such folder")
    assert refused(here(tmp_path, "train", "digit"), "digits")
    assert refused(here(tmp_path, "train", "junk", "--arch", "mobilenet_v2"), "'a'", "junk")
    assert refused(here(tmp_path, "train", "cifar10", "--data-dir", "empty"), "cifar10", "--data-dir")
    assert sorted(tmp_path.rglob("*")) == before


def test_train_learns_and_leaves_a_whole_run_folder(run):
    out, result, _ = run
    assert result.returncode == 0, result.stderr
    log = [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if row["kind"] == "epoch"]
    assert [row["epoch"] for row in log] == list(range(1, 13))
    assert log[-1]["top1"] == 1.0
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert {p.name for p in out.iterdir()} == {
        "recipe.json", "arch.json", "log.jsonl", "samples.npz", "held_out.npz", "model.safetensors", "report.html", "states"
    }  # fmt: skip
    _, card = load_model(out / "model.safetensors")
    assert card.classes == ("blue", "red")
    assert card.arch.topology == TINY.topology
    assert card.measured == {"top1": 1.0, "mean_per_class": 1.0}
    assert "<svg" in (out / "report.html").read_text()


def test_predict_from_the_model_file_alone(run, folder):
    out, _, cwd = run
    result = triscale("predict", folder / "red" / "03.png", folder / "blue" / "04.png", "--weights", out / "model.safetensors", "--json", cwd=cwd)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0
    assert [row["top"][0]["class"] for row in rows] == ["red", "blue"]
    assert all(abs(sum(c["probability"] for c in row["top"]) - 1) < 1e-5 for row in rows)


def test_predict_goes_on_past_a_bad_file(run, folder, tmp_path, here):
    out, _, cwd = run
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    result = here(cwd, "predict", folder / "red" / "03.png", tmp_path / "broken.jpg", folder / "blue", "--weights", out / "model.safetensors")
    assert result.returncode == 1
    assert "broken.jpg" in result.stderr
    assert "1 of 14" in result.stderr
    assert result.stdout.count("red") >= 13
    only_bad = here(cwd, "predict", tmp_path / "broken.jpg", "--weights", out / "model.safetensors")
    assert only_bad.returncode == 2
    assert refused(here(cwd, "predict", tmp_path / "none", "--weights", "none.safetensors"), "none.safetensors")


def test_train_lists_what_it_left_out(folder, tmp_path, here):
    data = tmp_path / "data"
    for name in ("blue", "red"):
        (data / name).mkdir(parents=True)
        for path in sorted((folder / name).iterdir())[:6]:
            (data / name / path.name).write_bytes(path.read_bytes())
    (data / "red" / "cut.png").write_bytes((folder / "red" / "00.png").read_bytes()[:900])
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    words = "1 of 13 images can't be read, more than 5 %", "--broken-share"
    assert refused(here(tmp_path, "train", data, "--arch", "tiny.json", "--epochs", 1), *words)
    result = here(tmp_path, "train", data, "--arch", "tiny.json", "--epochs", 1, "--broken-share", 0.1)
    assert result.returncode == 1
    assert "left out" in result.stderr
    assert "red/cut.png" in result.stderr
    assert (tmp_path / "runs" / "data-tiny" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["corrupt_header.safetensors", "huge_header.safetensors", "malicious_pickle.pth", "shape_mismatch.pth", "gray.jpg"])
def test_a_checkpoint_that_is_none_is_refused(shared, tmp_path, name, here):
    assert refused(here(tmp_path, "predict", "x.jpg", "--weights", shared / "data/bad-images" / name), name)
    assert not list(tmp_path.iterdir())


def test_bad_images_through_predict(run, shared, tmp_path, here):
    """Every image of the collection in one call: those that must be refused are named, the rest classified."""
    out, _, _ = run
    manifest = json.loads((shared / "data/bad-images/manifest.json").read_text())["files"]
    images = [f for f in manifest if f["kind"] == "image"]
    paths = [shared / "data/bad-images" / f["file"] for f in images]
    result = here(tmp_path, "predict", *paths, "--weights", out / "model.safetensors", "--json")
    assert result.returncode == 1
    done = {Path(json.loads(line)["file"]).name for line in result.stdout.splitlines()}
    for f in images:
        if f["expect"] != "either":
            assert (f["file"] in done) == (f["expect"] == "decode"), f["file"]
            assert (f["file"] in result.stderr) == (f["expect"] == "error"), f["file"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_training_keeps_the_last_epoch(folder, tmp_path, stop):
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    command = [sys.executable, "-m", "triscale", "train", str(folder), "--arch", "tiny.json", "--epochs", "100000", "--threads", "1", "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "model.safetensors").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "--out out --resume goes on" in errors
    assert "Traceback" not in errors
    _, card = load_model(tmp_path / "out" / "model.safetensors")
    assert card.provenance["epoch"] >= 1
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith(".part")]


def test_full_disk_is_one_line_and_leaves_no_half_file(folder, tmp_path):
    """A limit on the size of written files stands in for the full disk: the same OSError at the same call."""
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
    code = limit + "from triscale.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "train", str(folder), "--arch", "tiny.json", "--epochs", "1", "--out", "out"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.endswith(".part")]


def test_the_same_seed_gives_the_same_log(run, folder):
    out, _, cwd = run
    options = ("--arch", "tiny.json", "--epochs", 12, "--batch-size", 8, "--lr", 0.05, "--threads", 1, "--out", "again")
    assert triscale("train", folder, *options, cwd=cwd).returncode == 0
    rows = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (out, cwd / "again")]
    first, second = ([(r["loss"], r["top1"]) for r in part if r["kind"] == "epoch"] for part in rows)
    assert first == second
    assert (out / "model.safetensors").read_bytes() == (cwd / "again" / "model.safetensors").read_bytes()


def test_demo_in_small(tmp_path):
    """One seed: the whole path, its table, its page, its model."""
    result = triscale("demo", "--seeds", 1, "--out", "demo", cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "demo" / "results.json").read_text())
    base, *others = data["networks"]
    assert [n["name"] for n in others] == ["depth", "width", "resolution", "compound"]
    assert all(3.7 * base["macs"] < n["macs"] <= 4 * base["macs"] for n in others)
    assert next(n for n in others if n["name"] == "compound")["top1"][0] >= 0.975
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<svg" in page
    assert page.count("data:image/png;base64") == 10
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert str((tmp_path / "demo" / "report.html").resolve()) in result.stdout
    _, card = load_model(tmp_path / "demo" / "model.safetensors")
    assert card.classes == tuple("0123456789")
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {"results.json", "model.safetensors", "report.html"}


def test_stopped_demo_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "triscale", "demo", "--out", "demo"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("demo/.work-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3, errors
    assert b"Traceback" not in errors
    assert not list((tmp_path / "demo").iterdir())


def test_an_output_folder_with_files_is_never_touched(folder, tmp_path, here):
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    assert refused(here(tmp_path, "train", folder, "--arch", "tiny.json", "--out", "mine"), "mine", "exists already")
    assert refused(here(tmp_path, "train", folder, "--arch", "tiny.json", "--out", "tiny.json"), "tiny.json")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "options",
    [
        ("--lr", "1e30", "--warmup-epochs", "0", "--batch-size", "8"),
        ("--batch-size", "1", "--resolution", "1"),
        ("--threads", "0"),
        ("--threads", "100000"),
        ("--resolution", "0"),
    ],
)
def test_a_run_that_fails_at_once_leaves_nothing(folder, tmp_path, here, options):
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    assert refused(here(tmp_path, "train", folder, "--arch", "tiny.json", "--out", "out", "--epochs", 3, *options))
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.json"]


def test_what_is_no_image_by_its_name_is_told(folder, tmp_path, here):
    data = tmp_path / "data"
    for name in ("blue", "red"):
        (data / name).mkdir(parents=True)
        for path in sorted((folder / name).iterdir())[:4]:
            (data / name / path.name).write_bytes(path.read_bytes())
    (data / "red" / "notes.txt").write_text("")
    (data / "empty").mkdir()
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    result = here(tmp_path, "train", data, "--arch", "tiny.json", "--epochs", 1, "--out", "out")
    assert result.returncode == 0
    assert "empty/ (no images), red/notes.txt" in result.stderr
    assert refused(here(tmp_path, "train", ""), "empty")


def test_an_input_size_that_is_asked_for_stays_under_a_budget(folder, tmp_path, here):
    result = here(tmp_path, "train", folder, "--arch", "mobilenet_v2", "--resolution", 64, "--macs", "8M", "--epochs", 1, "--out", "out")
    assert result.returncode == 0, result.stderr
    _, card = load_model(tmp_path / "out" / "model.safetensors")
    assert card.arch.resolution == 64
    assert ts.cost(card.arch, 2).macs <= 8e6


def test_digits_are_not_mirrored_unless_asked(monkeypatch):
    from triscale.commands.training import train_options

    assert train_options(["digits"]).settings.flip is False
    assert train_options(["digits", "--flip"]).settings.flip is True
    assert train_options(["photos"]).settings.flip is True


@pytest.mark.parametrize("change", ["layers", "size", "dtype", "nan", "names"])
def test_a_model_file_that_nobody_vouches_for(run, folder, tmp_path, here, change):
    """Bounded time and memory, no steering of the terminal, no numbers out of nothing."""
    from safetensors.torch import load_file, save_file

    out, _, _ = run
    tensors, meta = load_file(out / "model.safetensors"), json.loads(load_model(out / "model.safetensors")[1].to_json())
    if change == "layers":
        meta["arch"]["stages"] = [{**meta["arch"]["stages"][0], "layers": 4096}] * 60
    elif change == "size":
        meta["preprocess"]["size"] = 65536
    elif change == "dtype":
        tensors = {k: v.half() for k, v in tensors.items()}
    elif change == "nan":
        tensors["classifier.bias"] = tensors["classifier.bias"] * float("nan")
    else:
        meta["classes"] = ["\x1b[31mred", "b\nx"]
    save_file(tensors, tmp_path / "m.safetensors", metadata={"triscale": json.dumps(meta)})
    start = time.monotonic()
    result = here(tmp_path, "predict", folder / "red" / "03.png", "--weights", "m.safetensors")
    assert time.monotonic() - start < 10
    if change in ("layers", "size"):
        assert refused(result, "m.safetensors")
    elif change == "nan":
        assert result.returncode == 2
        assert "not finite" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout
        assert len(result.stdout.splitlines()) == 4
