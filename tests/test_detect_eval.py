"""COCO's numbers of a detector: an example worked by hand, pycocotools' own path, real images, the command as a process."""

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import triscale as ts
from triscale.commands.detect_evaluation import detect_eval
from triscale.detect import curves
from triscale.detect.boxes import BACKGROUND, assign, encode
from triscale.detect.coco import read_coco
from triscale.detect.curves import precision_recall_plot
from triscale.detect.evaluate import NUMBERS, ClassScore, Scores, coco_results, coco_scores, matched_ids
from triscale.detect.geometry import into
from triscale.detect.model_file import DetectorCard, save_detector
from triscale.detect.retinanet import Detector, Outputs, build_detector
from triscale.detect.views import evaluation_view
from triscale.detector import BoxHead, Pyramid, retinanet
from triscale.recipe import Preprocess
from triscale.weights.model_file import ModelCard, save_model

SIZE = 96
ARCH = replace(retinanet("mobilenet_v2", SIZE), pyramid=Pyramid(channels=8), head=BoxHead(convs=1, channels=8, prior=0.3))
CLASSES = ("RBC", "WBC", "Platelets")


def tiny(classes=3, kind=Detector):
    torch.manual_seed(0)
    return kind(ARCH, classes).to(memory_format=torch.channels_last)


def written(folder, **tables):
    folder.mkdir(exist_ok=True)
    path = folder / "boxes.json"
    path.write_text(json.dumps(tables))
    return read_coco(path, folder, check_files=False)


def box(i, image, category, xywh, crowd=0):
    return {"id": i, "image_id": image, "category_id": category, "bbox": list(xywh), "area": xywh[2] * xywh[3], "iscrowd": crowd}


def result(image, category, xywh, score):
    return {"image_id": image, "category_id": category, "bbox": list(xywh), "score": score}


# Class a: a small, a middle and a large box; class b a crowd alone; class c nothing. Ids have gaps.
EXAMPLE = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in (4, 9)],
    "annotations": [
        box(1, 4, 3, (10, 10, 20, 20)),
        box(2, 4, 3, (100, 100, 50, 50)),
        box(3, 9, 3, (200, 200, 100, 100)),
        box(4, 9, 90, (0, 0, 300, 100), crowd=1),
    ],
    "categories": [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}, {"id": 91, "name": "c"}],
}
FOUND = [
    result(4, 3, (10, 10, 20, 20), 0.9),
    result(9, 3, (400, 300, 100, 100), 0.8),  # nothing there
    result(9, 3, (200, 200, 62, 100), 0.7),  # IoU 0.62
    result(9, 90, (10, 10, 30, 30), 0.6),  # in the crowd: neither right nor wrong
]


def test_an_example_worked_by_hand(tmp_path):
    """At IoU 0.50, 0.55 and 0.60 class a's detections are right, wrong, right: recall 1/3, 1/3, 2/3 and precision 1, 1/2, 2/3. Of the
    101 recalls 34 (0 to 0.33) are at precision 1, 33 (to 0.66) at 2/3, the rest at 0. Above 0.62 the third is wrong: 34 at 1."""
    scores = coco_scores(written(tmp_path, **EXAMPLE), FOUND)
    low, high = (34 + 33 * 2 / 3) / 101, 34 / 101
    expected = {
        "AP": (3 * low + 7 * high) / 10,
        "AP50": low,
        "AP75": high,
        "APs": 1.0,  # the others match boxes of other sizes, or are of other sizes themselves
        "APm": 0.0,
        "APl": 3 * 0.5 / 10,  # the wrong one comes first
        "AR1": 1 / 3,  # the second image's best is the wrong one
        "AR10": (3 * 2 / 3 + 7 / 3) / 10,
        "AR100": (3 * 2 / 3 + 7 / 3) / 10,
        "ARs": 1.0,
        "ARm": 0.0,
        "ARl": 0.3,
    }
    assert tuple(scores.numbers) == NUMBERS
    assert scores.numbers == pytest.approx(expected, abs=1e-12)
    assert scores.images == 2
    first, *others = scores.classes
    assert first[:2] == ("a", 3)
    assert first[2:] == pytest.approx((expected["AP"], low, expected["AR100"]), abs=1e-12)
    assert [c[:2] for c in others] == [("b", 0), ("c", 0)]
    assert np.isnan([c[2:] for c in others]).all()
    assert scores.precision.shape == (10, 101, 3)
    assert scores.precision[0, :, 0] == pytest.approx([1] * 34 + [2 / 3] * 33 + [0] * 34, abs=1e-12)
    assert scores.precision[3, :, 0] == pytest.approx([1] * 34 + [0] * 67, abs=1e-12)
    assert np.isnan(scores.precision[:, :, 1:]).all()


def test_images_that_are_left_out_do_not_count(tmp_path):
    """Without the second image one of two boxes is found and nothing wrong: 51 of 101 recalls (0 to 0.5) at precision 1."""
    scores = coco_scores(written(tmp_path, **EXAMPLE), FOUND, left_out={1: "unreadable"})
    assert scores.images == 1
    assert scores.classes[0].boxes == 2
    assert scores.numbers["AP"] == pytest.approx(51 / 101)
    assert math.isnan(scores.numbers["APl"])


def test_nothing_found_is_zero_and_nothing_to_find_is_nan(tmp_path):
    assert list(coco_scores(written(tmp_path, **EXAMPLE), []).numbers.values()) == [0.0] * 12
    empty = written(tmp_path, **{**EXAMPLE, "annotations": []})
    for rows in ([], FOUND):
        assert np.isnan(list(coco_scores(empty, rows).numbers.values())).all()


def test_results_of_other_data_are_refused(tmp_path):
    data = written(tmp_path, **EXAMPLE)
    with pytest.raises(ValueError, match="found image_id 5"):
        coco_scores(data, [result(5, 3, (0, 0, 1, 1), 0.5)])
    with pytest.raises(ValueError, match="found category_id 1, 2"):
        coco_scores(data, [result(4, c, (0, 0, 1, 1), 0.5) for c in (2, 3, 1)])


def test_a_missing_pycocotools_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("triscale.detect.evaluate.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'triscale\[detect\]'"):
        coco_scores(written(tmp_path, **EXAMPLE), FOUND)


@pytest.fixture(scope="module")
def bccd(shared):
    folder = shared / "data" / "bccd"
    return read_coco(folder / "annotations" / "instances_test.json", folder / "images")


def near_the_truth(data):
    """The truth moved at random, some of it lost, and wrong boxes between."""
    rng, rows = np.random.default_rng(0), []
    for a in data.to_coco()["annotations"]:
        x, y, w, h = a["bbox"]
        dx, dy, dw, dh = rng.normal(0, 0.1, 4)
        moved = [x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)]
        strange = [rng.uniform(0, 500), rng.uniform(0, 300), w, h]
        if rng.random() < 0.9:
            rows.append(result(a["image_id"], a["category_id"], moved, round(rng.uniform(0.3, 1), 1)))  # rounded: ties
        if rng.random() < 0.5:
            rows.append(result(a["image_id"], a["category_id"], strange, rng.uniform(0.05, 0.7)))
    return rows


def test_the_same_as_pycocotools_own_path(bccd, capsys):
    rows = near_the_truth(bccd)
    before = json.dumps(rows)
    scores = coco_scores(bccd, rows)
    assert capsys.readouterr().out == ""
    assert json.dumps(rows) == before
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = bccd.to_coco()
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(rows), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert 0.2 < scores.numbers["AP"] < 0.8
    assert [scores.numbers[name] for name in NUMBERS] == run.stats.tolist()
    assert np.array_equal(scores.precision, run.eval["precision"][:, :, :, 0, 2])
    assert [c.AR100 for c in scores.classes] == pytest.approx(run.eval["recall"][:, :, 0, 2].mean(0).tolist())


def test_the_truth_itself_is_perfect(bccd):
    scores = coco_scores(bccd, [result(a["image_id"], a["category_id"], a["bbox"], 1.0) for a in bccd.to_coco()["annotations"]])
    assert {n: v for n, v in scores.numbers.items() if n not in ("AR1", "AR10")} == dict.fromkeys(set(NUMBERS) - {"AR1", "AR10"}, 1.0)
    assert [c.boxes for c in scores.classes] == bccd.counts().tolist()


class Knowing(Detector):
    """Its outputs are the truth of the images of `order`, which it is shown in that order."""

    def knows(self, data, order):
        self.data, self.order = data, list(order)
        return self

    def forward(self, images):
        outputs = super().forward(images)
        anchors = torch.cat(self.anchors(outputs))
        logits, deltas = torch.full((len(images), len(anchors), self.num_classes), -20.0), torch.zeros(len(images), len(anchors), 4)
        for i in range(len(images)):
            number = self.order.pop(0)
            boxes, labels = self.data.targets(number)
            inside, kept = into(boxes, evaluation_view(self.data, number, images.shape[2]).frame)
            which = assign(anchors, torch.from_numpy(inside), self.rules)
            learns = which != BACKGROUND
            deltas[i, learns] = encode(torch.from_numpy(inside)[which[learns]], anchors[learns])
            logits[i, learns, torch.from_numpy(labels[kept])[which[learns]]] = 5.0
        sizes = [x.shape[2:] for x in outputs.logits]
        counts = [h * w * self.arch.anchors.each for h, w in sizes]
        parts = [
            tuple(x.reshape(len(images), h, w, -1).permute(0, 3, 1, 2) for x, (h, w) in zip(whole.split(counts, 1), sizes, strict=True))
            for whole in (logits, deltas)
        ]
        return Outputs(parts[0], parts[1], outputs.size)


@pytest.fixture
def eight(shared, tmp_path):
    """Eight of bccd's test images, of other category ids: (data, JSON, images)."""
    source = shared / "data" / "bccd"
    whole = json.loads((source / "annotations" / "instances_test.json").read_text())
    ids = {c["id"]: new for c, new in zip(whole["categories"], (7, 2, 40), strict=True)}
    whole["images"] = whole["images"][:8]
    mine = {image["id"] for image in whole["images"]}
    whole["annotations"] = [a | {"category_id": ids[a["category_id"]]} for a in whole["annotations"] if a["image_id"] in mine]
    whole["categories"] = [c | {"id": ids[c["id"]]} for c in whole["categories"]]
    folder = tmp_path / "bccd"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    for image in whole["images"]:
        shutil.copy(source / "images" / image["file_name"], folder / "images")
    path = folder / "annotations" / "instances_test.json"
    path.write_text(json.dumps(whole))
    return read_coco(path, folder / "images"), path, folder / "images"


def cut_short(data, number):
    """The image's file ends early, though its header is whole."""
    path = data.path(number)
    path.write_bytes(path.read_bytes()[:3000])


def test_boxes_come_back_to_the_pictures_and_unreadable_ones_are_left_out(eight):
    """A network that knows the truth, in the order of its own classes, which the data numbers otherwise."""
    data, _, _ = eight
    assert data.classes != CLASSES
    ids = matched_ids(CLASSES, data)
    assert ids == (7, 2, 40)
    cut_short(data, 3)
    (data.path(6)).unlink()
    order = (0, 1, 2, 4, 5, 7)
    shuffled = replace(data, classes=CLASSES, labels=np.array([CLASSES.index(data.classes[label]) for label in data.labels]))
    net = tiny(kind=Knowing).knows(shuffled, order)
    ticks = []
    found = coco_results(net, data, Preprocess(320), category_ids=ids, batch=3, workers=2, tick=lambda: ticks.append(1))
    assert len(ticks) == 8
    assert list(found.unreadable) == [3, 6]
    assert found.unreadable[3] == f"image {data.images[3].id}, {data.images[3].name}: truncated, the JPEG data ends early"
    assert found.unreadable[6].startswith(f"image {data.images[6].id}, {data.images[6].name}: cannot be opened (")
    assert found.broken == []
    assert [r["image_id"] for r in found.rows] == sorted(r["image_id"] for r in found.rows)
    scores = coco_scores(data, found.rows, left_out=found.unreadable)
    assert scores.images == 6
    assert scores.numbers["AP"] > 0.97
    assert coco_scores(data, found.rows).numbers["AP"] < 0.9


def test_results_depend_on_neither_threads_nor_mode_and_leave_the_network_as_it_was(eight):
    data, _, _ = eight
    net = tiny()
    net.train()
    net.backbone.eval()  # frozen
    flags = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    first = coco_results(net, data, Preprocess(SIZE), batch=3, workers=3)
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert len(first.rows) == 800
    net.eval()
    assert coco_results(net, data, Preprocess(SIZE), batch=3, workers=1) == first
    halves = [coco_results(net, data, Preprocess(SIZE), batch=2, numbers=range(rank, 8, 2)) for rank in (0, 1)]
    together = sorted(halves[0].rows + halves[1].rows, key=lambda r: r["image_id"])
    assert [r["image_id"] for r in together] == [r["image_id"] for r in first.rows]
    assert [r["score"] for r in together] == pytest.approx([r["score"] for r in first.rows], abs=1e-5)


def test_a_network_that_is_not_finite_is_told_by_image(eight):
    data, _, _ = eight
    net = tiny()
    with torch.no_grad():
        net.head.boxes.output.bias[0] = float("nan")
    found = coco_results(net, data, Preprocess(SIZE))
    assert found.broken == list(range(8))
    assert found.rows == []


def test_networks_that_do_not_fit_are_refused(eight):
    data, _, _ = eight
    with pytest.raises(ValueError, match="each of the network's 2 classes, found 3"):
        coco_results(tiny(2), data, Preprocess(SIZE))
    with pytest.raises(ValueError, match="RGB images, found one of 1 channel"):
        coco_results(build_detector(ARCH, 3, 1), data, Preprocess(SIZE))


def test_classes_are_matched_by_name(eight):
    data, _, _ = eight
    with pytest.raises(ValueError, match="the network's Mast cell is not in the data; the data's Platelets is not in the network"):
        matched_ids(("RBC", "Mast cell", "WBC"), data)
    with pytest.raises(ValueError, match="the network's x, y are not in the data; rename"):
        matched_ids((*CLASSES, "x", "y"), data)
    with pytest.raises(ValueError, match="found the network's WBC more than once"):
        matched_ids((*CLASSES, "WBC"), data)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_detector(path, tiny(), DetectorCard(ARCH, Preprocess(SIZE), CLASSES, (1, 2, 3)))
    return path


def test_the_command_as_a_process(eight, model, tmp_path):
    """The exit status is 1 and the reasons are told where one image is missing and one is broken: six are left."""
    data, path, _ = eight
    cut_short(data, 3)
    data.path(6).unlink()
    out = tmp_path / "out"
    args = ("detect", "eval", path.parent.parent, "--weights", model, "--out", out, "--batch", 4, "--threads", 1)
    run = subprocess.run([sys.executable, "-m", "triscale", *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 1, run.stderr
    assert f"triscale detect eval: image {data.images[6].id}, {data.images[6].name}: no such file" in run.stderr
    assert f"triscale detect eval: image {data.images[3].id}, {data.images[3].name}: truncated" in run.stderr
    assert "1 of 7 images could not be read and are left out" in run.stderr
    assert "Traceback" not in run.stderr
    rows, scores = (json.loads((out / name).read_text()) for name in ("results.json", "scores.json"))
    assert sorted(p.name for p in out.iterdir()) == ["precision-recall.png", "results.json", "scores.json"]
    assert {r["image_id"] for r in rows} == {data.images[n].id for n in (0, 1, 2, 4, 5, 7)}
    assert {r["category_id"] for r in rows} <= {7, 2, 40}
    assert (scores["images"], scores["left_out"], scores["detections"]) == (6, 2, len(rows))
    again = coco_scores(data, rows, left_out=(3, 6))
    assert {name: scores[name] for name in NUMBERS} == {name: None if math.isnan(value) else value for name, value in again.numbers.items()}
    assert scores["APs"] is None
    assert [c["name"] for c in scores["classes"]] == list(data.classes)
    assert f"AP50     {again.numbers['AP50']:.3f}  at IoU 0.50" in run.stdout
    assert "6 images of instances_test.json" in run.stdout
    with Image.open(out / "precision-recall.png") as picture:
        assert picture.size == (1800, 675)


def test_the_command_takes_a_json_and_a_size(eight, model, tmp_path, capsys):
    data, path, images = eight
    moved = shutil.move(path, tmp_path / "mine.json")
    out = tmp_path / "out"
    assert detect_eval([str(a) for a in (moved, "--images", images, "--weights", model, "--out", out, "--size", 64)]) == 0
    text = capsys.readouterr()
    assert text.err == ""
    assert "8 images of mine.json" in text.out
    assert json.loads((out / "scores.json").read_text())["preprocess"]["size"] == 64
    net = tiny().eval()
    found = coco_results(net, data, Preprocess(64), category_ids=(7, 2, 40))
    assert json.loads((out / "results.json").read_text()) == found.rows


def test_what_cannot_be_evaluated_is_refused_and_leaves_nothing(eight, model, tmp_path):
    data, path, images = eight
    other, classifier, torn = tmp_path / "o.safetensors", tmp_path / "c.safetensors", tmp_path / "t.safetensors"
    save_detector(other, tiny(2), DetectorCard(ARCH, Preprocess(SIZE), ("RBC", "cell"), (1, 2)))
    backbone = ARCH.backbone
    save_model(classifier, ts.build(backbone, 3), ModelCard(backbone, Preprocess(SIZE), CLASSES))
    torn.write_bytes(model.read_bytes()[:1000])
    content = json.loads(path.read_text())
    (tmp_path / "no_boxes.json").write_text(json.dumps(content | {"annotations": []}))
    (tmp_path / "no_images.json").write_text(json.dumps(content | {"images": [], "annotations": []}))
    left = sorted(p.name for p in tmp_path.iterdir())
    good = path.parent.parent
    for data_, weights, more, told in (
        (tmp_path / "none", model, (), "none: no such folder or file"),
        (good, model, ("--split", "train"), "no train split"),
        (good, tmp_path / "none", (), "none: no such file"),
        (good, classifier, (), "a classifier; expected a detector's file"),
        (good, torn, (), "t.safetensors: not a checkpoint that can be read safely"),
        (good, other, (), "o.safetensors and .*the network's cell is not in the data; the data's WBC, Platelets are not in the network"),
        (tmp_path / "no_boxes.json", model, ("--images", images), "found none in its 8 images"),
        (tmp_path / "no_images.json", model, ("--images", images), "no images in it"),
        (good, model, ("--images", tmp_path / "none"), "--images .*no such folder"),
        (good, model, ("--size", 0), "whole number from 1"),
        (good, model, ("--batch", 0), "--batch"),
        (good, model, ("--device", "abacus"), "--device abacus"),
        (good, model, ("--out", images), "no empty folder"),
    ):
        where = () if "--out" in more else ("--out", tmp_path / "out")
        with pytest.raises(ValueError, match=told) as error:
            detect_eval([str(a) for a in (data_, "--weights", weights, *more, *where)])
        assert "\n" not in str(error.value)
    for number in range(8):
        cut_short(data, number)
    with pytest.raises(ValueError, match="none of its 8 images could be read"):
        detect_eval([str(a) for a in (good, "--weights", model, "--out", tmp_path / "out")])
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def made_up(count, absent=0):
    """Scores of `count` classes whose precision falls in a straight line to 0 at recalls from 0.2 to 1, and `absent` without boxes."""
    recall, ends = np.linspace(0, 1, 101), np.linspace(0.2, 1, count)
    lines = np.clip(1 - recall[:, None] / ends, 0, 1)
    precision = np.full((10, 101, count + absent), np.nan)
    precision[:, :, :count] = lines * np.linspace(1, 0.1, 10)[:, None, None]
    classes = [
        ClassScore(f"class {k}" if k else "wheelbarrow of metal", 5, precision[:, :, k].mean(), precision[0, :, k].mean(), 0.5) for k in range(count)
    ]
    classes += [ClassScore(f"absent {k}", 0, math.nan, math.nan, math.nan) for k in range(absent)]
    return Scores(dict.fromkeys(NUMBERS, 0.5), tuple(classes), precision, 10)


@pytest.mark.parametrize(("count", "absent", "lines"), [(1, 0, 1), (3, 1, 3), (6, 0, 6), (7, 0, 7), (80, 2, 7)])
def test_the_plot_names_its_lines_and_no_name_lies_on_another(count, absent, lines):
    figure = precision_recall_plot(made_up(count, absent))
    figure.draw_without_rendering()
    for axes in figure.axes:
        names = [t for t in axes.texts if t.get_text()]
        assert len(names) == lines
        spans = sorted((b.y0, b.y1) for b in (t.get_window_extent() for t in names))
        assert all(low[1] <= high[0] for low, high in pairwise(spans))
        assert spans[0][0] > 0
        assert max(t.get_window_extent().x1 for t in names) < (figure.bbox.x1 if axes is figure.axes[1] else figure.axes[1].bbox.x0)
        assert len(axes.collections) == (2 if count > curves.LINES else 0)
    (note,) = figure.texts
    assert (f"{absent} class" in note.get_text()) == bool(absent)
    best = f"class {count - 1}" if count > 1 else "wheelbarrow of me…"
    assert any(t.get_text().startswith(best) for t in figure.axes[0].texts)


def test_a_line_is_the_precision_to_the_last_recall_that_is_reached():
    line = precision_recall_plot(made_up(3)).axes[0].lines[0]
    assert line.get_xdata() == pytest.approx(np.linspace(0, 0.19, 20))
    assert line.get_ydata() == pytest.approx(1 - np.linspace(0, 0.19, 20) / 0.2)
    texts = [t.get_text() for t in precision_recall_plot(made_up(3)).axes[1].texts]
    assert sorted(texts)[-1] == f"wheelbarrow of me…  {np.clip(1 - np.linspace(0, 1, 101) / 0.2, 0, 1).mean() * 0.55:.3f}"


def test_the_plot_of_nothing():
    for scores, told in ((made_up(0, 2), "no boxes to find"), (made_up(2)._replace(precision=np.zeros((10, 101, 2))), "class 1  0.000")):
        figure = precision_recall_plot(scores)
        assert any(t.get_text() == told for t in figure.axes[0].texts)
