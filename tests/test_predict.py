"""predict and convert on real weights and real, bad and missing files."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from test_cli import here, refused  # noqa: F401 - a fixture

import triscale as ts
from triscale.data.decode import decode
from triscale.data.fast import evaluate_into
from triscale.predict import image_files, logits_of_files
from triscale.recipe import Preprocess

LIMIT = 2 << 30  # bytes of resident memory that no untrusted file may cost
V2 = "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors"


@pytest.fixture(scope="module")
def photos(shared, tmp_path_factory):
    """A few files of one folder with names as people have them."""
    root = tmp_path_factory.mktemp("photos")
    for name, source in (
        ("a panda.jpg", "efficientnet-sample/img.jpg"),
        ("deep/er/potter's wheel.JPEG", "imagenet-samples/n03992509/n03992509_potter's_wheel.JPEG"),
        ("deep/goldfish.JPEG", "imagenet-samples/n01443537/n01443537_goldfish.JPEG"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared / "data" / source, root / name)
    (root / "notes.txt").write_text("no image\n")
    return root


def watched(arguments, cwd, stdin=""):
    """A child process and the most resident memory that its parent saw it have: (returncode, output, errors, bytes)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    (cwd / ".in").write_text(stdin)
    with open(cwd / ".in") as source, open(cwd / ".out", "w") as out, open(cwd / ".err", "w") as errors:
        child = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, stdin=source, stdout=out, stderr=errors, env=environment)
        most, deadline = 0, time.monotonic() + 120
        while child.poll() is None:
            assert time.monotonic() < deadline
            status = Path(f"/proc/{child.pid}/status").read_text()
            most = max([most, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
            if most > LIMIT:
                child.kill()
            time.sleep(0.01)
    text = [(cwd / name).read_text() for name in (".out", ".err")]
    for name in (".in", ".out", ".err"):
        (cwd / name).unlink()
    return child.returncode, *text, most


def test_bad_images_in_a_child_process_whose_memory_is_watched(shared, tmp_path):
    bad = shared / "data/bad-images"
    images = [f for f in json.loads((bad / "manifest.json").read_text())["files"] if f["kind"] == "image"]
    paths = "\n".join(str(bad / f["file"]) for f in images)
    code, out, errors, memory = watched(["-m", "triscale", "predict", "-", "--weights", shared / V2, "--json"], tmp_path, paths)
    done = {Path(json.loads(line)["file"]).name for line in out.splitlines()}
    for f in images:
        if f["expect"] != "either":
            assert (f["file"] in done) == (f["expect"] == "decode"), f["file"]
            assert (f["file"] in errors) == (f["expect"] == "error"), f["file"]
    assert code == 1
    assert "Traceback" not in errors
    assert 200 << 20 < memory < LIMIT  # torch alone is more than the lower bound: the parent did look
    assert not list(tmp_path.iterdir())


OPEN_ALL = """
import sys
from triscale.weights.open import open_model
for path in sys.argv[1:]:
    try:
        open_model(path)
    except ValueError as error:
        print(path.split("/")[-1], type(error).__name__, "|".join(str(error).splitlines()))
"""


def test_bad_checkpoints_in_a_child_process_whose_memory_is_watched(shared, tmp_path):
    """All five of the manifest and its archive, by every suffix that is read."""
    bad = shared / "data/bad-images"
    files = [f["file"] for f in json.loads((bad / "manifest.json").read_text())["files"] if f["kind"] != "image"]
    assert len(files) == 6
    paths = [bad / f for f in files]
    for suffix in (".safetensors", ".pth", ".npz", ".h5", ".keras", ".index"):
        for f in files:
            paths.append(tmp_path / f"{Path(f).stem}_as{suffix}")
            shutil.copy(bad / f, paths[-1])
    before = sorted(tmp_path.iterdir())
    code, out, errors, memory = watched(["-c", OPEN_ALL, *paths], tmp_path)
    assert code == 0, errors
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [p.name for p in paths]  # each refused, once, in one line
    assert all(line.split()[1] in ("WeightsError", "CheckpointError") for line in lines)
    assert memory < LIMIT
    assert sorted(tmp_path.iterdir()) == before  # no PWNED


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_forms_of_output_say_the_same(shared, photos, tmp_path, here, form):  # noqa: F811
    result = here(photos, "predict", ".", "--weights", shared / V2, form, "--top", 2, "--out", tmp_path / "out")
    assert (result.returncode, result.stdout) == (0, "")
    text = (tmp_path / "out").read_text()
    if form == "--json":
        found = {r["file"]: [(t["class"], t["probability"]) for t in r["top"]] for r in map(json.loads, text.splitlines())}
    else:
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [r["rank"] for r in rows] == ["1", "2"] * 3
        found = {r["file"]: [(x["class"], float(x["probability"])) for x in rows if x["file"] == r["file"]] for r in rows}
    assert {f: top[0][0] for f, top in found.items()} == {
        "a panda.jpg": "giant panda",
        "deep/er/potter's wheel.JPEG": "potter's wheel",
        "deep/goldfish.JPEG": "goldfish",
    }
    assert found["a panda.jpg"][0][1] == pytest.approx(0.8677, abs=2e-3)
    assert "assumed" in result.stderr


def test_files_folders_patterns_and_missing_ones(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert image_files(["*.jpg", "deep"]) == ["a panda.jpg", "deep/er/potter's wheel.JPEG", "deep/goldfish.JPEG"]
    assert image_files(["**/*.JPEG"]) == ["deep/er/potter's wheel.JPEG", "deep/goldfish.JPEG"]
    assert image_files(["none.jpg", "no*.gif", "notes.txt"]) == ["none.jpg", "no*.gif", "notes.txt"]  # told of when they are read
    Path("odd[1].jpg").write_bytes(b"")
    assert image_files(["odd[1].jpg"]) == ["odd[1].jpg"]
    Path("odd[1].jpg").unlink()


def test_a_list_on_standard_input_goes_on_past_what_is_missing(shared, photos, here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "stdin", io.StringIO("a panda.jpg\n\nnone.jpg\ndeep/goldfish.JPEG\n"))
    result = here(photos, "predict", "-", "--weights", shared / V2, "--top", 1, "--batch", 1)
    assert result.returncode == 1
    assert "giant panda" in result.stdout
    assert "goldfish" in result.stdout
    assert "none.jpg" in result.stderr
    assert "1 of 3 files" in result.stderr


def test_mistakes_are_one_line(shared, tmp_path, here):  # noqa: F811
    assert refused(here(tmp_path, "predict", "x.jpg", "--weights", "efficientnet_b0:imagenet-a"), "nearest is 'imagenet-aa'")
    assert refused(here(tmp_path, "predict", "x.jpg", "--weights", "none.pth"), "none.pth", "no such file")
    assert refused(here(tmp_path, "predict", "x.jpg", "--weights", shared / V2, "--arch", "efficientnetv2_s"), "missing", "of another shape")
    assert refused(here(tmp_path, "predict", "x.jpg", "--json", "--csv", "--weights", "x.pth"), "one of the two")
    assert refused(here(tmp_path, "predict", "--weights", "x.pth"), "no image files")
    assert refused(here(tmp_path, "predict", "x.jpg", "--weights", "x.pth", "--workers", "0"), "--workers")
    partial = shared / "weights/efficientnet_b0_partial/efficientnet_b0.lukemelas.partial.safetensors"
    assert refused(
        here(tmp_path, "predict", "x.jpg", "--weights", partial), "3 missing: _blocks.15._project_conv.weight, _conv_head.weight, _fc.weight"
    )


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_logits_don_t_depend_on_how_the_work_is_cut(shared, workers, batch_size):
    files = sorted(str(p) for p in (shared / "data/imagenet-samples").rglob("*.JPEG"))[:9]
    files.insert(4, "none.jpg")
    torch.manual_seed(0)
    net = ts.build(ts.arch("mobilenet_v2"), 11).eval()
    preprocess = Preprocess(64, 0)
    before = torch.get_num_threads()
    results = list(logits_of_files(files, net, preprocess, workers=workers, batch_size=batch_size))
    assert torch.get_num_threads() == before
    assert [f for f, _ in results] == files
    assert "none.jpg" in results[4][1]
    for file, row in results[:4] + results[5:]:
        x = torch.empty(1, 64, 64, 3)
        evaluate_into(x[0], decode(file), preprocess)
        with torch.no_grad():
            assert torch.allclose(row, net(x.permute(0, 3, 1, 2))[0], atol=1e-5), file


def test_leaving_early_stops_the_work(shared):
    files = sorted(str(p) for p in (shared / "data/imagenet-samples").rglob("*.JPEG"))
    seen = []

    def logits_of(x):
        seen.append(len(x))
        return torch.zeros(len(x), 3)

    results = logits_of_files(files, logits_of, Preprocess(32), workers=2, batch_size=4)
    next(results)
    results.close()
    assert sum(seen) < 60  # of 256: what is read ahead is bounded


def test_wrong_logits_are_refused(shared):
    files = [str(shared / "data/efficientnet-sample/img.jpg")]
    with pytest.raises(ValueError, match="expected logits"):
        list(logits_of_files(files, lambda x: torch.zeros(7), Preprocess(32)))


def test_convert_to_a_peer_and_back(shared, tmp_path, here):  # noqa: F811
    result = here(tmp_path, "convert", shared / V2, "ours.safetensors")
    assert "assumed" in result.stderr
    result = here(tmp_path, "convert", "ours.safetensors", "peer.safetensors", "--to", "timm")
    assert result.returncode == 0
    assert "its tf_efficientnetv2_b0 computes as here" in result.stderr
    peer = timm.create_model("tf_efficientnetv2_b0", checkpoint_path=str(tmp_path / "peer.safetensors")).eval()
    net, _ = ts.open_model(tmp_path / "ours.safetensors")
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.allclose(net(x), peer(x), atol=1e-4)
    first, last = (ts.open_model(tmp_path / name)[0].state_dict() for name in ("ours.safetensors", "peer.safetensors"))
    assert all(torch.equal(value, last[key]) for key, value in first.items())
    # ours says it itself now: nothing is assumed
    assert here(tmp_path, "predict", shared / "data/efficientnet-sample/img.jpg", "--weights", "ours.safetensors").stderr == ""
    assert "symmetric in torchvision" in here(tmp_path, "convert", "ours.safetensors", "tv.pth", "--to", "torchvision").stderr
    assert refused(here(tmp_path, "convert", "ours.safetensors", "luke.pth", "--to", "lukemelas"), "no names in lukemelas")
    assert refused(here(tmp_path, "convert", "ours.safetensors", "x.pth"), "a .safetensors file")
    assert refused(here(tmp_path, "convert", "ours.safetensors", "x.h5", "--to", "keras-npz"), ".npz")
    assert {p.name for p in tmp_path.iterdir()} == {"ours.safetensors", "peer.safetensors", "tv.pth"}
