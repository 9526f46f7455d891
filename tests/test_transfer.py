"""From a checkpoint to a new classifier: what is loaded, what is trained, what is kept; and training from files that are streamed."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import triscale as ts
from triscale.blocks import BatchNorm
from triscale.classify import Evaluated, Running, Start, Stopped, prepare, preprocess_for, run_folder, start_from, train_classifier
from triscale.commands.training import Train, _beginning
from triscale.data.datasets import DataError, ImageData, Splits, find
from triscale.recipe import Recipe
from triscale.recipes import FINETUNE, RECIPES
from triscale.reproduce.transfer import _told
from triscale.train.loop import Note, Step
from triscale.weights.load import WeightsError, WeightsWarning
from triscale.weights.model_file import load_model
from triscale.weights.open import trunk_of

NET = ts.Arch(
    ts.Stem(8),
    (ts.Stage("mbconv", 3, 1, 1, 0.25, "identity", 8, 1), ts.Stage("mbconv", 5, 2, 4, 0.25, "identity", 16, 2)),
    ts.Head(32),
    24,
    0.0,
    ts.Numerics(drop_path=0.3),
    name="small",
)
RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05, weight_decay=1e-3, ema=0.9)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def checkpoint(classes=7):
    """A network whose every value differs from a fresh one's."""
    torch.manual_seed(99)
    net = ts.build(NET, classes)
    for norm in (m for m in net.modules() if isinstance(m, BatchNorm)):
        torch.nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return net.state_dict()


def splits(classes=3, images=48):
    g = torch.Generator().manual_seed(0)

    def part(count, name):
        labels = torch.arange(count) % classes
        pixels = torch.randint(0, 120, (count, 3, 24, 24), dtype=torch.uint8, generator=g)
        pixels += (labels.view(-1, 1, 1, 1) * torch.tensor([40, 20, 10]).view(1, 3, 1, 1)).to(torch.uint8)
        return ImageData(pixels, labels, tuple(f"{name}/{i:03d}.png" for i in range(count)))

    return Splits(part(images, "train"), part(21, "val"), tuple("abcdefgh"[:classes]), "val")


def test_the_body_is_the_checkpoints_and_the_classifier_is_new():
    state = checkpoint()
    net = start_from(NET, tuple("abc"), 3, RECIPE, Start(state)).net
    fresh = start_from(NET, tuple("abc"), 3, RECIPE).net
    for name, value in net.state_dict().items():
        want = fresh.state_dict()[name] if name.startswith("classifier") else state[name]
        assert torch.equal(value, want), name


def test_the_classifier_stays_where_the_classes_are_the_same_and_only_there():
    state = checkpoint(3)
    same = start_from(NET, tuple("abc"), 3, RECIPE, Start(state, tuple("abc"))).net
    other = start_from(NET, tuple("abd"), 3, RECIPE, Start(state, tuple("abc"))).net
    assert torch.equal(same.classifier.weight, state["classifier.weight"])
    assert not torch.equal(other.classifier.weight, state["classifier.weight"])


def test_what_a_partial_checkpoint_lacks_is_told(recwarn):
    state = checkpoint()
    start_from(NET, tuple("abc"), 3, RECIPE, Start(state))
    assert not [w for w in recwarn if issubclass(w.category, WeightsWarning)]  # that the classifier is new goes without saying
    lost = {k: v for k, v in state.items() if k != "head.conv.weight"}
    with pytest.warns(WeightsWarning, match="head.conv.weight"):
        start_from(NET, tuple("abc"), 3, RECIPE, Start(lost))


def test_weights_of_another_network_are_refused():
    with pytest.raises(WeightsError):
        start_from(replace(NET, stages=NET.stages[:1]), tuple("abc"), 3, RECIPE, Start(checkpoint()))


@pytest.mark.parametrize("what", ["freeze", "freeze_norms", "neither"])
def test_what_is_frozen_stays_and_the_rest_moves(what):
    state = checkpoint()
    recipe = replace(RECIPE, **({what: True} if what != "neither" else {}))
    *_, last = train_classifier(splits(), NET, preprocess_for(24, 3), recipe, start=Start(state))
    after = last.net.state_dict()
    moved = {name for name, value in after.items() if not name.startswith("classifier") and not torch.equal(value, state[name])}
    statistics = {name for name in state if "running" in name}
    body = {name for name in state if not name.startswith("classifier")}
    assert moved == {"freeze": set(), "freeze_norms": body - statistics, "neither": body}[what]
    fresh = start_from(NET, tuple("abc"), 3, RECIPE).net
    assert not torch.equal(after["classifier.weight"], fresh.classifier.weight)


def test_a_probe_is_the_logistic_regression_on_the_frozen_features():
    """The gradient of the first step, by hand from the features that evaluation gives."""
    state = checkpoint()
    recipe = replace(
        RECIPE, epochs=1, batch_size=48, lr=1.0, momentum=0.0, weight_decay=0.0, warmup_epochs=0.0, ema=0.0, freeze=True, flip=False, shift=0.0
    )
    recipe = replace(recipe, label_smoothing=0.0)
    data = splits()
    *_, last = train_classifier(data, NET, preprocess_for(24, 3), recipe, start=Start(state))
    before = start_from(NET, tuple("abc"), 3, recipe, Start(state)).net.eval()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocess_for(24, 3).mean, preprocess_for(24, 3).std))
    with torch.no_grad():
        features = before.features((data.train.images.float() - mean) / std).mean((2, 3))
        error = before.classifier(features).softmax(1) - torch.nn.functional.one_hot(data.train.labels, 3)
        want = before.classifier.weight - error.T @ features / 48
    assert torch.allclose(last.net.classifier.weight, want, atol=1e-5)


def test_frozen_fresh_weights_make_no_sense():
    with pytest.raises(ValueError, match="--weights"):
        start_from(NET, tuple("abc"), 3, replace(RECIPE, freeze=True))
    with pytest.raises(ValueError, match="--advprop"):
        start_from(NET, tuple("abc"), 3, replace(RECIPE, freeze_norms=True, advprop=True), Start(checkpoint()))


def test_mean_per_class_counts_each_class_alike():
    """Classes of 20, 2 and 1 images: by hand from what the network says."""
    data = splits()
    rows = torch.tensor([i for i in range(21) if i % 3 == 0] + [1, 4, 2])
    held_out = ImageData(data.held_out.images[rows], data.held_out.labels[rows], tuple(data.held_out.names[i] for i in rows.tolist()))
    *_, last = train_classifier(replace(data, held_out=held_out), NET, preprocess_for(24, 3), RECIPE)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocess_for(24, 3).mean, preprocess_for(24, 3).std))
    with torch.no_grad():
        said = last.net((held_out.images.float() - mean) / std).argmax(1)
    shares = [float((said[held_out.labels == c] == c).float().mean()) for c in range(3)]
    assert last.mean_per_class == pytest.approx(sum(shares) / 3)
    assert last.top1 == pytest.approx(float((said == held_out.labels).float().mean()))


def test_transfer_has_the_protocols_steps_and_norm_momentum():
    flowers = FINETUNE["flowers102"]
    recipe = flowers.recipe()
    assert recipe.epochs == round(20_000 / (2040 // 256))
    assert recipe.norm_momentum == 0.1  # max(1 - 10 / 7, 0.9) in TensorFlow's terms
    assert FINETUNE["cifar10"].recipe().norm_momentum == pytest.approx(10 / 195)
    assert replace(recipe, epochs=50, norm_momentum=0.0) == RECIPES["transfer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label, name in enumerate("abc"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 130, (40 + i, 50, 3)) + 40 * np.eye(3)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i:02d}.jpg", quality=90)
    return root


def stream(folder, out, recipe, **running):
    preprocess = preprocess_for(24, 3)
    data = prepare(find(str(folder)), preprocess, recipe)
    assert data.streamed == (recipe.crop_area > 0)
    return list(run_folder(Path(out), data, NET, preprocess, recipe, "photos", Running(**running)))


def losses(events):
    return [e.loss for e in events if isinstance(e, Step)]


CROPS = replace(RECIPE, crop_area=0.3, shift=0.0, augment="randaugment", batch_size=8)


def test_streamed_training_is_the_same_with_workers_and_after_a_stop(folder, tmp_path):
    whole = stream(folder, tmp_path / "whole", CROPS)
    want = losses(whole)
    assert len(want) == 2 * (36 // 8)
    steps = iter(range(100))
    with pytest.raises(Stopped):
        stream(folder, tmp_path / "run", CROPS, stop=lambda: next(steps) == 1)
    rest = stream(folder, tmp_path / "run", CROPS, resume=True, workers=2)
    assert losses(rest) == want[2:]
    accuracy = [e.top1 for e in whole if isinstance(e, Evaluated)]
    assert [e.top1 for e in rest if isinstance(e, Evaluated)] == accuracy
    net, _ = load_model(tmp_path / "run" / "model.safetensors")
    other, _ = load_model(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_broken_image_is_told_once_and_left_out_of_both_parts(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "photos")
    for name in ("train/a/03.jpg", "val/b/01.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:200])
    events = stream(root, tmp_path / "run", replace(CROPS, epochs=3, batch_size=36), workers=1, broken_share=0.03)
    said = [e.text for e in events if isinstance(e, Note)]
    assert len([t for t in said if "train/a/03.jpg" in t]) == len([t for t in said if "val/b/01.jpg" in t]) == 1


def test_more_broken_images_than_allowed_are_an_error(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "photos")
    (root / "train/a/03.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 36 images can't be read, more than 2 %.*train/a/03.jpg: empty file"):
        stream(root, tmp_path / "run", replace(CROPS, batch_size=36), broken_share=0.02)
    with pytest.raises(DataError, match=r"1 of 48 images can't be read, more than 2 %.*train/a/03.jpg: empty file"):
        prepare(find(str(root)), preprocess_for(24, 3), RECIPE, broken_share=0.02)


def test_advprop_saves_a_network_without_auxiliary_norms(tmp_path):
    recipe = replace(RECIPE, advprop=True, adv_epsilon=2.0, adv_steps=1)
    events = list(run_folder(tmp_path / "run", splits(), NET, preprocess_for(24, 3), recipe, "made", Running()))
    net, _ = load_model(tmp_path / "run" / "model.safetensors")
    assert net.state_dict().keys() == ts.build(NET, 3).state_dict().keys()
    last = [e for e in events if isinstance(e, Evaluated)][-1]
    assert any("auxiliary" in name for name in last.net.state_dict())
    for name, value in net.state_dict().items():
        assert torch.equal(value, last.net.state_dict()[name])


def test_a_partial_checkpoint_tells_its_network_and_what_to_feed_it(shared):
    arch, preprocess, _ = trunk_of(shared / "weights/efficientnet_b0_partial/efficientnet_b0.lukemelas.partial.safetensors")
    assert arch.topology == ts.arch("efficientnet_b0").topology
    assert (arch.numerics.padding, arch.numerics.norm_eps) == ("same", 1e-3)
    assert preprocess.size == 224


def test_naming_the_network_keeps_the_checkpoints_numerics_and_preprocessing(tmp_path):
    """torchvision's B0 pads symmetrically and has eps 1e-5, whether or not --arch names it."""
    torch.save(torchvision.models.efficientnet_b0().state_dict(), tmp_path / "b0.pth")
    plain, named = (_beginning(Train("photos", weights=str(tmp_path / "b0.pth"), arch=name)) for name in (None, "efficientnet_b0"))
    assert plain[0].numerics == named[0].numerics
    assert (named[0].numerics.padding, named[0].numerics.norm_eps) == ("symmetric", 1e-5)
    assert plain[2] == named[2] is not None
    with pytest.raises(ValueError, match="--raw"):
        _beginning(Train("photos", raw=True))


def test_a_probes_fresh_classifier_is_small_and_anothers_is_the_official_one():
    state = checkpoint()
    probe, whole = (start_from(NET, tuple("abc"), 3, replace(RECIPE, freeze=f), Start(state)).net.classifier for f in (True, False))
    assert torch.allclose(probe.weight, 0.03 * whole.weight)


def test_table_5_shows_the_protocols_kind_of_accuracy_and_only_shares():
    line = {"_from": "x", "dataset": "flowers102", "network": "b0", "top1": 0.9, "mean_per_class": 0.8}
    assert _told(line).startswith("b0 80.0 (mean per class")
    with pytest.raises(ValueError, match="0 to 1"):
        _told({**line, "mean_per_class": 80.0})
