"""The page of a detector's training: what it says and draws, what the run keeps for it, and that it comes from whatever is there."""

import base64
import io
import json
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import triscale as ts
from triscale.cli import main
from triscale.detect.coco import read_coco
from triscale.detect.drawing import class_colour
from triscale.detect.evaluate import coco_scores
from triscale.detect.kept import (
    BYTES,
    MIN_SCORE,
    RIGHT,
    SIDE,
    UNCOUNTED,
    VIEWS,
    WRONG,
    Drawn,
    judge,
    marked,
    nothing,
    read_found,
    read_seen,
    write_found,
    write_seen,
)
from triscale.detect.model_file import load_detector
from triscale.detect.run import write_scores
from triscale.detect.views import train_view
from triscale.detector import BoxHead, DetectorArch, Pyramid, detector_cost
from triscale.report import ReportError, render
from triscale.run_log import RunLog

NET = ts.Arch(ts.Stem(8), tuple(ts.Stage("mbconv", 3, 2, 2, 0.25, "identity", c, 1) for c in (8, 12, 16, 24)), ts.Head(32), 64, 0.0, name="small net")
ARCH = DetectorArch(NET, Pyramid(channels=16), BoxHead(convs=1, channels=16), name="small")
PARTS = ["", "How it went", "COCO's twelve numbers on the test split", "By class", "Precision and recall", "What the network sees"]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags that are open or were closed out of order, the visible text by section, pictures, boxes and labels of each section."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.sections, self.current = [], set(), {"": ""}, ""
        self.images, self.boxes, self.labels = {}, {}, {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.sections = {name: " ".join(text.split()) for name, text in self.sections.items()}

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.current = None

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        given = dict(attributes)
        if tag == "image" and given.get("href"):
            self.images.setdefault(self.current, []).append(given)
        if tag == "rect" and "figure" in self.open and not given["class"].startswith("seam"):
            self.boxes.setdefault(self.current, []).append((len(self.images[self.current]) - 1, given))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "span", "p"):
            self.sections[self.current] += " "

    def handle_data(self, data):
        if "text" in self.open and "figure" in self.open:
            self.labels.setdefault(self.current, []).append(data)
        if {"style", "svg"} & set(self.open):
            return
        if self.current is None:
            self.current = data.strip()
            self.sections[self.current] = ""
        self.sections[self.current] += data


def decoded(given):
    kind, data = given["href"].split(",")
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def splits(shared):
    root = shared / "data" / "bccd"
    return {name: read_coco(root / "annotations" / f"instances_{name}.json", root / "images", check_files=False) for name in ("train", "test")}


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """A run folder of the command itself, one epoch of a tiny detector on a few of bccd's pictures, and what it printed."""
    root, source = tmp_path_factory.mktemp("cells"), shared / "data" / "bccd"
    (root / "annotations").mkdir()
    (root / "images").symlink_to(source / "images")
    for split, count in (("train", 12), ("val", 3), ("test", 9)):
        body = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        ids = {image["id"] for image in body["images"][:count]}
        body["images"], body["annotations"] = body["images"][:count], [a for a in body["annotations"] if a["image_id"] in ids]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(body))
    (root / "net.json").write_text(ARCH.to_json())
    words = ["--detector", str(root / "net.json"), "--out", str(root / "run"), "--recipe", "finetune", "--epochs", "1", "--batch-size", "4"]
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        try:
            status = main(["detect", "train", str(root), *words, "--threads", "1", "--workers", "2"])
        except SystemExit as end:
            status = end.code
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
    assert not status
    return root, printed.getvalue()


def noisy(data, seed=0):
    """The true boxes as results: a tenth left out, the rest moved, some with another class or twice. By hand, not by a network."""
    rng, rows = np.random.default_rng(seed), []
    for number, image in enumerate(data.images):
        for box, label in zip(*data.targets(number), strict=True):
            if rng.random() < 0.1:
                continue
            x1, y1, x2, y2 = (float(v) for v in box + rng.normal(0, 0.08, 4) * np.tile(box[2:] - box[:2], 2))
            category = data.category_ids[label if rng.random() > 0.05 else rng.integers(3)]
            row = {"image_id": image.id, "category_id": category, "bbox": [x1, y1, max(x2 - x1, 1.0), max(y2 - y1, 1.0)]}
            rows += [{**row, "score": float(rng.random())} for _ in range(1 + (rng.random() < 0.1))]
    return rows


def with_crowds(data, share=0.1):
    return replace(data, crowd=np.random.default_rng(1).random(len(data.labels)) < share)


@pytest.fixture(scope="module")
def judged(splits, tmp_path_factory):
    """A finished run's folder whose boxes are made by hand on real pictures, crowds among the true ones."""
    folder, data, rows = tmp_path_factory.mktemp("judged"), with_crowds(splits["test"]), noisy(splits["test"])
    scores = coco_scores(data, rows)
    write_scores(folder / "scores.json", scores, "test")
    write_found(folder, data, rows, scores)
    log_of(folder, 2)
    return folder, data, rows, scores


def log_of(folder, epochs, planned=2, val=True):
    (folder / "arch.json").write_text(ARCH.to_json())
    (folder / "recipe.json").write_text(json.dumps({"format": 1, "epochs": planned, "lr": 0.125}))
    with RunLog(folder) as log:
        for step in range(1, max(4 * epochs, 2) + 1):
            log.step(epoch=(step - 1) // 4, step=step, steps=4 * planned, loss=2 / step, lr=0.125, images=8 * step, forward_s=0.4, backward_s=1.6)
            if step % 4 == 0:
                measured = {"ap": 0.05 * step, "ap50": 0.09 * step} if val else {}
                log.epoch(epoch=step // 4, step=step, loss=2 / step, seconds=30.0 * step, **measured)
    return folder


def test_boxes_are_judged_as_coco_judges_them(splits):
    """On real boxes with noise and crowds, box for box: pycocotools' own matches at IoU 0.5."""
    from pycocotools.cocoeval import COCOeval

    from triscale.detect.evaluate import _indexed

    data, rows = with_crowds(splits["test"], 0.2), noisy(splits["test"])
    boxes = [{**row, "id": i, "area": row["bbox"][2] * row["bbox"][3]} for i, row in enumerate(rows, 1)]
    truth = data.to_coco()
    for annotation, box in zip(truth["annotations"], data.boxes.tolist(), strict=True):  # cut at the edge, as they are drawn
        annotation["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    run = COCOeval(_indexed(truth), _indexed({**truth, "annotations": boxes}), "bbox")
    run.evaluate()
    expected = {}
    for found in run.evalImgs:
        if found and found["aRng"] == run.params.areaRng[0]:
            for name, ids, matches, ignored in (("dt", "dtIds", "dtMatches", "dtIgnore"), ("gt", "gtIds", "gtMatches", "gtIgnore")):
                skipped = found[ignored][0] if name == "dt" else found[ignored]
                for key, match, skip in zip(found[ids], found[matches][0], skipped, strict=True):
                    expected[name, key] = UNCOUNTED if skip else RIGHT if match else WRONG
    counts = np.zeros(3, int)
    for number, image in enumerate(data.images):
        mine = [row for row in boxes if row["image_id"] == image.id]
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in mine)]).reshape(-1, 4)
        labels = np.array([data.category_ids.index(row["category_id"]) for row in mine], np.int64)
        part = slice(data.starts[number], data.starts[number + 1])
        true = marked(data.boxes[part], data.labels[part], None, np.where(data.crowd[part], UNCOUNTED, WRONG))
        true, found = judge(true, marked(corners, labels, np.array([row["score"] for row in mine])))
        assert found.verdicts.tolist() == [expected["dt", row["id"]] for row in mine]
        assert true.verdicts.tolist() == [expected["gt", i] for i in data.ids[part].tolist()]
        counts += np.bincount(found.verdicts, minlength=3)
    assert (counts > 20).all()  # each of the three occurs


def test_a_box_is_right_once_and_only_for_its_class():
    """By hand: of two on one box the surer is right; IoU 0.5 is enough, less isn't; another class is false; half in a crowd isn't counted."""
    true = marked([[0, 0, 10, 10], [20, 0, 30, 10], [50, 0, 90, 40]], [0, 0, 1], None, [WRONG, WRONG, UNCOUNTED])
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 4.9], [20, 0, 30, 10], [45, 0, 55, 10], [44, 0, 54, 10]]
    found = marked(boxes, [0, 0, 0, 1, 1, 1], np.array([0.5, 0.9, 0.8, 0.7, 0.6, 0.4], np.float32))
    after, said = judge(true, found)
    assert said.verdicts.tolist() == [WRONG, RIGHT, WRONG, WRONG, UNCOUNTED, WRONG]
    assert after.verdicts.tolist() == [RIGHT, WRONG, UNCOUNTED]
    assert (after.errors(), said.errors()) == (1, 4)
    half = judge(true, marked([[20, 0, 30, 5]], [0], np.array([0.9])))
    assert half[1].verdicts.tolist() == [RIGHT]


def test_what_was_found_is_kept_worst_first(judged):
    folder, data, rows, scores = judged
    kept = read_found(folder)
    assert (folder / "found.npz").stat().st_size < 1_000_000
    assert np.abs(kept.precision - scores.precision).max() <= 0.5 / 65535 + 1e-12
    assert kept.errors.shape == (72, 2)
    assert kept.by_class[:, :2].sum() == (~data.crowd).sum()
    assert kept.by_class[:, 1:].sum(0).tolist() == kept.errors.sum(0).tolist()
    total = kept.errors.sum(1)
    errors = [p.true.errors() + p.found.errors() for p in kept.pictures]
    assert len(errors) == 8
    assert errors[:6] == sorted(total.tolist(), reverse=True)[:6]
    assert errors[6] >= errors[7]
    names = [data.name(i) for i in range(len(data))]
    for picture, count in zip(kept.pictures, errors, strict=True):
        number = names.index(picture.name)
        assert total[number] == count
        part = slice(data.starts[number], data.starts[number + 1])
        assert np.array_equal(np.sort(picture.true.boxes, 0), np.sort(data.boxes[part], 0))  # 640 pixels are kept as they are
        assert (picture.height, picture.width) == data.images[number][2:]
        wanted = sorted(row["score"] for row in rows if row["image_id"] == data.images[number].id and row["score"] > MIN_SCORE)
        assert np.allclose(np.sort(picture.found.scores), wanted)


def test_large_and_noisy_pictures_are_kept_smaller_with_their_boxes(splits, tmp_path):
    """Noise hardly packs. A white square stays within its box."""
    noise = np.random.default_rng(0).integers(0, 100, (900, 1200, 3), dtype=np.uint8)
    noise[300:600, 600:900] = 255
    view = Drawn("noise.png", noise, marked([[600, 300, 900, 600]], [2]), nothing())
    write_seen(tmp_path, (view for _ in range(100)), "cells", splits["train"], {"train": 205})
    seen = read_seen(tmp_path)
    assert len(seen.views) == VIEWS
    assert (tmp_path / "samples.npz").stat().st_size < VIEWS * BYTES + 10_000
    assert (seen.data, seen.images, seen.boxes.tolist()) == ("cells", {"train": 205}, splits["train"].counts().tolist())
    kept = seen.views[0]
    assert len(kept.file) <= BYTES
    assert kept.width <= SIDE
    pixels = np.asarray(Image.open(io.BytesIO(kept.file)))
    assert pixels.shape[:2] == (kept.height, kept.width)
    left, top, right, bottom = kept.true.boxes[0].round().astype(int)
    assert pixels[top + 2 : bottom - 2, left + 2 : right - 2].min() > 200
    assert pixels[top - 8 : bottom + 8, [left - 8, right + 8]].mean() < 100
    assert kept.true.labels.tolist() == [2]


def test_the_run_keeps_what_its_network_saw(trained, splits):
    root, _ = trained
    train = read_coco(root / "annotations" / "instances_train.json", root / "images")
    seen = read_seen(root / "run")
    assert (seen.data, seen.classes, seen.images) == (str(root), train.classes, {"train": 12, "val": 3, "test": 9})
    assert seen.boxes.tolist() == train.counts().tolist()
    names = [train.name(i) for i in range(len(train))]
    assert len({view.name for view in seen.views}) == VIEWS
    for kept in seen.views:
        view = train_view(train, names.index(kept.name), 64, seed=0, epoch=0)
        pixels = np.asarray(Image.open(io.BytesIO(kept.file)))
        high, wide = view.frame.content
        assert np.array_equal(pixels[:high, :wide], view.image[:high, :wide])
        assert np.array_equal(kept.true.boxes, view.boxes)
        assert np.array_equal(kept.true.labels, view.labels)
    assert sum(f.stat().st_size for f in (root / "run").glob("*.npz")) < 1_500_000


def test_the_command_ends_in_a_page_of_its_numbers(trained):
    root, printed = trained
    page = Page(root / "run" / "report.html")
    assert printed.strip().endswith(f"report: {root / 'run' / 'report.html'}")
    scores = json.loads((root / "run" / "scores.json").read_text())
    found, c = read_found(root / "run"), detector_cost(ARCH, 3)
    boxes = sum(row["boxes"] for row in scores["classes"])
    head = page.sections[""]
    assert f"small on {root.name}" in head
    assert f"Box AP {scores['AP']:.3f}, AP50 {scores['AP50']:.3f} for {boxes} boxes in 9 images of the test split." in head
    assert f"RetinaNet on small net at 64 px ({c.macs / 1e6:.3g}M MACs, {c.params / 1e3:.3g}k parameters) trained for 1 epoch, " in head
    titles = list(page.sections)
    assert titles[:7] == [*PARTS, "What it finds, the worst first"]
    assert titles[7].startswith("Where the time goes: ")
    assert titles[-2:] == ["Recipe, and what it was run on", "The detector"]
    numbers = page.sections["COCO's twelve numbers on the test split"]
    for name in ("AP", "APs", "AR100", "ARl"):
        said = "-" if scores[name] is None else f"{scores[name]:.3f}"
        assert re.search(rf"{name}: [^:]*? {said}( |$)", numbers), name
    learned = read_seen(root / "run").boxes.tolist()
    for k, row in enumerate(scores["classes"]):
        counts = " ".join(map(str, found.by_class[k].tolist()))
        assert (
            f"{row['name']} {learned[k]} {row['boxes']} {row['AP']:.3f} {row['AP50']:.3f} {row['AR100']:.3f} {counts} " in page.sections["By class"]
        )
    settings = page.sections["Recipe, and what it was run on"]
    for fact in ("epochs 1", "train images 12", "test images 9", f"boxes to learn {sum(learned)}", "rule nms iou 0.5"):
        assert fact in settings
    assert "lateral, stride 8" in page.sections["The detector"]
    assert load_detector(root / "run" / "model.safetensors")[1].measured["test_AP"] == scores["AP"]


def test_the_page_is_whole_and_needs_nothing_beside_it(trained, judged):
    for path in (trained[0] / "run" / "report.html", render(judged[0])):
        page = Page(path)
        assert set(page.open) <= {"html"}
        assert not {"script", "link", "iframe"} & page.tags
        assert not re.search(r"(src|href)=[\"'](?!data:|#)", page.source)
        text = " ".join(page.sections.values())
        assert "nan" not in text.lower().split()
        assert "None" not in text
        assert path.stat().st_size < 2_500_000


def test_the_views_are_shown_with_the_boxes_that_are_learned(trained):
    root, _ = trained
    page, seen = Page(root / "run" / "report.html"), read_seen(root / "run")
    images, boxes = page.images["What the network sees"], page.boxes["What the network sees"]
    assert len(images) == VIEWS
    for i, (given, view) in enumerate(zip(images, seen.views, strict=True)):
        kind, pixels = decoded(given)
        assert kind == "data:image/png;base64"
        assert pixels.shape == (64, 64, 3)
        drawn = {(float(b["x"]), float(b["y"]), b["stroke"]) for at, b in boxes if at == i}
        colours = ["#{:02x}{:02x}{:02x}".format(*class_colour(k)) for k in view.true.labels.tolist()]
        assert drawn == {(round(float(x), 1), round(float(y), 1), c) for (x, y, _, _), c in zip(view.true.boxes, colours, strict=True)}
    rbc = int((seen.views[0].true.labels == 0).sum())
    assert f"{rbc} RBC" in page.sections["What the network sees"]


def test_each_kind_of_box_has_its_line_and_false_ones_their_names(judged):
    folder, _, _, _ = judged
    page, found = Page(render(folder)), read_found(folder)
    title = "What it finds, the worst first"
    kinds = [b["class"] for _, b in page.boxes[title]]
    pictures = found.pictures
    assert kinds.count("missed") == sum(p.true.errors() for p in pictures) > 5
    assert kinds.count("false") == sum(p.found.errors() for p in pictures) > 5
    assert kinds.count("right") == sum(int((p.found.verdicts == RIGHT).sum()) for p in pictures)
    assert kinds.count("crowd") == sum(int((m.verdicts == UNCOUNTED).sum()) for p in pictures for m in (p.true, p.found)) > 0
    names = ("RBC", "WBC", "Platelets")
    wanted = {f"{k} {s:.2f}" for p in pictures for k, s, v in zip(p.found.labels, p.found.scores, p.found.verdicts, strict=True) if v == WRONG}
    wanted = {f"{names[int(label.split()[0])]} {label.split()[1]}" for label in wanted}
    assert set(page.labels[title]) <= wanted
    assert len(page.labels[title]) > 0.7 * kinds.count("false")  # none where it would cover another
    first = pictures[0]
    true = int((first.true.verdicts != UNCOUNTED).sum())
    assert f"{true} boxes: {first.true.errors()} missed, {first.found.errors()} false" in page.sections[title]
    faultless = int((found.errors.sum(1) == 0).sum())
    assert (
        f"Of the 72 images of the test split, the 6 with most missed and false boxes, then 2 drawn evenly from the others. {faultless} "
        in (page.sections[title])
    )
    hit, missed, false = found.by_class.sum(0).tolist()
    assert f"{hit} of {hit + missed} boxes are found and {false} detections are false." in page.sections["By class"]
    assert "false, with its class and score in a crowd, not counted" in page.sections[title]


def test_the_curves_end_on_their_values(judged):
    text = Page(render(judged[0])).source
    assert {"<!-- AP 0.400 -->", "<!-- AP50 0.720 -->", "<!-- 0.250 -->", "<!-- box AP and AP50 on the val split -->"} <= set(
        re.findall("<!-- .*? -->", text)
    )
    assert f"IoU 0.50: AP50 {judged[3].numbers['AP50']:.3f}" in text
    assert "forward 20 %, 400 ms" in text
    assert "backward 80 %, 1.6 s" in text


def test_many_classes_are_shown_from_both_ends_and_whole_in_the_details(splits, tmp_path):
    names = tuple(f"class {i}" for i in range(40))
    labels = np.random.default_rng(0).integers(0, 36, len(splits["test"].labels))
    data = replace(splits["test"], classes=names, category_ids=tuple(range(1, 41)), labels=labels)
    rows = [row for row in noisy(data) if row["image_id"] % 2]
    scores = coco_scores(data, rows)
    write_scores(tmp_path / "scores.json", scores, "test")
    write_found(tmp_path, data, rows, scores)
    page = Page(render(log_of(tmp_path, 2)))
    shown = page.sections["By class"].split("Of the 36 classes")[0]
    best = sorted(scores.classes[:36], key=lambda c: -c.AP)
    assert [c.name for c in (*best[:10], *best[-10:])] == re.findall(r"class \d+", shown)
    assert "All 40 classes" in page.sections["By class"]
    assert page.sections["By class"].count("class 39") == 1
    missed = {names[k] for p in read_found(tmp_path).pictures for k in p.true.labels[p.true.verdicts == WRONG]}
    plain = {label for label in page.labels["What it finds, the worst first"] if "." not in label}
    assert plain  # the hues no longer tell the classes apart
    assert plain <= missed


def test_while_it_runs_the_page_says_how_far_it_is(trained, tmp_path):
    run = trained[0] / "run"
    shutil.copy(run / "samples.npz", tmp_path)
    page = Page(render(log_of(tmp_path, 1, planned=5)))
    assert "Not finished, 1 of 5 epochs done. So far box AP 0.200, AP50 0.360 on the 3 images of the val split. RetinaNet on" in page.sections[""]
    assert f"small on {trained[0].name}" in page.sections[""]
    assert list(page.sections) == ["", "How it went", "What the network sees", "Where the time goes: 4 images/s", *list(page.sections)[-2:]]
    (tmp_path / "log.jsonl").unlink()
    assert (
        "Still in its first epoch of 5, step 2 of 20, loss 1.500. RetinaNet on small net at 64 px"
        in Page(render(log_of(tmp_path, 0, 5))).sections[""]
    )


def test_without_val_and_without_anything_but_its_log_there_is_a_page(judged, tmp_path):
    for name in ("scores.json", "found.npz"):
        shutil.copy(judged[0] / name, tmp_path)
    page = Page(render(log_of(tmp_path, 2, val=False)))
    assert "images of the test split. RetinaNet on" in page.sections[""]
    assert "on the val split" not in page.source
    (tmp_path / "found.npz").unlink()
    page = Page(render(tmp_path))
    assert list(page.sections)[1:4] == ["How it went", "COCO's twelve numbers on the test split", "By class"]
    assert "found missed false" not in page.sections["By class"]
    (tmp_path / "scores.json").unlink()
    assert "Training loss 0.250, boxes not judged yet. RetinaNet" in Page(render(tmp_path)).sections[""]
    (tmp_path / "log.jsonl").unlink()
    log_of(tmp_path, 2)
    for name in ("arch.json", "recipe.json"):
        (tmp_path / name).unlink()
    page = Page(render(tmp_path))
    assert "detector: training Box AP 0.400, AP50 0.720 on the val split. The detector trained for 2 epochs, 4 min 00 s" in page.sections[""]
    assert "The detector" not in page.sections


def test_names_are_text_wherever_they_stand(splits, tmp_path):
    names = ("<script>alert('cell')</script>", "a & b $x_1$", "<b>plate</b>")
    data = replace(splits["test"], classes=names)
    rows = noisy(data)
    scores = coco_scores(data, rows)
    write_scores(tmp_path / "scores.json", scores, "test")
    write_found(tmp_path, data, rows, scores)
    page = Page(render(log_of(tmp_path, 2)))
    assert not {"script", "b"} & page.tags
    assert "<script>alert('cell')</script>" in page.sections["By class"]
    assert "a & b $x_1$" in page.sections["What it finds, the worst first"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("samples.npz", "no zip", "can't be read"),
        ("found.npz", "no zip", "can't be read"),
        ("scores.json", "{", "no JSON"),
        ("scores.json", '{"AP": 1}', "no scores of a detector"),
        ("arch.json", '{"backbone": {}}', "no DetectorArch"),
        ("model.safetensors", "no model", "no triscale model"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(trained, tmp_path, name, text, told):
    log_of(tmp_path, 1)
    for file in ("samples.npz", "found.npz", "scores.json"):
        shutil.copy(trained[0] / "run" / file, tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ReportError, match=told) as error:
        render(tmp_path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_files_of_two_runs_are_not_put_together(judged, trained, tmp_path):
    log_of(tmp_path, 2)
    shutil.copy(judged[0] / "found.npz", tmp_path)
    shutil.copy(trained[0] / "run" / "scores.json", tmp_path)
    with pytest.raises(ReportError, match=r"scores\.json: found\.npz beside it is of other images or classes"):
        render(tmp_path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_draws_the_boxes_where_they_are(trained, tmp_path):
    """A white picture with one box, in a real browser: its line lies where the box's edge is, in the class's colour."""
    train = read_coco(trained[0] / "annotations" / "instances_train.json", trained[0] / "images")
    views = [Drawn("white", np.full((200, 400, 3), 255, np.uint8), marked([[100, 50, 300, 150]], [0]), nothing())]
    write_seen(tmp_path, views, "cells", train, {"train": 12})
    path, shot = render(log_of(tmp_path, 0)), tmp_path / "shot.png"
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"]
    subprocess.run(
        [*command, f"--screenshot={shot}", "--window-size=1000,1400", path.as_uri()], check=True, capture_output=True, timeout=60, cwd=ROOT
    )
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    lines = (np.abs(pixels - class_colour(0)).max(2) < 40).nonzero()
    rows, columns = np.bincount(lines[0], minlength=1400), np.bincount(lines[1], minlength=1000)
    level, upright = np.flatnonzero(rows > 100), np.flatnonzero(columns > 50)
    wide, high = upright.max() - upright.min(), level.max() - level.min()
    assert wide / high == pytest.approx(2, abs=0.05)  # 200 x 100 pixels of the picture
    assert 120 < wide < 300
