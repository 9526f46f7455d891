"""Training a detector: its batches, its recipe, what it begins with, and runs that are stopped, resumed and shared out."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import triscale as ts
from triscale.data.sources import DataError
from triscale.detect.batches import BoxBatches
from triscale.detect.coco import read_coco
from triscale.detect.evaluate import coco_results, coco_scores
from triscale.detect.events import Evaluated
from triscale.detect.folders import find_split, has_split
from triscale.detect.kept import read_found
from triscale.detect.model_file import DetectorCard, load_detector, save_detector
from triscale.detect.retinanet import build_detector
from triscale.detect.run import Boxes, box_batches, detector_run
from triscale.detect.start import Start, start_detector
from triscale.detector import BoxHead, DetectorArch, Pyramid, retinanet
from triscale.detector_recipe import DETECTOR_RECIPES, DetectorRecipe, detector_recipe
from triscale.model import build
from triscale.recipe import Preprocess, RecipeError
from triscale.train.events import ResumeError, Running, Saved
from triscale.train.loop import Note, Step
from triscale.train.optim import learning_rate, parameter_groups
from triscale.train.plan import Plan
from triscale.weights.load import load_trunk
from triscale.weights.model_file import ModelCard, ModelFileError, save_model

# Drop connect and eight channels: enough to learn by, small enough for a step of 20 ms.
NET = ts.Arch(
    ts.Stem(8),
    tuple(ts.Stage("mbconv", 3, s, 2, 0.25, "identity", c, 2) for s, c in ((2, 8), (2, 12), (2, 16), (2, 24))),
    ts.Head(32),
    64,
    0.0,
    name="small",
)
ARCH = DetectorArch(NET, Pyramid(channels=16), BoxHead(convs=1, channels=16), name="small")
PREPROCESS = Preprocess(64, 0, interpolation="bilinear")
RECIPE = replace(detector_recipe("finetune"), epochs=2, batch_size=4, ema=0.9)


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """A few of bccd's pictures, in COCO's layout."""
    root, source = tmp_path_factory.mktemp("boxes"), shared / "data" / "bccd"
    (root / "annotations").mkdir()
    (root / "images").symlink_to(source / "images")
    for split, count in (("train", 18), ("val", 4), ("test", 5)):
        body = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        body["images"] = body["images"][:count]
        ids = {image["id"] for image in body["images"]}
        body["annotations"] = [a for a in body["annotations"] if a["image_id"] in ids]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(body))
    return root


@pytest.fixture(scope="module")
def boxes(folder):
    return Boxes(*(read_coco(*find_split(folder, split)) for split in ("train", "val", "test")))


def batches(data, **options):
    given = {"seed": 3, "ratios": (0.8, 1.2), **options}
    return BoxBatches(data, PREPROCESS, given.pop("batch_size", 4), **given)


def equal(a, b):
    same = torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    return same and all(torch.equal(x, y) for s, t in zip(a[1], b[1], strict=True) for x, y in zip(s, t, strict=True))


def test_batches_are_the_same_with_any_workers_from_any_start_and_shared_out(boxes):
    whole = list(batches(boxes.train).epoch(1))
    assert [len(b[1]) for b in whole] == [4, 4, 4, 4]
    assert len(batches(boxes.train)) == 4
    seen = torch.cat([b[2] for b in whole])
    assert len(seen.unique()) == 16
    assert not torch.equal(seen, seen.sort().values)
    assert all(equal(a, b) for a, b in zip(whole[2:], batches(boxes.train, workers=3).epoch(1, 2), strict=True))
    shares = zip(*(batches(boxes.train, share=(rank, 2)).epoch(1) for rank in (0, 1)), strict=True)
    for joined, (a, b) in zip(whole, shares, strict=True):
        assert equal(joined, (torch.cat([a[0], b[0]]), a[1] + b[1], torch.cat([a[2], b[2]])))
    other = next(iter(batches(boxes.train).epoch(2)))
    assert not torch.equal(other[2], whole[0][2])


def test_views_of_an_epoch_are_the_views_of_their_images(boxes):
    """A mirrored view comes without mirroring where the recipe says so; the picture's centre stays where the boxes' centre is."""
    mirrored = dict(zip((b := next(iter(batches(boxes.train, batch_size=18).epoch(0))))[2].tolist(), b[1], strict=True))
    plain = dict(zip((b := next(iter(batches(boxes.train, batch_size=18, flip=False).epoch(0))))[2].tolist(), b[1], strict=True))
    changed = [i for i in plain if not torch.equal(plain[i].boxes, mirrored[i].boxes)]
    assert 4 <= len(changed) <= 14  # half of 18
    for i in plain:
        assert torch.equal(plain[i].labels, mirrored[i].labels)
        assert torch.equal(plain[i].boxes[:, 1::2], mirrored[i].boxes[:, 1::2])


def broken(data, numbers):
    """`data` whose images of these numbers aren't there."""
    return replace(data, images=tuple(e._replace(name=f"gone/{e.name}") if i in numbers else e for i, e in enumerate(data.images)))


def test_an_image_that_has_gone_is_replaced_by_the_next_and_told(boxes):
    source = batches(broken(boxes.train, {3}), broken_share=0.1)
    whole = next(iter(batches(boxes.train, batch_size=18).epoch(0)))[2].tolist()
    found = next(iter(batches(broken(boxes.train, {3}), batch_size=18, broken_share=0.1).epoch(0)))[2].tolist()
    place = whole.index(3)
    assert found == [*whole[:place], whole[(place + 1) % 18], *whole[place + 1 :]]
    assert all(len(b[1]) == 4 for b in source.epoch(0))
    list(source.epoch(1))
    assert list(source.left_out) == [3]
    assert "gone/" in source.left_out[3]
    with pytest.raises(DataError, match=r"2 of 18 images can't be read, more than 10 %; the last: .*gone/.*--broken-share"):
        list(batches(broken(boxes.train, {3, 5, 7}), broken_share=0.1).epoch(0))
    with pytest.raises(ValueError, match="can't be shared out evenly to 3 processes"):
        batches(boxes.train, share=(0, 3))


def test_coco_1x_has_mmdetections_rates():
    """lr 0.04 at batch 32; warm-up over 1000 steps from a tenth; a tenth after epochs 8 and 11. By hand."""
    recipe, per_epoch = DETECTOR_RECIPES["coco-1x"], 3664
    loop = recipe.loop(per_epoch)
    wanted = {0: 0.004, 500: 0.022, 999: 0.04 * (1 - 0.001 * 0.9), 1000: 0.04, 8 * per_epoch - 1: 0.04, 8 * per_epoch: 0.004, 11 * per_epoch: 0.0004}
    for step, rate in wanted.items():
        assert learning_rate(loop, step, per_epoch) == pytest.approx(rate, rel=1e-9)
    assert learning_rate(replace(recipe, batch_size=8).loop(per_epoch), 1000 * 4, per_epoch) == pytest.approx(0.01)
    assert (loop.nesterov, loop.momentum, loop.weight_decay, loop.epochs, recipe.empty_images) == (False, 0.9, 1e-4, 12, False)
    assert recipe.loop(10).warmup_epochs == 4  # of 12 epochs of 10 steps, not 100
    decayed, others = parameter_groups(build_detector(ARCH, 3), loop)
    net = build_detector(ARCH, 3)
    norms = sum(p.numel() for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase) for p in m.parameters())
    assert sum(p.numel() for p in others["params"]) == norms
    assert others["weight_decay"] == 0
    assert sum(p.numel() for p in decayed["params"]) == sum(p.numel() for p in net.parameters()) - norms


def test_recipes_say_what_is_wrong():
    for name, recipe in DETECTOR_RECIPES.items():
        assert DetectorRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe, name
    with pytest.raises(ValueError, match="coco-1x"):
        detector_recipe("coco1x")
    with pytest.raises(RecipeError, match="scale_from"):
        DetectorRecipe(scale_from=1.3)
    with pytest.raises(RecipeError, match="decay_at"):
        DetectorRecipe(decay_at=(0.0,))
    with pytest.raises(RecipeError, match="warmup_steps"):
        DetectorRecipe.from_dict({"format": 1, "warmup_step": 3})
    for bad in (
        {"optimizer": "rmsprop"},
        {"schedule": "staircase"},
        {"keep": "first"},
        {"sync_norms": "no"},
        {"epochs": "3"},
        {"lr": -1.0},
        {"scale_from": "0.8"},
    ):
        with pytest.raises(RecipeError, match=f"DetectorRecipe.{next(iter(bad))}: "):
            DetectorRecipe(**bad)


def test_the_partial_trunk_is_loaded_and_what_it_lacks_is_told(shared):
    path = next((shared / "weights" / "efficientnet_b0_partial").glob("*.safetensors"))
    arch, stored = retinanet("efficientnet_b0", 64), load_file(path)
    network = start_detector(arch, ("a", "b"), 3, RECIPE, Start(path))
    assert network.said == (f"fresh in the backbone, not from {path.name}: _blocks.15._project_conv.weight",)
    state = network.net.backbone.state_dict()
    assert torch.equal(state["stem.conv.weight"], stored["_conv_stem.weight"])
    last = [v for k, v in state.items() if k.endswith("running_var")][-1]
    assert torch.equal(last, stored["_blocks.15._bn2.running_var"])
    fresh = start_detector(arch, ("a", "b"), 3, RECIPE).net.state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in network.net.state_dict().items() if not k.startswith("backbone."))
    other = start_detector(arch, ("a", "b"), 3, replace(RECIPE, seed=1), Start(path))
    assert network.weights != other.weights != ""
    trunk = build(retinanet("efficientnet_b1", 64).trunk, 0)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    with pytest.raises(ValueError, match="no trunk of efficientnet_b1"):
        load_trunk(trunk, path, ts.arch("efficientnet_b1"))
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())


def test_a_detector_gives_the_parts_that_are_the_same(tmp_path):
    torch.manual_seed(5)
    net, path = build_detector(ARCH, 2), tmp_path / "d.safetensors"
    save_detector(path, net, DetectorCard(ARCH, PREPROCESS, ("a", "b"), (1, 2)))
    given = Start(path, detector=True)

    def taken(arch, classes):
        network = start_detector(arch, classes, 3, RECIPE, given)
        own, theirs = network.net.state_dict(), net.state_dict()
        return {k for k in own if k in theirs and own[k].shape == theirs[k].shape and torch.equal(own[k], theirs[k])}, network.said

    everything = set(net.state_dict())
    assert taken(ARCH, ("a", "b")) == (everything, ())
    same, said = taken(ARCH, ("a", "c"))
    assert everything - same == {"head.classes.output.weight"}
    assert "the classes' last convolution" in said[0]
    same, said = taken(replace(ARCH, head=BoxHead(convs=2, channels=16)), ("a", "b"))
    assert all(k in same for k in everything if not k.startswith("head."))
    assert said == (f"fresh, not from {path.name}: head",)
    with pytest.raises(ValueError, match="its backbone is small"):
        start_detector(replace(ARCH, backbone=retinanet("efficientnet_b0").backbone), ("a", "b"), 3, RECIPE, given)
    save_model(tmp_path / "c.safetensors", build(NET, 2), ModelCard(NET, PREPROCESS, ("a", "b")))
    with pytest.raises(ModelFileError, match="a classifier; expected a detector's file"):
        load_detector(tmp_path / "c.safetensors")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(ModelFileError, match="no triscale detector"):
        load_detector(tmp_path / "bare.safetensors")
    tensors.pop("pyramid.laterals.0.bias")
    save_file(tensors, path, metadata={"triscale-detector": DetectorCard(ARCH, PREPROCESS, ("a", "b"), (1, 2)).to_json()})
    with pytest.raises(ModelFileError, match=r"1 missing: pyramid\.laterals\.0\.bias"):
        load_detector(path)


def test_splits_are_found_in_the_layouts_that_people_have(tmp_path):
    def put(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}") if name.endswith(".json") else path.mkdir()

    put("coco/annotations/instances_train2017.json", "coco/annotations/instances_val2017.json", "coco/train2017", "coco/val2017")
    put(
        "plain/train.json",
        "plain/images",
        "robo/valid/_annotations.coco.json",
        "own/annotations/instances_test.json",
        "own/JPEGImages",
        "voc/Annotations",
    )
    for data, split, json_name, images in (
        ("coco", "train", "annotations/instances_train2017.json", "train2017"),
        ("coco", "val", "annotations/instances_val2017.json", "val2017"),
        ("plain", "train", "train.json", "images"),
        ("robo", "val", "valid/_annotations.coco.json", "valid"),
        ("own", "test", "annotations/instances_test.json", "JPEGImages"),
    ):
        root = tmp_path / data
        assert find_split(root, split) == (root / json_name, root / images)
        assert find_split(root / json_name, split) == (root / json_name, root / images)
        assert has_split(root, split)
        assert not has_split(root, "test" if split != "test" else "train")
    with pytest.raises(DataError, match=r"no train split; .*triscale detect convert"):
        find_split(tmp_path / "voc", "train")
    put("coco/annotations/instances_val2014.json")
    with pytest.raises(DataError, match=r"2 files for the val split \(instances_val2014.json, instances_val2017.json\)"):
        find_split(tmp_path / "coco", "val")
    with pytest.raises(DataError, match="no such folder or file"):
        find_split(tmp_path / "none", "val")


def run(out, boxes, recipe=RECIPE, **running):
    return list(detector_run(out, boxes, ARCH, PREPROCESS, recipe, "cells", Running(workers=2, **running)))


def test_a_run_judges_and_keeps_what_it_has_trained(tmp_path, boxes):
    events = run(tmp_path / "run", boxes)
    judged = [e for e in events if isinstance(e, Evaluated)]
    assert [(e.epoch, e.on) for e in judged] == [(1, "val"), (2, "val"), (2, "test")]
    notes = [e.text for e in events if isinstance(e, Note)]
    assert notes == ["a warm-up of 3 steps, a third of all, instead of 50"]
    net, card = load_detector(tmp_path / "run" / "model.safetensors")
    assert card.classes == ("RBC", "WBC", "Platelets")
    assert card.category_ids == (1, 2, 3)
    for on, data, scores in (("val", boxes.val, judged[1].scores), ("test", boxes.test, judged[2].scores)):
        again = coco_scores(data, coco_results(net, data, PREPROCESS).rows).numbers
        assert again == scores.numbers or np.allclose(list(again.values()), list(scores.numbers.values()), equal_nan=True)
        assert card.measured[f"{on}_AP50"] == scores.numbers["AP50"]
    written = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert written["AP"] == judged[2].scores.numbers["AP"]
    assert written["split"] == "test"
    steps = [e for e in events if isinstance(e, Step)]
    assert np.mean([e.loss for e in steps[-4:]]) < np.mean([e.loss for e in steps[:4]])
    with pytest.raises(ResumeError, match=r"recipe.lr: 0.001 then, 0.002 now"):
        run(tmp_path / "run", boxes, replace(RECIPE, lr=0.002), resume=True)


def test_unreadable_images_are_left_out_and_told(tmp_path, boxes):
    gone = Boxes(broken(boxes.train, {0}), broken(boxes.val, {1}), boxes.test)
    told = [e.text for e in run(tmp_path / "run", gone, replace(RECIPE, epochs=1), broken_share=0.1) if isinstance(e, Note)]
    assert sum("left out" in text and "gone/" in text for text in told) == 2


def test_the_best_epoch_is_kept_where_that_is_asked_for(tmp_path, boxes):
    recipe = replace(RECIPE, epochs=3, keep="best", lr=0.02, optimizer="sgd")
    events = run(tmp_path / "run", boxes, recipe)
    on_val = {e.epoch: e.scores.numbers["AP"] for e in events if isinstance(e, Evaluated) and e.on == "val"}
    best = max(on_val, key=on_val.get)
    assert [e.epoch for e in events if isinstance(e, Saved)][-1] == best
    card = load_detector(tmp_path / "run" / "model.safetensors")[1]
    assert card.provenance["epoch"] == best
    assert card.measured["val_AP"] == on_val[best]
    with pytest.raises(ValueError, match="--keep best: by AP on val"):
        run(tmp_path / "other", Boxes(boxes.train, None, boxes.test), recipe)


def test_a_small_data_set_changes_batch_rate_and_warm_up_and_says_so(tmp_path, boxes):
    """18 images instead of batches of 32: 0.04 x 18 / 32, one step an epoch, a warm-up of two of six steps instead of 1000."""
    recipe = replace(DETECTOR_RECIPES["coco-1x"], epochs=6, decay_at=(4.0,))
    events = run(tmp_path / "run", boxes, recipe)
    notes = [e.text for e in events if isinstance(e, Note)]
    assert notes == [
        "batches of 18 images, as there are no more, instead of 32; the learning rate is for 18",
        "a warm-up of 2 steps, a third of all, instead of 1000",
    ]
    peak = 0.04 * 18 / 32
    assert [e.lr for e in events if isinstance(e, Step)] == pytest.approx([0.1 * peak, 0.55 * peak, peak, peak, 0.1 * peak, 0.1 * peak])


def test_norms_that_are_frozen_keep_their_statistics(tmp_path, boxes):
    torch.manual_seed(3)
    net = build_detector(ARCH, 3)
    for name, buffer in net.backbone.named_buffers():
        buffer.fill_(0.3 if name.endswith("mean") else 1.7)
    save_detector(tmp_path / "d.safetensors", net, DetectorCard(ARCH, PREPROCESS, boxes.train.classes, (1, 2, 3)))
    recipe = replace(RECIPE, epochs=1, freeze_norms=True, ema=0.0)
    start = Start(tmp_path / "d.safetensors", detector=True)
    list(detector_run(tmp_path / "run", boxes, ARCH, PREPROCESS, recipe, "cells", Running(workers=1), start))
    before, after = net.state_dict(), load_detector(tmp_path / "run" / "model.safetensors")[0].state_dict()
    buffers = {f"backbone.{name}" for name, _ in net.backbone.named_buffers()}
    assert all(torch.equal(before[k], after[k]) for k in buffers)
    learnt = [k for k in before if k not in buffers and not torch.equal(before[k], after[k])]
    assert len(learnt) > 0.9 * (len(before) - len(buffers))


def test_images_without_boxes_are_trained_on_or_left_out(boxes):
    first = int(boxes.train.starts[1])
    empty = replace(boxes.train, crowd=np.r_[np.ones(first, bool), boxes.train.crowd[first:]])
    for wanted, count in ((True, 18), (False, 17)):
        source = box_batches(empty, PREPROCESS, replace(RECIPE, batch_size=18, empty_images=wanted), Running(workers=1))
        (batch,) = source.epoch(0)
        assert len(batch[2]) == count
        assert (0 in batch[2].tolist()) == wanted


def test_val_may_number_its_categories_otherwise(tmp_path, boxes):
    """Sent through with other ids in another order, the numbers are the same."""
    order = [2, 0, 1]
    inverse = np.argsort(order)
    turned = replace(
        boxes.val,
        classes=tuple(boxes.val.classes[i] for i in order),
        category_ids=(10, 20, 40),
        labels=inverse[boxes.val.labels],
    )
    recipe = replace(RECIPE, epochs=1)
    scores = [
        [e.scores for e in run(tmp_path / name, Boxes(boxes.train, val), recipe) if isinstance(e, Evaluated)]
        for name, val in (("as-it-is", boxes.val), ("turned", turned))
    ]
    assert len(scores[0]) == 2
    assert scores[0][0] is scores[0][1]  # val is judged once, though it is the last word too
    assert scores[0][1].numbers == pytest.approx(scores[1][1].numbers, nan_ok=True)
    assert {c.name: c.boxes for c in scores[0][1].classes} == {c.name: c.boxes for c in scores[1][1].classes}


def test_a_network_that_breaks_is_told(tmp_path, boxes):
    events = []
    for event in detector_run(tmp_path / "run", boxes, ARCH, PREPROCESS, replace(RECIPE, epochs=1), "cells", Running(workers=1)):
        if isinstance(event, Evaluated) and event.on == "val":
            next(event.net.backbone.buffers()).fill_(float("nan"))
        events.append(event)
    told = [e.text for e in events if isinstance(e, Note)]
    assert "test: outputs not finite for 5 of 5 images, where nothing counts as found" in told


def test_data_with_nothing_to_learn_or_to_find_is_refused(boxes):
    none = lambda data: replace(data, crowd=np.ones_like(data.crowd))  # noqa: E731
    with pytest.raises(DataError, match="train: expected boxes to learn, found none in its 18 images"):
        Boxes(none(boxes.train), boxes.val)
    with pytest.raises(DataError, match="val: expected boxes to be found, found none in its 4 images"):
        Boxes(boxes.train, none(boxes.val))


def test_one_image_whose_coarsest_map_is_one_place_is_refused_before_the_first_step(tmp_path, boxes):
    """7 images at batch 7 in parts of 3 leave one alone."""
    for batch_size, micro_batch in ((1, 0), (4, 1), (7, 3)):
        recipe, running = replace(RECIPE, batch_size=batch_size), Running(Plan(micro_batch=micro_batch), workers=1)
        with pytest.raises(ValueError, match="one image of 64 px at a time, whose map of stride 128 is a single place"):
            list(detector_run(tmp_path / "run", boxes, ARCH, PREPROCESS, recipe, "cells", running))
    assert not (tmp_path / "run").exists()


def test_data_without_a_split_to_judge_by_or_with_other_classes_is_refused(boxes):
    with pytest.raises(DataError, match="a val or a test split"):
        Boxes(boxes.train)
    with pytest.raises(DataError, match="val: other classes than those of train: RBC missing; cell new; give both"):
        Boxes(boxes.train, replace(boxes.val, classes=("cell", *boxes.val.classes[1:])))


def command(folder, out, *more):
    options = ("--recipe", "finetune", "--size", 64, "--epochs", 2, "--batch-size", 4, "--ema", 0.9, "--threads", 1, "--save-every", 1)
    (out.parent / "net.json").write_text(ARCH.to_json())
    words = [sys.executable, "-m", "triscale", "detect", "train", folder, "--detector", out.parent / "net.json", "--out", out, *options, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(child, status=0):
    out, errors = child.communicate(timeout=180)
    assert child.returncode == status, errors[-3000:]
    assert "Traceback" not in errors
    return out, errors


def test_stopped_in_mid_epoch_and_resumed_gives_the_same_bit_for_bit(tmp_path, folder, boxes):
    """SIGTERM to the real command, within its second epoch; the same weights and scores as a run that nobody stops."""
    child = command(folder, out := tmp_path / "cut")
    assert torch.get_num_threads() == 1
    list(detector_run(tmp_path / "whole", boxes, replace(ARCH, backbone=replace(NET, resolution=64)), PREPROCESS, RECIPE, "cells"))
    deadline = time.monotonic() + 120
    while not (list((out / "states").glob("state-0000000[5-7]*")) or child.poll() is not None) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGTERM)
    _, errors = finished(child, 3)
    step = int(errors.split("after step ")[1].split(";")[0])
    assert 4 < step < 8
    assert f"--out {out} --resume goes on" in errors
    _, errors = finished(command(folder, out, "--resume"))
    assert f"going on from step {step}" in errors
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    scores = [(tmp_path / name / "scores.json").read_text() for name in ("whole", "cut")]
    assert scores[0] == scores[1]


def test_two_processes_learn_what_one_learns(tmp_path, boxes):
    """Each process divides by its own positive anchors, and so does each part of a batch: the same gradients, with norms apart. The
    backbone's norms together see what one process sees. Drop connect, which differs by process, is off."""
    script = tmp_path / "two.py"
    script.write_text(
        "import pickle, sys\n"
        "from triscale.detect.run import detector_run\n"
        "from triscale.train.events import Running\n"
        "from triscale.train.plan import Plan\n"
        "for *job, micro_batch, start in pickle.loads(open(sys.argv[1], 'rb').read()):\n"
        "    for _ in detector_run(*job, 'cells', Running(Plan(micro_batch=micro_batch), workers=1), start): pass\n"
    )
    arch = replace(ARCH, backbone=NET.with_numerics(drop_path=0.0))
    apart = replace(RECIPE, epochs=1, batch_size=4, ema=0.0, sync_norms=False, optimizer="sgd", lr=0.01, clip=0.0)
    together = replace(apart, batch_size=16, sync_norms=True)
    torch.manual_seed(0)
    net = build_detector(arch, 3)
    torch.nn.init.normal_(net.head.classes.output.bias)  # many boxes, of all scores
    save_detector(tmp_path / "start", net, DetectorCard(arch, PREPROCESS, boxes.train.classes, (1, 2, 3)))
    given, start = Boxes(boxes.train, broken(boxes.val, {3}), boxes.test), Start(tmp_path / "start", detector=True)
    kinds = (("apart", boxes, apart, 2, None), ("together", boxes, together, 0, None), ("given", given, replace(apart, lr=1e-5), 2, start))
    jobs = [(tmp_path / name, data, arch, PREPROCESS, *rest) for name, data, *rest in kinds]
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path / "jobs")]
    child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    halves = Running(Plan(micro_batch=2), workers=1)
    steps = [e for e in detector_run(tmp_path / "halves", boxes, arch, PREPROCESS, apart, "cells", halves) if isinstance(e, Step)]
    list(detector_run(tmp_path / "whole", boxes, arch, PREPROCESS, together, "cells", Running(workers=1)))
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors[-3000:]
    a, b, c, d = (load_file(tmp_path / name / "model.safetensors") for name in ("halves", "apart", "whole", "together"))
    for key, value in a.items():
        if "running" not in key:
            assert torch.allclose(value, b[key], rtol=1e-4, atol=1e-6), key
    statistics = [key for key in c if key.startswith("backbone.") and "running" in key]
    assert len(statistics) > 20
    for key in statistics:  # of one step
        assert torch.allclose(c[key], d[key], rtol=1e-4, atol=1e-6), key
    assert not all(torch.allclose(c[key], d[key], rtol=1e-4) for key in c if key.startswith("head.") and key.endswith("running_var"))
    log = [json.loads(line) for line in (tmp_path / "apart" / "log.jsonl").read_text().splitlines()]
    epoch = next(line for line in log if line["kind"] == "epoch")
    assert epoch["loss"] == pytest.approx(np.mean([s.loss for s in steps]), rel=1e-5)
    judged_by_two_processes(tmp_path / "given", given, lambda: detector_run(*jobs[2][:5], "cells", replace(halves, resume=True), start))


def judged_by_two_processes(out, boxes, resumed):
    """Parts of val, whose last image is gone, and of test: one process finds in the same batches, bit for bit, what two have found."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum("left out" in line["text"] and "gone/" in line["text"] for line in log if line["kind"] == "note") == 1
    torch.set_num_threads(1)
    net, card = load_detector(out / "model.safetensors")
    found = coco_results(net, boxes.val, PREPROCESS, batch=2)
    assert list(found.unreadable) == [3]
    numbers = coco_scores(boxes.val, found.rows, left_out=[3]).numbers
    assert 0 < numbers["AR100"] == card.measured["val_AR100"]
    assert numbers["AP"] == next(line for line in log if line["kind"] == "epoch")["ap"]
    said = [(out / name).read_bytes() for name in ("scores.json", "found.npz")]
    list(resumed())
    assert [(out / name).read_bytes() for name in ("scores.json", "found.npz")] == said
    assert read_found(out).by_class[:, 2].min() > 50  # boxes of every class that these files are of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backbone", "efficientnet_b9"), "unknown network 'efficientnet_b9'"),
        (("--recipe", "coco"), "unknown recipe 'coco'"),
        (("--freeze-norms",), "--freeze-norms: there is nothing to keep in fresh weights"),
        (("--weights", "nowhere.pth"), "nowhere.pth"),
        (("--phi", "1", "--detector", "d.json"), "--detector: a whole detector"),
        (("--raw",), "--raw and --offline: of --weights"),
        (("--keep", "best", "--backbone", "efficientnet_b0", "--device", "abacus"), "--device abacus"),
        (("--memory", "1MB", "--backbone", "efficientnet_b0"), "--memory: a step of one image needs"),
        (("--workers", "0", "--backbone", "efficientnet_b0"), "--workers: expected 1 or more, found 0"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, options, message, monkeypatch):
    from triscale.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["detect", "train", str(folder), *options])
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(errors) == 1, errors
    assert message in errors[0]
    assert not list(tmp_path.rglob("*"))


def test_phi_scales_backbone_side_and_width_together():
    from triscale.commands.detect_training import Shape, _arch

    base, scaled = (_arch(Shape(backbone="efficientnet_b0", phi=phi), ts.arch("efficientnet_b0"), None) for phi in (0.0, 2.0))
    assert (base.backbone.resolution, base.pyramid.channels, base.head.channels) == (512, 256, 256)
    wanted = ts.scale(base.backbone, ts.compound(2.0))
    assert scaled.backbone == replace(wanted, resolution=672)  # 512 x 1.15^2 = 677, by the backbone's stride
    assert scaled.pyramid.channels == scaled.head.channels == 312  # 256 x 1.1^2 = 309.8, by eights
