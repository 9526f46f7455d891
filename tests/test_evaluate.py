"""Evaluation: counts by hand, shards that add up, the class of an image by every rule, the command on real images."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import triscale as ts
from triscale.commands import TYRO, evaluation
from triscale.commands.confusion import confusion_plot
from triscale.data.datasets import DataError
from triscale.data.labels import devkit_ids, real_labels, truth
from triscale.evaluate import UNLABELLED, Row, Scores, gather, wilson
from triscale.imagenet import imagenet_classes
from triscale.weights.model_file import ModelCard, save_model

WNIDS = [c.wnid for c in imagenet_classes()]
IMAGENET = [c.name for c in imagenet_classes()]
TINY = ts.Arch(
    ts.Stem(8, 3, 2), (ts.Stage("mbconv", 3, 2, 1, 0.25, "identity", 8, 1),), ts.Head(16), 32, 0.0, ts.Numerics(norm_momentum=0.1), name="tiny"
)
NAN, INF = math.nan, math.inf

# Six classes. Best classes: 0, 2, 1, then a broken row, then 5 (label 0 is the worst of six), then one without a label.
LOGITS = torch.tensor(
    [
        [9.0, 1, 2, 3, 4, 5],
        [0.0, 5, 9, 1, 2, 3],
        [0.0, 9, 1, 2, 3, 4],
        [NAN, 0, 0, 0, 0, 9],
        [0.0, 1, 2, 3, 4, 5],
        [0.0, 0, 0, 9, 0, 0],
    ]
)
LABELS = [0, 1, 1, 5, 0, UNLABELLED]


def scored(numbers, logits=LOGITS, labels=LABELS):
    scores = Scores(logits.shape[1])
    numbers = list(numbers)
    scores.add(numbers, logits[numbers], [labels[n] for n in numbers])
    return scores


# ---- counts by hand


def test_counts_by_hand():
    scores = scored(range(6))
    assert (scores.images, scores.labelled, scores.broken) == (6, 5, 1)
    assert [scores.right(k) for k in (1, 2, 5)] == [2, 3, 3]
    assert scores.accuracy(1) == 2 / 5
    assert scores.accuracy(5) == 3 / 5
    assert scores.per_class() == [(1, 2), (1, 2), (0, 0), (0, 0), (0, 0), (0, 1)]
    assert scores.mean_per_class() == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert scores.pairs() == {(0, 0): 1, (1, 2): 1, (1, 1): 1, (0, 5): 1}
    wanted = torch.zeros(6, 6, dtype=torch.int64)
    wanted[0, 0] = wanted[1, 1] = wanted[1, 2] = wanted[0, 5] = 1
    assert torch.equal(scores.confusion(), wanted)
    assert scores.confused(5) == [(0, 5, 1), (1, 2, 1)]
    assert scores.rows[1].top == (2, 1, 5, 4, 3)
    assert scores.rows[1].probability == pytest.approx(math.exp(9) / sum(math.exp(v) for v in (0, 5, 9, 1, 2, 3)), rel=1e-6)


def test_outputs_that_are_not_finite_are_wrong_and_counted():
    scores = Scores(2)
    scores.add([0, 1, 2], torch.tensor([[NAN, 1.0], [INF, 0.0], [1.0, 0.0]]), [1, 0, 0])
    assert (scores.broken, scores.right(1), scores.right(5), scores.labelled) == (2, 1, 1, 3)
    assert int(scores.confusion().sum()) == 1


def test_ties_are_broken_as_topk_does():
    logits = torch.tensor([[1.0, 7, 7, 0, 7, 7, 7], [0.0] * 7])
    scores = Scores(7)
    scores.add([0, 1], logits, [1, 3])
    assert [scores.rows[i].top for i in (0, 1)] == [tuple(row) for row in logits.topk(5).indices.tolist()]
    assert scores.right(5) == logits.topk(5).indices.eq(torch.tensor([[1], [3]])).any(1).sum()
    # Whichever of five equal classes comes first: over all labels exactly one is right at top-1 and all five at top-5.
    for k, wanted in ((1, 1), (5, 5)):
        every = Scores(7)
        every.add(range(7), logits[:1].expand(7, 7), range(7))
        assert every.right(k) == wanted


def test_fewer_classes_than_five():
    scores = Scores(2)
    scores.add([0, 1], torch.tensor([[1.0, 0.0], [1.0, 0.0]]), [0, 1])
    assert (scores.right(1), scores.right(5)) == (1, 2)


def test_nothing_scored_has_no_accuracy():
    assert math.isnan(Scores(3).accuracy())
    assert math.isnan(Scores(3).mean_per_class())
    assert wilson(0, 0) == (0.0, 1.0)


def test_wrong_shapes_labels_and_k_are_refused():
    for numbers, logits, labels in (([0], LOGITS[:2], [0]), ([0], LOGITS[:1], [6]), ([0], LOGITS[:1], [-2]), ([0, 1], LOGITS[:2], [0])):
        with pytest.raises(ValueError, match="scores: expected"):
            Scores(6).add(numbers, logits, labels)
    with pytest.raises(ValueError, match="two labels"):
        scored([0]).add([0], LOGITS[:1], [1])
    with pytest.raises(ValueError, match="from 1 to 5"):
        scored([0]).right(6)
    with pytest.raises(ValueError, match="6 classes"):
        scored([0]).merge(Scores(7))


def test_wilson_interval():
    """Against the closed form's published example, 81 of 263 (Newcombe 1998, Stat. Med. 17:857, Table I)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1, abs=1e-12)


def test_real_accuracy_by_hand():
    scores = scored(range(6))
    assert scores.right_among({0: (3, 0), 1: (1,), 2: (), 3: (5,), 5: (3,), 99: (1,)}) == (2, 4)


# ---- shards


RANDOM = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
TRUE = [i % 6 for i in range(23)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 22), max_size=12), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_merging_is_free_of_order_and_counts_an_image_once(shards, random):
    parts = [scored(shard, RANDOM, TRUE) for shard in shards]
    merged = Scores(6)
    for part in parts:
        merged = merged.merge(part)
    random.shuffle(parts)
    again = Scores(6)
    for part in [*parts, *parts]:
        again = part.merge(again)
    whole = scored(sorted({n for shard in shards for n in shard}), RANDOM, TRUE)
    assert merged.rows == again.rows == whole.rows
    assert (merged.right(1), merged.right(5), merged.pairs()) == (whole.right(1), whole.right(5), whole.pairs())


def test_merging_is_free_of_order_where_two_shards_round_differently():
    one, other = Scores(3), Scores(3)
    one.add([0], torch.tensor([[1.0, 1.0 + 1e-6, 0.0]]), [0])
    other.add([0], torch.tensor([[1.0 + 1e-6, 1.0, 0.0]]), [0])
    assert one.merge(other).rows == other.merge(one).rows
    assert one.merge(other).images == 1


def test_gather_without_other_processes():
    assert gather("part") == ["part"]


# ---- the class of an image


@pytest.fixture
def folders(tmp_path):
    """folders("cat/1.png", ...): these images under tmp_path/data, which it returns as text."""

    def make(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(path)
        return str(tmp_path / "data")

    return make


def test_folders_named_as_classes(folders):
    found = truth(folders("dog/b.png", "cat/a.jpg", "dog/a.png", "dog/.hidden.png", ".git/x.png"), ("dog", "cat"))
    assert found.names == ("cat/a.jpg", "dog/a.png", "dog/b.png")
    assert found.labels == (1, 0, 0)
    assert [os.path.basename(f) for f in found.files] == ["a.jpg", "a.png", "b.png"]


def test_numbered_folders_are_their_numbers(folders):
    data = folders("0/a.png", "10/a.png", "2/a.png", "999/a.png")
    assert dict(zip(truth(data, IMAGENET).names, truth(data, IMAGENET).labels, strict=True)) == {
        "0/a.png": 0,
        "10/a.png": 10,
        "2/a.png": 2,
        "999/a.png": 999,
    }


def test_numbered_folders_of_a_model_trained_on_them_are_its_class_names(folders):
    """train numbers its classes in the order of text: "10" before "2"."""
    assert truth(folders("0/a.png", "10/a.png", "2/a.png"), ("0", "10", "2")).labels == (0, 1, 2)


def test_wordnet_folders(folders):
    data = folders(f"{WNIDS[5]}/a.JPEG", f"{WNIDS[999]}/a.JPEG")
    assert truth(data, IMAGENET).labels == (5, 999)
    with pytest.raises(DataError, match=f"{WNIDS[5]}.*--labels"):
        truth(data, ("cat", "dog"))
    assert truth(data, (WNIDS[999], WNIDS[5])).labels == (1, 0)


@pytest.mark.parametrize(("names", "first"), [(("cat/a.png", "zebra/a.png"), "zebra"), (("3/a.png", "7/a.png"), "7"), (("x/a.png", "y/a.png"), "x")])
def test_the_first_folder_without_a_class_is_named(folders, names, first):
    with pytest.raises(DataError, match=rf"/{first}: expected .*--labels FILE.csv"):
        truth(folders(*names), ("cat", "dog", "cow", "hen"))


def test_names_do_not_steer_the_terminal(folders):
    with pytest.raises(DataError) as error:
        truth(folders("\x1b[31m/a.png"), ("\x1b[32mcat",))
    assert "\x1b" not in str(error.value)


def test_a_list_of_folders(folders, tmp_path):
    data = folders("x/a.png", "y/a.png")
    table = tmp_path / "list.csv"
    table.write_text("﻿wnid,index,name\nx,3,three\ny,1,one\nz,77,not here\n", encoding="utf-8")
    found = truth(data, ("a", "b", "x", "y"), table)
    assert found.labels == (3, 1)  # given by name, it goes before the class names
    assert found.how == "list.csv"
    (tmp_path / "data" / "labels.csv").write_bytes(table.read_bytes())
    assert truth(data, ("a", "b", "c", "d")).labels == (3, 1)
    assert truth(data, ("a", "b", "x", "y")).labels == (2, 3)  # found by itself, it goes after them
    with pytest.raises(DataError, match="x: expected a class of the model, 0 to 2, found '3'"):
        truth(data, ("a", "b", "c"))
    table.write_text("wnid,index\nx,0\n")
    with pytest.raises(DataError, match=r"y: not in .*list.csv"):
        truth(data, ("a", "b"), table)


def test_a_list_of_files(folders, tmp_path):
    data = folders("a.png", "x/b.png", "x/c.png")
    table = tmp_path / "data" / "labels.csv"
    table.write_text("file,label\nx/b.png,10\na.png,2\n./a.png,2\n")
    found = truth(data, ("0", "10", "2"))
    assert (found.names, found.labels, found.passed_over) == (("a.png", "x/b.png"), (2, 1), 1)
    assert truth(data, [f"class {i}" for i in range(11)]).labels == (2, 10)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,label\n../a.png,0\n", "inside"),
        ("file,label\n/etc/a.png,0\n", "inside"),
        ("file,label\n,0\n", "inside"),
        ("file,label\na.png,0\na.png,1\n", "two labels"),
        ("file,label\na.png,lion\n", "'lion'"),
        ("file,label\na.png,-1\n", "'-1'"),
        ("file,label\na.png\n", "found ''"),
        ("file,class\na.png,0\n", "header"),
        ("", "header"),
        ("file,label\n", "header"),
        ("wnid,index\nx,0\n", "no folders"),
        (b"\xff\xfe\x00", "CSV"),
        ("file,label\n" + "9" * 200_000 + ",0\n", "CSV"),
    ],
)
def test_a_labels_file_that_is_none(folders, tmp_path, text, told):
    data, table = folders("a.png"), tmp_path / "l.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=told):
        truth(data, ("cat", "dog"), table)


def test_the_evaluation_folder_inside(folders, tmp_path):
    data = folders("train/cat/1.png", "val/cat/2.png", "test/cat/3.png")
    assert truth(data, ("cat", "dog")).files == [str(tmp_path / "data/val/cat/2.png")]


def test_class_folders_go_before_a_test_folder_without_train(folders):
    assert truth(folders("cat/1.png", "dog/1.png", "test/cat/3.png"), ("cat", "dog")).names == ("cat/1.png", "dog/1.png")


def test_images_alone_have_no_labels(folders):
    found = truth(folders("ILSVRC2012_test_00000002.JPEG", "ILSVRC2012_test_00000001.JPEG"), IMAGENET)
    assert (found.labels, found.names) == (None, ("ILSVRC2012_test_00000001.JPEG", "ILSVRC2012_test_00000002.JPEG"))


@pytest.mark.parametrize(("data", "told"), [("cifar10", "for train"), ("nowhere", "no such folder"), ("file.txt", "not a folder")])
def test_what_is_no_folder(tmp_path, monkeypatch, data, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(DataError, match=told):
        truth(data, ("cat",))


def test_real_labels_by_the_number_in_the_name(tmp_path):
    path = tmp_path / "real.json"
    path.write_text("[[65], [], [795, 970]]")
    names = ["n01/ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    assert real_labels(path, names, 1000) == [(795, 970), (65,), ()]
    for name in ("a.png", "ILSVRC2012_val_00000004.JPEG", "ILSVRC2012_val_00000000.JPEG"):
        with pytest.raises(DataError, match=name):
            real_labels(path, [name], 1000)
    with pytest.raises(DataError, match="the model has 10"):
        real_labels(path, names, 10)
    for text in ("{}", "[[1000]]", "[[true]]", "[1]", "no", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DataError, match=r"real.json"):
            real_labels(path, names, 1000)


def test_the_test_servers_numbers(tmp_path):
    assert devkit_ids(None)[:2] == (1, 2)
    path = tmp_path / "map_clsloc.txt"
    order = WNIDS[::-1]
    path.write_text("\n".join(order))
    assert devkit_ids(path)[:2] == (1000, 999)
    path.write_text("".join(f"{w} {i} some_name\n" for i, w in enumerate(order, 1)))
    assert devkit_ids(path) == tuple(range(1000, 0, -1))
    path.write_text("\n".join(f"{w} tench, Tinca tinca" for w in WNIDS))
    with pytest.raises(DataError, match="sorted order"):
        devkit_ids(path)
    for text in ("\n".join(order[1:]), "\n".join(["n00000001", *order[1:]]), "".join(f"{w} 1\n" for w in order)):
        path.write_text(text)
        with pytest.raises(DataError, match="1000 WordNet ids"):
            devkit_ids(path)
    with pytest.raises(DataError, match="the model has 10"):
        devkit_ids(None, 10)


# ---- the command


def command(*args):
    """The command as the command line calls it; its exit status."""
    return tyro.cli(evaluation.eval, args=[str(a) for a in args], prog="triscale eval", config=TYRO)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of three classes with random weights, and 13 images of noise in folders of these names: (model, data)."""
    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    classes = ("cat", "dog", "$x_{hen")
    net = ts.build(TINY, 3)
    with torch.no_grad():
        net.classifier.weight.normal_(std=3)
    save_model(root / "m.safetensors", net, ModelCard(TINY, ts.Preprocess(32), classes))
    rng = np.random.default_rng(0)
    for i in range(13):
        path = root / "photos" / classes[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 80 + 13 * i, (40, 40, 3), dtype=np.uint8)).save(path)
    return root / "m.safetensors", root / "photos"


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_of_an_evaluation_agree(small, tmp_path, monkeypatch, capsys):
    model, data = small
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command(data, "--weights", model, "--batch", 4, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    out = tmp_path / "runs" / "eval-photos"
    results = json.loads((out / "results.json").read_text())
    assert printed == results
    assert {p.name for p in out.iterdir()} == {"results.json", "predictions.csv", "per_class.csv", "confusion.csv", "confusion.png"}
    assert (results["format"], results["images"], results["weights"], results["data"]) == (1, 13, "m.safetensors", "photos")
    predictions = rows(out / "predictions.csv")
    assert [r["file"] for r in predictions] == sorted(f"{p.parent.name}/{p.name}" for p in data.rglob("*.png"))
    assert all(r["file"].split("/")[0] == r["label"] for r in predictions)
    right = sum(r["label"] == r["top1"] for r in predictions)
    assert results["top1_right"] == right
    assert results["top1"] == right / 13
    assert results["top5"] == 1
    assert sum(int(r["right"]) for r in rows(out / "per_class.csv")) == right
    assert sum(int(r["images"]) for r in rows(out / "per_class.csv")) == 13
    confusion = rows(out / "confusion.csv")
    assert sum(int(r["count"]) for r in confusion) == 13
    assert sum(int(r["count"]) for r in confusion if r["true"] == r["predicted"]) == right
    with Image.open(out / "confusion.png") as image:
        assert min(image.size) > 300
    assert str(tmp_path) not in (out / "results.json").read_text()


def test_the_summary_and_the_next_folder(small, tmp_path, monkeypatch, capsys):
    model, data = small
    monkeypatch.chdir(tmp_path)
    for name in ("eval-photos", "eval-photos-2"):
        assert command(data, "--weights", model) == 0
        text = capsys.readouterr()
        assert "13 images of photos through tiny at 32 px" in text.out
        for word in ("top-1", "top-5", "mean per class", "95 % interval", "images/s", "most confused", "worst classes", f"runs/{name}"):
            assert word in text.out
        assert text.err == ""  # no terminal, no bar
        assert (tmp_path / "runs" / name / "results.json").is_file()
    with pytest.raises(ValueError, match="exists already"):
        command(data, "--weights", model, "--out", tmp_path / "runs")


def test_bad_images_are_named_and_not_counted(small, tmp_path, capsys):
    model, data = small
    copy = tmp_path / "photos"
    for path in data.rglob("*.png"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    (copy / "cat" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    (copy / "dog" / "zz.jpg").write_bytes(b"")
    assert command(copy, "--weights", model, "--out", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert "00.png" in errors
    assert "zz.jpg" in errors
    assert "2 of 14 images could not be read and are left out" in errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["images"], results["labelled"], results["left_out"]) == (12, 12, 2)
    assert results["left_out_files"] == ["cat/00.png", "dog/zz.jpg"]
    for path in copy.rglob("*.*"):
        path.write_bytes(b"none")
    with pytest.raises(ValueError, match="none of its 14 images"):
        command(copy, "--weights", model, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_broken_weights_are_told(small, tmp_path, capsys):
    _, data = small
    net = ts.build(TINY, 3)
    with torch.no_grad():
        net.classifier.bias[1] = NAN
    save_model(tmp_path / "m.safetensors", net, ModelCard(TINY, ts.Preprocess(32), ("cat", "dog", "$x_{hen")))
    assert command(data, "--weights", tmp_path / "m.safetensors", "--out", tmp_path / "out") == 1
    text = capsys.readouterr()
    assert "not finite for 13 of 13 images" in text.err
    assert "0 of 13" in text.out


def test_what_cannot_be_evaluated_is_refused_and_leaves_nothing(small, tmp_path, folders):
    model, data = small
    flat = folders("a.png")
    options = ("--weights", model, "--out", tmp_path / "out")
    for args, told in (
        ((flat, *options), "no labels"),
        ((data, *options, "--submission", tmp_path / "s.txt"), "the model has 3"),
        ((data, *options, "--real", tmp_path / "r.json"), "the model has 3"),
        ((data, *options, "--batch", 0), "--batch"),
        ((data, *options, "--device", "abacus"), "--device abacus"),
        (("digits", *options), "for train"),
    ):
        with pytest.raises(ValueError, match=told):
            command(*args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A tiny network of 1000 classes with random weights, and four images named as ImageNet's."""
    root = tmp_path_factory.mktemp("thousand")
    torch.manual_seed(1)
    save_model(root / "m.safetensors", ts.build(TINY, 1000), ModelCard(TINY, ts.Preprocess(32), tuple(IMAGENET)))
    rng = np.random.default_rng(1)
    for split in ("test", "val"):
        (root / split).mkdir()
        for i in (1, 2, 3, 4):
            Image.fromarray(rng.integers(0, 60 * i, (32, 32, 3), dtype=np.uint8)).save(root / split / f"ILSVRC2012_{split}_{i:08d}.JPEG")
    (root / "test" / "ILSVRC2012_test_00000003.JPEG").write_bytes(b"broken")
    return root / "m.safetensors", root


def test_a_submission_has_a_line_for_every_image(thousand, tmp_path, capsys):
    model, root = thousand
    (tmp_path / "kit.txt").write_text("\n".join(WNIDS[::-1]))
    common = (root / "test", "--weights", model)
    assert command(*common, "--out", tmp_path / "a", "--submission", tmp_path / "plain.txt") == 1
    errors = capsys.readouterr().err
    assert errors.count("--devkit FILE") == 1
    assert "has 4 lines; the server expects 100000" in errors
    assert command(*common, "--out", tmp_path / "b", "--submission", tmp_path / "kit-order.txt", "--devkit", tmp_path / "kit.txt") == 1
    assert "--devkit" not in capsys.readouterr().err
    plain, kit = ([list(map(int, line.split())) for line in (tmp_path / n).read_text().splitlines()] for n in ("plain.txt", "kit-order.txt"))
    found = {r["file"]: [IMAGENET.index(r[f"top{k}"]) for k in range(1, 6)] for r in rows(tmp_path / "a" / "predictions.csv")}
    assert len(plain) == len(kit) == 4
    assert plain[2] == kit[2] == [1, 2, 3, 4, 5]
    for i in (0, 1, 3):
        top = found[f"ILSVRC2012_test_{i + 1:08d}.JPEG"]
        assert plain[i] == [c + 1 for c in top]
        assert kit[i] == [1000 - c for c in top]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"results.json", "predictions.csv"}


def test_real_accuracy_of_the_command(thousand, tmp_path, capsys):
    model, root = thousand
    assert command(root / "val", "--weights", model, "--out", tmp_path / "a", "--submission", tmp_path / "s.txt") == 0
    best = [int(line.split()[0]) - 1 for line in (tmp_path / "s.txt").read_text().splitlines()]
    (tmp_path / "real.json").write_text(json.dumps([[best[0], 7], [], [(best[2] + 1) % 1000], [best[3]]]))
    capsys.readouterr()
    assert command(root / "val", "--weights", model, "--out", tmp_path / "b", "--real", tmp_path / "real.json") == 0
    assert "ReaL top-1: 66.67 %, 2 of 3; 1 images without a ReaL label" in capsys.readouterr().out


# ---- several processes


def test_two_processes_count_what_one_counts(small, tmp_path):
    """13 images on two processes over gloo: 7 and 6. All counts and predictions equal those of one process."""
    model, data = small
    code = "import sys, tyro; from triscale.commands import TYRO, evaluation; sys.exit(tyro.cli(evaluation.eval, args=sys.argv[1:], config=TYRO))"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])

    def start(rank, world, out):
        where = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        line = [sys.executable, "-c", code, str(data), "--weights", str(model), "--out", str(tmp_path / out), "--batch", "2", "--threads", "1"]
        return subprocess.Popen(line, cwd=ROOT, env={**os.environ, **where}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    pair = [start(0, 2, "two"), start(1, 2, "two")]
    outputs = [p.communicate(timeout=60) for p in pair]
    assert [p.returncode for p in pair] == [0, 0], outputs
    assert "13 images" in outputs[0][0]
    assert outputs[1] == ("", "")
    assert command(data, "--weights", model, "--out", tmp_path / "one", "--batch", 2) == 0
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    same = {"seconds", "images_per_second", "processes", "speed"}
    assert {k: v for k, v in one.items() if k not in same} == {k: v for k, v in two.items() if k not in same}
    first, second = (rows(tmp_path / n / "predictions.csv") for n in ("one", "two"))
    assert [{**r, "probability": round(float(r["probability"]), 4)} for r in first] == [
        {**r, "probability": round(float(r["probability"]), 4)} for r in second
    ]
    assert (tmp_path / "one" / "confusion.csv").read_bytes() == (tmp_path / "two" / "confusion.csv").read_bytes()


# ---- the plot


def texts(figure):
    return [t.get_text() for axes in figure.axes for t in [*axes.texts, *axes.get_yticklabels()]]


def test_the_plot_of_few_classes_has_every_count():
    scores = Scores(6)
    scores.rows = {i: Row(label, (said,), 1.0) for i, (label, said) in enumerate([(0, 0)] * 12 + [(0, 4)] * 3 + [(4, 4)])}
    figure = confusion_plot(scores, ("cat", "b", "c", "d", "x" * 80, "e"))
    assert sorted(t.get_text() for t in figure.axes[0].texts) == ["1", "12", "3"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["cat", "x" * 25 + "…"]


def test_the_plot_of_many_classes_has_the_most_confused_pairs():
    scores = Scores(1000)
    scores.rows = {i: Row(i % 900, ((i % 900 + (i < 4)) % 1000, 0), 1.0) for i in range(1800)}
    scores.rows |= {9000 + i: Row(264, (474,), 1.0) for i in range(5)}
    shown = texts(confusion_plot(scores, IMAGENET))
    assert "Cardigan → cardigan" in shown
    assert " 5" in shown
    assert "tench → goldfish" in shown


# ---- real weights on real images


def test_imagenet_samples_with_real_weights_against_timm(shared, tmp_path):
    """V2-B0 on 256 ImageNet images, one of each of 256 classes: right and wrong as timm has it on the same weights."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file
    from timm.data import create_transform

    weights, data = shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors", shared / "data/imagenet-samples"
    assert command(data, "--weights", weights, "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["images"] == results["labelled"] == 256
    assert results["top1"] >= 0.90
    assert results["top5"] >= 0.97
    assert results["labels"] == "labels.csv"
    assert results["speed"]["computed"] != ["eager"]  # what was measured to be fastest, for all of them
    assert len(results["speed"]["computed"]) == 1

    peer = timm.create_model("tf_efficientnetv2_b0", pretrained=False).eval()
    peer.load_state_dict(load_file(weights))
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875)
    index = {row["wnid"]: int(row["index"]) for row in rows(data / "labels.csv")}
    ours = {r["file"]: r["label"] == r["top1"] for r in rows(tmp_path / "out" / "predictions.csv")}
    agreed = right = 0
    with torch.no_grad():
        for file, good in ours.items():
            said = int(peer(transform(Image.open(data / file).convert("RGB"))[None]).argmax())
            right += said == index[file.split("/")[0]]
            agreed += (said == index[file.split("/")[0]]) == good
    counts = f"top-1 {results['top1_right']}, top-5 {results['top5_right']}, timm {right}, agreed {agreed} of 256"
    print(f"{counts}; {results['images_per_second']:.1f} images/s")
    assert agreed >= 255
