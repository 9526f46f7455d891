"""detect predict: boxes that come back to their places in the files' pixels, drawings, COCO results; real processes and bad files."""

import contextlib
import io
import json
import os
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
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_cli import here, refused  # noqa: F401 - a fixture
from torchvision.ops import box_iou

from triscale.commands.detect_prediction import drawing_names
from triscale.detect.boxes import encode
from triscale.detect.coco import read_coco
from triscale.detect.drawing import HUES, class_colour, draw_boxes, place, save_drawing
from triscale.detect.evaluate import coco_results
from triscale.detect.model_file import DetectorCard, save_detector
from triscale.detect.predict import Failure, Found, detect_files
from triscale.detect.retinanet import Detector, Outputs, build_detector
from triscale.detect.rules import MMDETECTION
from triscale.detector import BoxHead, DetectorArch, Pyramid
from triscale.families import arch as named
from triscale.recipe import Preprocess

SIDE = 128
ARCH = DetectorArch(replace(named("mobilenet_v2"), resolution=SIDE), Pyramid(8, first=4), BoxHead(1, 8))
CLASSES, IDS = ("RBC", "WBC", "Platelets"), (1, 2, 3)
CARD = DetectorCard(ARCH, Preprocess(SIDE, 0, "squash", mean=(0, 0, 0), std=(255, 255, 255)), CLASSES, IDS)


class RedFinder(Detector):
    """Whose outputs say one thing: where the red rectangle of its input lies, to a fraction of a pixel, as class 1."""

    def forward(self, images):
        maps = [(-(-images.shape[2] // s), -(-images.shape[3] // s)) for s in self.arch.pyramid.strides]
        each = self.arch.anchors.each
        logits = tuple(torch.full((len(images), each * self.num_classes, *m), -20.0) for m in maps)
        deltas = tuple(torch.zeros(len(images), each * 4, *m) for m in maps)
        out = Outputs(logits, deltas, (images.shape[2], images.shape[3]))
        for i, image in enumerate(images):
            sides = [edges(image[0].amax(1)), edges(image[0].amax(0))]
            box = torch.tensor([sides[1][0], sides[0][0], sides[1][1], sides[0][1]])
            overlaps = [box_iou(box[None], anchors)[0] for anchors in self.anchors(out)]
            level = max(range(len(maps)), key=lambda k: float(overlaps[k].max()))
            best = int(overlaps[level].argmax())
            y, x, a = best // each // maps[level][1], best // each % maps[level][1], best % each
            logits[level][i, a * self.num_classes + 1, y, x] = 5.0
            deltas[level][i, 4 * a : 4 * a + 4, y, x] = encode(box[None], self.anchors(out)[level][best][None])[0]
        return out


def edges(profile):
    """Where something of brightness 1 with blurred edges begins and ends."""
    width, middle = profile.sum(), (profile * (torch.arange(len(profile)) + 0.5)).sum() / profile.sum()
    return float(middle - width / 2), float(middle + width / 2)


@pytest.fixture(scope="module")
def random_net():
    """Untrained, with scores all over (0, 1)."""
    torch.manual_seed(0)
    net = build_detector(ARCH, 3).eval()
    torch.nn.init.normal_(net.head.classes.output.weight, std=0.5)
    torch.nn.init.constant_(net.head.classes.output.bias, -1.0)
    torch.nn.init.normal_(net.head.boxes.output.weight, std=0.3)  # boxes just as anchors overlap by just the half, where roundings decide
    return net


@pytest.fixture(scope="module")
def weights(random_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "detector.safetensors"
    save_detector(path, random_net, CARD)
    return path


@pytest.fixture(scope="module")
def cells(shared):
    return [str(p) for p in sorted((shared / "data/bccd/images").iterdir())[:6]]


def red_picture(width, height, box):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2], 0] = 255
    return Image.fromarray(pixels)


PICTURES = {  # width, height, box
    "wide": (900, 100, (300, 21, 600, 77)),
    "tall": (100, 900, (30, 410, 69, 871)),
    "tiny": (9, 7, (3, 2, 6, 5)),
    "large": (1600, 1203, (150, 240, 391, 1000)),
    "square": (128, 128, (17, 50, 90, 71)),
    "whole": (333, 250, (0, 0, 333, 250)),
}


@pytest.mark.parametrize("batch", [1, 4])
def test_a_rectangle_in_the_file_comes_out_in_the_files_own_pixels(tmp_path, batch):
    files = [str(tmp_path / f"{name}.png") for name in PICTURES]
    for file, (width, height, box) in zip(files, PICTURES.values(), strict=True):
        red_picture(width, height, box).save(file)
    found = list(detect_files(RedFinder(ARCH, 3).eval(), CARD, files, batch_size=batch, workers=2))
    assert [f.file for f in found] == files
    for f, (width, height, box) in zip(found, PICTURES.values(), strict=True):
        assert (f.width, f.height, f.labels.tolist()) == (width, height, [1])
        assert f.scores.tolist() == pytest.approx([1 / (1 + np.exp(-5))])
        assert np.abs(f.boxes - [box]).max() < 0.1 * max(width, height) / SIDE + 1e-3, f.boxes  # a tenth of a pixel of the network's
        assert (f.boxes >= 0).all()
        assert (f.boxes <= [width, height, width, height]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_judged_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    red_picture(300, 200, (20, 40, 100, 60)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))[:, :, 0] > 0
    (y1, x1), (y2, x2) = np.argwhere(upright).min(0), np.argwhere(upright).max(0) + 1
    (found,) = detect_files(RedFinder(ARCH, 3).eval(), CARD, [str(tmp_path / "turned.png")])
    assert (found.height, found.width) == upright.shape
    assert np.abs(found.boxes - [[x1, y1, x2, y2]]).max() < 0.25


def test_threads_and_batches_change_nothing_and_a_bound_takes_the_best(random_net, cells):
    one = list(detect_files(random_net, CARD, cells, batch_size=1, workers=1))
    for f, g in zip(one, detect_files(random_net, CARD, cells, batch_size=4, workers=2), strict=True):
        assert len(f.boxes) > 50
        assert np.allclose(f.boxes, g.boxes, atol=1e-2)
        assert np.allclose(f.scores, g.scores, atol=1e-5)
    bound = float(np.median(np.concatenate([f.scores for f in one])))
    for f, g in zip(one, detect_files(random_net, CARD, cells, min_score=bound, batch_size=1, workers=1), strict=True):
        above = f.scores > bound
        assert np.allclose(f.boxes[above], g.boxes)
        assert (f.labels[above] == g.labels).all()
    assert random_net.rules == MMDETECTION  # the caller's stays as it was


def test_it_finds_what_the_evaluation_finds(random_net, shared):
    folder = shared / "data/bccd"
    data = read_coco(folder / "annotations/instances_test.json", folder / "images")
    rows = coco_results(random_net, data, CARD.preprocess, numbers=range(5)).rows
    found = detect_files(random_net, CARD, [str(data.path(i)) for i in range(5)])
    mine = [row for f, entry in zip(found, data.images[:5], strict=True) for row in f.rows(entry.id, IDS)]
    assert [(r["image_id"], r["category_id"]) for r in mine] == [(r["image_id"], r["category_id"]) for r in rows]
    assert np.allclose([[*r["bbox"], r["score"]] for r in mine], [[*r["bbox"], r["score"]] for r in rows], atol=0.01)
    assert len(rows) > 100


def test_what_cannot_be_run_is_refused_or_told(random_net, cells, shared):
    broken = build_detector(ARCH, 3).eval()
    broken.head.boxes.output.bias.data[0] = torch.nan
    (failure,) = detect_files(broken, CARD, cells[:1])
    assert isinstance(failure, Failure)
    assert failure.reason == f"{cells[0]}: the network's output is not finite; its weights are broken"
    for net, card, told in (
        (build_detector(ARCH, 3), CARD, "training mode"),
        (build_detector(ARCH, 2).eval(), CARD, "card's 3 classes, found one of 2"),
        (build_detector(ARCH, 3, 1).eval(), CARD, "RGB images, found one of 1 channel"),
    ):
        with pytest.raises(ValueError, match=told):
            next(detect_files(net, card, cells))


def test_the_truth_as_results_scores_as_the_truth(shared):
    folder = shared / "data/bccd"
    data = read_coco(folder / "annotations/instances_val.json", folder / "images")
    rows = []
    for number, entry in enumerate(data.images):
        boxes, labels = data.targets(number)
        rows += Found(entry.name, entry.height, entry.width, boxes, np.linspace(1, 0.5, len(labels)), labels).rows(entry.id, data.category_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(folder / "annotations/instances_val.json")
        run = COCOeval(truth, truth.loadRes(rows), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert run.stats[0] > 0.999
    assert rows[0]["file_name"] == data.images[0].name


# Drawings.


def test_the_edges_of_boxes_have_their_classes_colours_and_the_rest_is_left(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (400, 640, 3), dtype=np.uint8)
    boxes, labels = np.array([[50.2, 60.4, 299.6, 200], [320, 100, 420, 380], [500, 30, 640, 400]]), np.array([0, 2, 1])
    save_drawing(tmp_path / "out.png", draw_boxes(image, boxes, labels, np.array([0.9, 0.8, 0.7]), CLASSES))
    drawn = np.asarray(Image.open(tmp_path / "out.png"))
    assert drawn.shape == image.shape  # three boxes need no legend
    for (x1, y1, x2, y2), label in zip(np.rint(boxes).astype(int), labels, strict=True):
        for edge in (drawn[y1, x1:x2], drawn[y2 - 1, x1:x2], drawn[y1:y2, x1], drawn[y1:y2, x2 - 1]):
            assert (edge == class_colour(label)).all()
        assert (drawn[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4] == image[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4]).mean() > 0.97
    assert (drawn[205:, :300] == image[205:, :300]).all()
    assert (drawn[[59, 200, 100, 100], [200, 200, 49, 300]] == 0).all()  # around the first box, outside, the dark seam


@pytest.mark.parametrize(("shape", "size"), [((60, 90), (360, 240)), ((5000, 2500), (2048, 4096)), ((1, 1), (320, 320))])
def test_small_pictures_are_drawn_larger_and_large_ones_smaller(shape, size):
    drawn = draw_boxes(np.full((*shape, 3), 128, np.uint8), np.array([[0, 0, shape[1], shape[0]]]), np.array([1]), np.array([0.5]), CLASSES)
    assert drawn.size == size
    assert drawn.getpixel((size[0] - 1, size[1] - 1)) == HUES[1]


def test_crowded_pictures_get_a_legend_below(shared):
    folder = shared / "data/bccd"
    data = read_coco(folder / "annotations/instances_test.json", folder / "images")
    counts = np.diff(data.starts)
    for number, legend in ((int(counts.argmax()), True), (int(counts.argmin()), False)):
        boxes, labels = data.targets(number)
        drawn = np.asarray(draw_boxes(data.image(number), boxes, labels, np.linspace(0.99, 0.3, len(labels)), data.classes))
        assert drawn.shape[1] == 640
        assert (drawn.shape[0] > 480) == legend
        if legend:
            colours = {tuple(c) for c in drawn[481:].reshape(-1, 3).tolist()}
            assert {class_colour(k) for k in set(labels.tolist())} <= colours


def test_a_name_that_the_font_lacks_becomes_a_number():
    draw = [
        draw_boxes(np.zeros((400, 400, 3), np.uint8), np.array([[90, 90, 300, 300]]), np.array([1]), np.ones(1), ("a", name))
        for name in ("红", "class 1")
    ]
    assert draw[0].tobytes() == draw[1].tobytes()


def luminance(colour):
    linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in np.array(colour) / 255]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_80_classes_have_80_colours_on_which_text_can_be_read():
    colours = [class_colour(k) for k in range(80)]
    assert len(set(colours)) == 80
    assert tuple(colours[:7]) == HUES
    for k, colour in enumerate(colours):
        drawn = draw_boxes(
            np.full((300, 400, 3), 200, np.uint8), np.array([[100, 100, 300, 200]]), np.array([k]), np.ones(1), [f"{i}" for i in range(80)]
        )
        tab = np.asarray(drawn)[80:98, 102:125].reshape(-1, 3)  # what stands above the box
        tab = {tuple(c) for c in tab.tolist()} - {(200, 200, 200)}
        light = luminance(colour)
        ratios = [(max(light, luminance(c)) + 0.05) / (min(light, luminance(c)) + 0.05) for c in tab]
        assert colour in tab
        assert max(ratios) >= 4.5


@st.composite
def crowds(draw):
    width, height = draw(st.integers(1, 700)), draw(st.integers(1, 500))
    rects, sizes = [], []
    for _ in range(draw(st.integers(0, 30))):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        rects.append((left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))))
        sizes.append((draw(st.integers(1, 150)), draw(st.integers(5, 40))))
    return (width, height), rects, sizes, draw(st.sampled_from([0.05, 0.5, 1.0]))


@settings(max_examples=100, deadline=None)
@given(crowds())
def test_labels_lie_in_the_picture_at_their_boxes_and_off_each_other(crowd):
    (width, height), rects, sizes, hidden = crowd
    places = place(rects, sizes, (width, height), hidden)
    grid = np.zeros((height, width), int)
    for rect, size, at in zip(rects, sizes, places, strict=True):
        if at is None:
            continue
        left, top, right, bottom = at
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (right - left, bottom - top) == size
        assert left <= rect[2]
        assert rect[0] <= right
        assert top <= rect[3]
        assert rect[1] <= bottom
        grid[top:bottom, left:right] += 1
        for x1, y1, x2, y2 in rects:
            under = max(0, min(right, x2) - max(left, x1)) * max(0, min(bottom, y2) - max(top, y1))
            assert under <= hidden * (x2 - x1) * (y2 - y1) + 1e-9
    assert grid.max(initial=0) <= 1
    if hidden == 1.0 and rects and sizes[0][0] <= width and sizes[0][1] <= height:
        assert places[0] is not None


# The command.


def test_names_of_drawings_are_single_whatever_the_files_are_called():
    files = [
        "a/x.jpg",
        "b/x.jpg",
        "x-2.png",
        "c/X.JPG",
        "d/.hidden.png",
        "e/" + "长" * 80 + ".jpg",
        "f/" + "长" * 80 + ".jpg",
        "g/two\nlines.jpg",
        "h/..jpg",
    ]
    names = drawing_names(files)
    assert names[:5] == ["x.png", "x-2.png", "x-2-2.png", "X-3.png", "hidden.png"]
    assert names[7:] == ["two\\nlines.png", "picture.png"]
    assert len({name.lower() for name in names}) == len(files)
    assert all(name.endswith(".png") and len(name.encode()) < 200 for name in names)


def command(*arguments, cwd):
    return [sys.executable, "-m", "triscale", "detect", "predict", *map(str, arguments)], {
        "cwd": cwd,
        "text": True,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
    }


def test_a_real_process_with_good_and_bad_files(shared, weights, random_net, cells, tmp_path):
    for name, source in (("a/same.jpg", cells[0]), ("b/same.jpg", cells[1])):
        (tmp_path / name).parent.mkdir()
        shutil.copy(source, tmp_path / name)
    bad = shared / "data/bad-images"
    call, more = command("a", "b", bad, "--weights", weights, "--min-score", 0.5, "--out", "out", cwd=tmp_path)
    result = subprocess.run(call, capture_output=True, timeout=120, **more)
    images = {f["file"]: f["expect"] for f in json.loads((bad / "manifest.json").read_text())["files"] if f["kind"] == "image"}
    listed = {f for f in images if Path(f).suffix in (".png", ".jpg", ".gif", ".webp")}
    failed = {Path(line.split(": ")[1]).name for line in result.stderr.splitlines()[:-1]}
    done = [line.split(": ")[0] for line in result.stdout.splitlines()[:-1]]
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert failed | {Path(f).name for f in done[2:]} == listed
    assert {f for f in listed if images[f] == "error"} <= failed
    assert not {f for f in listed if images[f] == "decode"} & failed
    assert result.stderr.splitlines()[-1] == f"triscale detect predict: {len(failed)} of {len(listed) + 2} files failed"
    drawings = {p.name for p in (tmp_path / "out").iterdir()} - {"results.json"}
    assert len(drawings) == len(done)
    assert {"same.png", "same-2.png"} <= drawings
    rows = json.loads((tmp_path / "out/results.json").read_text())
    for number, file in enumerate(cells[:2], 1):  # the same as the function gives
        (found,) = detect_files(random_net, CARD, [file], min_score=0.5)
        mine = [r for r in rows if r["image_id"] == number]
        assert np.allclose([r["score"] for r in mine], found.scores, atol=1e-4)
        assert len(mine) > 5
        assert np.allclose([r["bbox"] for r in mine], [r["bbox"] for r in found.rows(1, IDS)], atol=0.05)
        counts = [
            f"{(found.labels == k).sum()} {CLASSES[k]} (best {found.scores[found.labels == k].max():.2f})" for k in sorted(set(found.labels.tolist()))
        ]
        assert result.stdout.splitlines()[number - 1].endswith(f"same.jpg: {', '.join(counts)}")


def test_interrupted_it_leaves_whole_files(weights, shared, tmp_path):
    call, more = command(shared / "data/bccd/images", "--weights", weights, "--min-score", 0.5, cwd=tmp_path)
    printed = tmp_path / "printed"  # a file, not a pipe: communicate() forgets what readline() had read ahead
    with printed.open("w") as stdout:
        child = subprocess.Popen(call, stdout=stdout, stderr=subprocess.PIPE, **more)
        while printed.read_text().count("\n") < 3:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    out = tmp_path / "runs/detect-predict"
    done = printed.read_text().count("\n")
    assert printed.read_text().count("BloodImage") == done
    assert child.returncode == 3
    assert errors == f"triscale detect predict: stopped: {done} of 364 pictures are done, their boxes in runs/detect-predict/results.json\n"
    assert {r["image_id"] for r in json.loads((out / "results.json").read_text())} <= set(range(1, done + 1))
    drawings = sorted(p for p in out.iterdir() if p.name != "results.json")
    assert done <= len(drawings) < 364
    for path in drawings:
        assert path.suffix == ".png"
        assert not path.name.startswith(".")
        Image.open(path).load()


def test_ids_of_a_coco_file(here, weights, shared, cells, tmp_path):  # noqa: F811
    truth = shared / "data/bccd/annotations/instances_test.json"
    content = json.loads(truth.read_text())
    images = {i["file_name"]: i["id"] for i in content["images"]}
    files = [str(shared / "data/bccd/images" / name) for name in list(images)[3:5]]
    result = here(
        tmp_path, "detect", "predict", *files, "--weights", weights, "--ids", truth, "--min-score", 0.05, "--json", "boxes.json", "--out", "out"
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out/results.json").exists()
    assert len(list((tmp_path / "out").iterdir())) == 2
    rows = json.loads((tmp_path / "boxes.json").read_text())
    assert {(r["image_id"], r["file_name"]) for r in rows} == {(images[Path(f).name], f) for f in files}
    with contextlib.redirect_stdout(io.StringIO()):
        real = COCO(truth)
        loaded = real.loadRes(str(tmp_path / "boxes.json"))
        run = COCOeval(real, loaded, "bbox")
        run.evaluate()
    assert len(loaded.getAnnIds()) == len(rows) > 20
    renumbered = {**content, "categories": [{"id": 70 - i, "name": name} for i, name in enumerate(CLASSES)], "annotations": []}
    (tmp_path / "other.json").write_text(json.dumps(renumbered))
    result = here(tmp_path, "detect", "predict", files[0], "--weights", weights, "--ids", "other.json", "--min-score", 0.05)
    again = json.loads((tmp_path / "runs/detect-predict/results.json").read_text())
    assert [r["category_id"] for r in again] == [71 - r["category_id"] for r in rows if r["file_name"] == files[0]]
    (tmp_path / "cats.json").write_text(json.dumps({**content, "categories": [{"id": 1, "name": "RBC"}], "annotations": []}))
    for arguments, told in (
        ((*files, cells[0]), "1 of 3 files aren't among its images"),
        ((files[0], files[0]), f"several of the files are image {images[Path(files[0]).name]}"),
    ):
        assert refused(here(tmp_path, "detect", "predict", *arguments, "--weights", weights, "--ids", truth), told)
    assert refused(
        here(tmp_path, "detect", "predict", files[0], "--weights", weights, "--ids", "cats.json"), "the detector's WBC, Platelets are not among"
    )


def test_refusals_leave_nothing(here, weights, shared, cells, tmp_path):  # noqa: F811
    classifier = shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/photo.png").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    for arguments, *told in (
        ((cells[0], "--weights", classifier), "neither a detector's file"),
        ((cells[0], "--weights", "none.safetensors"), "no such file"),
        ((cells[0], "--weights", weights, "--out", "full"), "--out full: exists already"),
        ((cells[0], "--weights", weights, "--json", "full/photo.png"), "--json full/photo.png: exists already"),
        ((cells[0], "--weights", weights, "--min-score", 1.5), "--min-score: expected a number from 0 to 1, found 1.5"),
        ((cells[0], "--weights", weights, "--size", 0), "--size: expected 1 to 4096 pixels, found 0"),
        ((cells[0], "--weights", weights, "--device", "abacus"), "--device abacus"),
        (("empty", "--weights", weights), "no image files in empty"),
    ):
        assert refused(here(tmp_path, "detect", "predict", *arguments), *told)
    nothing = here(tmp_path, "detect", "predict", shared / "data/bad-images/zero_byte.jpg", "gone.png", "--weights", weights)
    assert nothing.returncode == 2
    assert "zero_byte.jpg: empty file" in nothing.stderr
    assert "gone.png: cannot be opened" in nothing.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "full", "photo.png"]
    assert (tmp_path / "full/photo.png").read_bytes() == b"mine"


def test_another_size_is_the_networks_not_the_pictures(here, weights, random_net, cells, tmp_path):  # noqa: F811
    result = here(tmp_path, "detect", "predict", cells[0], "--weights", weights, "--size", 64, "--out", "out", "--min-score", 0.05)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())
    (found,) = detect_files(random_net, replace(CARD, preprocess=replace(CARD.preprocess, size=64)), cells[:1])
    assert len(rows) > 5
    assert np.allclose([r["bbox"] for r in rows], [r["bbox"] for r in found.rows(1, IDS)], atol=0.05)
    assert Image.open(tmp_path / "out" / f"{Path(cells[0]).stem}.png").width == 640
