"""The score by a short training: its values, its split, the images it must not see, other processes."""

import multiprocessing
import pickle
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triscale.architecture import Arch, Head, Stage, Stem
from triscale.classify import Data, Evaluated, ProxyScore, prepare, preprocess_for, proxy, train_classifier
from triscale.classify.proxy import scored
from triscale.data.datasets import find
from triscale.data.sources import DataError
from triscale.data.transform import evaluate_transform
from triscale.recipe import Recipe
from triscale.recipes import RECIPES

NET = Arch(Stem(8, 3, 2), (Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 2),), Head(16), 16)
RECIPE = Recipe(epochs=5, batch_size=8, lr=0.1, warmup_epochs=0.5, norm_momentum=0.3, seed=3)
COUNTS = {"blue": 1, "green": 14, "grey": 30, "red": 20}  # training images of each class


def picture(path, tint, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 160, (20, 24, 3)) + np.array(tint)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


TINTS = {"blue": (0, 0, 12), "green": (0, 12, 0), "grey": (6, 6, 6), "red": (12, 0, 0)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noise with a tint, and test images that are no images: whoever reads one finds that out."""
    root = tmp_path_factory.mktemp("photos")
    for i, (name, count) in enumerate(COUNTS.items()):
        for k in range(count):
            picture(root / "train" / name / f"{k:02}.png", TINTS[name], 100 * i + k)
        (root / "test" / name).mkdir(parents=True)
        (root / "test" / name / "00.png").write_bytes(b"poison")
    return root


@pytest.fixture(scope="module")
def score(photos):
    return ProxyScore(str(photos), recipe=RECIPE)


@pytest.fixture(scope="module")
def values(score):
    return tuple(score(NET))


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def names(data):
    return [[part.name(i) for i in range(len(part))] for part in (data.train, data.held_out)]


def test_values_are_those_of_a_direct_training(photos, score, values):
    """On the same split, made here from the training images read as `triscale train` reads them."""
    listing, preprocess = find(str(photos)), preprocess_for(16, 3)
    whole = prepare(listing._replace(held_out=listing.train), preprocess, RECIPE).train
    numbers = torch.from_numpy(scored(listing.train.labels, 0.2))
    rest = torch.tensor(sorted(set(range(len(whole))) - set(numbers.tolist())))
    data = Data(whole.rows(rest), whole.rows(numbers), listing.classes, "scored")
    assert values == tuple(e.top1 for e in train_classifier(data, NET, preprocess, RECIPE) if isinstance(e, Evaluated))
    assert len(values) == RECIPE.epochs
    right = [v * score.scored_images for v in values]
    assert right == pytest.approx([round(r) for r in right], abs=1e-4)


def test_the_same_call_again_gives_the_same_and_another_seed_another(score, values):
    left = score(NET)
    next(left)
    left.close()  # as a pruned trial is left
    assert tuple(score(NET)) == values
    assert any(tuple(replace(score, recipe=replace(RECIPE, seed=seed))(NET)) != values for seed in (4, 5))


def test_the_split_is_by_class_disjoint_and_the_same_at_every_resolution(score):
    small, large = score.images(16), score.images(24)
    train, held_out = names(small)
    assert names(large) == [train, held_out]
    assert set(train).isdisjoint(held_out)
    assert len(set(train + held_out)) == sum(COUNTS.values())
    assert Counter(small.held_out.labels.tolist()) == {1: 3, 2: 6, 3: 4}  # a fifth of 14, 30 and 20; never the only one
    assert Counter(small.train.labels.tolist()) == {0: 1, 1: 11, 2: 24, 3: 16}
    assert (score.scored_images, score.trained_images, score.classes) == (13, 52, tuple(COUNTS))
    assert not any("test" in name for name in train + held_out)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.01, 0.99))
def test_of_each_class_a_share_is_scored(labels, share):
    labels = np.array(labels)
    numbers = scored(labels, share)
    assert np.array_equal(numbers, scored(labels, share))
    assert (np.diff(numbers) > 0).all()
    for name, count in Counter(labels.tolist()).items():
        assert (labels[numbers] == name).sum() == min(count - 1, max(1, round(share * count)))


def test_the_draw_is_no_slice_of_the_listing():
    """Names often follow the camera: the first or last of each class would be of one day."""
    numbers = scored(np.repeat([0, 1], 100), 0.2)
    for mine in (numbers[numbers < 100], numbers[numbers >= 100] - 100):
        assert 30 < mine.mean() < 70
        assert mine[0] < 20
        assert mine[-1] >= 80


def elsewhere(score):
    values, before = tuple(score(NET)), torch.get_num_threads()
    next(replace(score, threads=before + 1)(NET))
    return values, names(score.images(16)), score.fingerprint(), torch.get_num_threads() - before, score.batch(16, 5)


def test_another_process_has_the_same_split_values_and_fingerprint(score, values):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there, split, fingerprint, more_threads, batch = pool.apply(elsewhere, (score,))
    assert there == values
    assert split == names(score.images(16))
    assert fingerprint == score.fingerprint()
    assert more_threads == 1
    assert torch.equal(batch, score.batch(16, 5))


def test_the_fingerprint_knows_what_the_score_depends_on(photos, score, tmp_path):
    others = [
        replace(score, share=0.3),
        replace(score, recipe=replace(RECIPE, lr=0.06)),
        replace(score, recipe=replace(RECIPE, seed=4)),
        replace(score, crop_padding=8),
        *(replace(score, recipe=replace(RECIPE, **{field: value})) for field, value in (("crop_area", 0.5), ("flip", False), ("epochs", 4))),
    ]
    (tmp_path / "train").mkdir()
    for name in COUNTS:
        (tmp_path / "train" / name).symlink_to(photos / "train" / name)
    (tmp_path / "test").symlink_to(photos / "test")
    assert ProxyScore(str(tmp_path), recipe=RECIPE).fingerprint() == score.fingerprint(), "the same images elsewhere"
    (tmp_path / "train" / "red").unlink()
    picture(tmp_path / "train" / "red" / "00.png", TINTS["red"], 0)
    picture(tmp_path / "train" / "red" / "01.png", TINTS["red"], 1)
    (tmp_path / "more").symlink_to(tmp_path)  # another path, as what was found under one is kept
    others.append(ProxyScore(str(tmp_path / "more"), recipe=RECIPE))
    found = [score.fingerprint(), *(other.fingerprint() for other in others)]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert replace(score, threads=2).fingerprint() == score.fingerprint()


def test_it_is_small_when_sent_and_keeps_as_many_resolutions_as_fit(score, monkeypatch):
    images = score.trained_images + score.scored_images
    monkeypatch.setattr(proxy, "KEPT", images * 3 * (17**2 + 18**2))  # two of these
    assert len(pickle.dumps(score)) < 3000
    first = score.images(16)
    score.images(17)
    assert score.images(16) is first
    score.images(18)
    assert score.images(16) is first
    score.images(17)
    score.images(18)
    assert score.images(16) is not first


def test_other_pictures_under_the_same_names_are_another_data_set(tmp_path):
    for folder, seed in (("a", 0), ("b", 50), ("c", 0)):
        for name in ("green", "red"):
            for k in range(5):
                picture(tmp_path / folder / "train" / name / f"{k}.png", TINTS[name], k + seed)
                picture(tmp_path / folder / "test" / name / f"{k}.png", TINTS[name], k)
    found = {folder: ProxyScore(str(tmp_path / folder), recipe=RECIPE).fingerprint() for folder in "abc"}
    assert found["a"] == found["c"] != found["b"]


def test_equal_pictures_are_once_in_the_batch(tmp_path):
    for k in range(6):
        picture(tmp_path / "train" / "red" / f"{k}.png", TINTS["red"], k // 2)
        picture(tmp_path / "train" / "green" / f"{k}.png", TINTS["green"], 10 + k)
    (tmp_path / "test").symlink_to(tmp_path / "train")
    batch = ProxyScore(str(tmp_path), recipe=RECIPE, share=0.01).batch(16, 100)
    assert len(np.unique(batch.numpy().reshape(len(batch), -1), axis=0)) == len(batch) < 10


def test_unreadable_pictures_are_left_out_with_random_crops_too(tmp_path):
    for name in ("green", "red"):
        for k in range(12):
            picture(tmp_path / "train" / name / f"{k}.png", TINTS[name], k)
        (tmp_path / "train" / name / "broken.png").write_bytes(b"no image")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    score = ProxyScore(str(tmp_path), recipe=replace(RECIPE, epochs=1, crop_area=0.5))
    with pytest.warns(UserWarning, match="can't be read and are left out"):
        assert len(list(score(NET))) == score.steps == 1


def test_the_batch_is_of_normalised_training_images(photos, score):
    batch, train = score.batch(16, 40), score.images(16).train
    assert torch.equal(batch, score.batch(16, 40))
    assert not torch.equal(batch, replace(score, recipe=replace(RECIPE, seed=4)).batch(16, 40))
    paths = [photos / name for name in names(score.images(16))[0]]
    known = np.stack([evaluate_transform(np.asarray(Image.open(p if p.exists() else photos.parent / p)), preprocess_for(16, 3)) for p in paths])
    apart = np.abs(batch.numpy()[:, None] - known[None]).max((2, 3, 4))
    assert (apart.min(1) < 0.02).all(), "half a level of 255, in units of the deviation"
    assert len(set(apart.argmin(1).tolist())) == 40
    assert len(set(train.labels[apart.argmin(1)].tolist())) >= 3
    assert len(score.batch(16, 1000)) == len(train)


def test_a_broken_training_image_is_left_out_and_told_once(photos, tmp_path):
    for name in ("green", "grey"):
        for k in range(6):
            picture(tmp_path / name / f"{k}.png", TINTS[name], k)
    (tmp_path / "grey" / "broken.png").write_bytes(b"no image")
    score = ProxyScore(str(tmp_path), recipe=replace(RECIPE, epochs=1, batch_size=4))
    listed = find(str(tmp_path)).train
    assert "broken" in "".join(listed.name(i) for i in range(len(listed))), "not among those held out for testing: it is to be read"
    with pytest.warns(UserWarning, match="1 images can't be read and are left out; the first: .*broken.png"):
        first = list(score(NET))
    assert list(score(NET)) == first


def test_small_pictures_are_shown_whole():
    assert ProxyScore("photos").preprocess(96).crop_padding == 32
    assert ProxyScore("photos").preprocess(95).crop_padding == 0
    assert ProxyScore("cifar10").preprocess(96).crop_padding == 0
    assert ProxyScore("photos", crop_padding=7).preprocess(32).crop_padding == 7
    assert ProxyScore("digits").preprocess(16).channels == ProxyScore("digits").channels == 1
    assert ProxyScore("photos").recipe == RECIPES["proxy"]


def test_mistakes_are_named(tmp_path):
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"ProxyScore\.share: expected a number between 0 and 1, found"):
            ProxyScore("photos", share=share)
    with pytest.raises(ValueError, match=r"ProxyScore\.threads: expected a whole number from 0, found -1"):
        ProxyScore("photos", threads=-1)
    for name in ("green", "grey"):
        for k in range(2):  # one of them becomes the test image
            picture(tmp_path / name / f"{k}.png", TINTS[name], k)
    with pytest.raises(DataError, match="one image a class to train on; a score needs at least two"):
        _ = ProxyScore(str(tmp_path)).scored_images


def test_real_images(shared):
    score = ProxyScore(str(shared / "data/cifar10-mini"))
    data = score.images(32)
    assert (len(data.train), len(data.held_out), len(score.classes)) == (1600, 400, 10)
    assert set(Counter(data.held_out.labels.tolist()).values()) == {40}
    assert score.batch(32).shape == (64, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_cuda_device(score):
    there = replace(score, device="cuda")
    assert len(tuple(there(NET))) == RECIPE.epochs
    assert there.fingerprint() != score.fingerprint()
