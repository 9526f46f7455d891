"""Data sets from folders and names, batches, augmentation: values and order."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triscale.data import datasets
from triscale.data.datasets import DataError, find, load
from triscale.data.loader import Batches, augment, evaluation_batches
from triscale.data.normalising import normalise
from triscale.recipe import Preprocess, Recipe

PLAIN = Recipe(flip=False, shift=0.0, erase=0.0, batch_size=4)


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (value, value, value)).save(path)


def test_digits_are_the_bundled_scans():
    from sklearn.datasets import load_digits

    splits = load(find("digits"), Preprocess(8, 0, "before", "nearest", (0.0,), (1.0,)))
    scans = load_digits()
    assert len(splits.train) + len(splits.held_out) == 1797
    assert not set(splits.train.names) & set(splits.held_out.names)
    for part in (splits.train, splits.held_out):
        for i in (0, 17, len(part) - 1):
            index = int(part.names[i].split("/")[1])
            assert int(part.labels[i]) == scans.target[index]
            assert np.array_equal(part.images[i, 0].numpy(), np.round(scans.images[index] * 255 / 16).astype(np.uint8))


def test_a_folder_is_split_by_class_and_always_the_same(tmp_path):
    for name, n in (("a", 10), ("b", 5)):
        for i in range(n):
            picture(tmp_path / name / f"{i}.png", 10 * i + (name == "b"))
    first, second = (load(find(str(tmp_path)), Preprocess(4, 0)) for _ in range(2))
    assert first.classes == ("a", "b")
    assert torch.bincount(first.held_out.labels).tolist() == [2, 1]
    assert torch.bincount(first.train.labels).tolist() == [8, 4]
    assert first.train.names == second.train.names
    for part in (first.train, first.held_out):
        for image, name in zip(part.images, part.names, strict=True):
            _, label, file = name.split("/")
            assert image.unique().tolist() == [10 * int(file.split(".")[0]) + (label == "b")]


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    for split, n in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            for i in range(n):
                picture(tmp_path / split / name / f"{i}.png", i)
    splits = load(find(str(tmp_path)), Preprocess(4, 0))
    assert (len(splits.train), len(splits.held_out)) == (6, 4)
    picture(tmp_path / "test" / "c" / "0.png", 0)
    with pytest.raises(DataError, match="no class of this name"):
        find(str(tmp_path))


def test_a_bad_image_is_left_out_and_labels_stay_with_their_images(tmp_path):
    for name, value in (("a", 50), ("b", 200)):
        for i in range(6):
            picture(tmp_path / name / f"{i}.png", value)
    (tmp_path / "a" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    splits = load(find(str(tmp_path)), Preprocess(4, 0))
    left_out = splits.train.left_out + splits.held_out.left_out
    assert len(left_out) == 1
    assert "a/2.png" in left_out[0]
    for part in (splits.train, splits.held_out):
        assert [50 if label == 0 else 200 for label in part.labels.tolist()] == part.images[:, 0, 0, 0].tolist()


def test_a_data_set_too_large_for_memory_says_so_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 3 << 20)
    for name in ("a", "b"):
        picture(tmp_path / name / "0.png", 0)
        picture(tmp_path / name / "1.png", 0)
    with pytest.raises(DataError, match="GiB"):
        load(find(str(tmp_path)), Preprocess(1024, 0))


def test_cifar10_from_parquet(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path))
    splits = find("cifar10", str(shared / "data"))
    assert (len(splits.train), len(splits.held_out)) == (50_000, 10_000)
    assert splits.classes[0] == "airplane"
    assert splits.classes[9] == "truck"
    for i in (0, 5000, 9999):
        assert Image.open(io.BytesIO(splits.held_out.read(i))).size == (32, 32)
        assert splits.held_out.name(i).split("/")[1] == splits.classes[splits.held_out.labels[i]]


def test_batches_hold_every_image_once_an_epoch_in_an_order_of_their_own():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 5, 5).contiguous()
    batches = Batches(images, torch.arange(12), Preprocess(5, 0, mean=(0.0,) * 3, std=(1.0,) * 3), PLAIN)
    epochs = [[y for _, y, _ in batches.epoch(i)] for i in (0, 1, 0)]
    orders = [torch.cat(e).tolist() for e in epochs]
    assert all(sorted(o) == list(range(12)) for o in orders)
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert all((x[:, 0, 0, 0] == y).all() for x, y, _ in batches.epoch(3))
    assert all(batches.names(numbers) == [f"#{i}" for i in y.tolist()] for _, y, numbers in batches.epoch(3))


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_with_workers_from_the_middle_and_in_parts(workers):
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(batch_size=12, shift=0.2, erase=0.4)
    make = lambda **more: Batches(images, torch.arange(50), Preprocess(8, 0), recipe, **more)  # noqa: E731
    whole = list(make().epoch(2))
    for batches, start in ((make(workers=workers), 0), (make(workers=workers), 2)):
        for (x, y, n), (x2, y2, n2) in zip(batches.epoch(2, start), whole[start:], strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
            assert torch.equal(n, n2)
    parts = [list(make(share=(rank, 3)).epoch(2)) for rank in range(3)]
    for i, (x, y, _) in enumerate(whole):
        assert torch.equal(torch.cat([p[i][0] for p in parts]), x)
        assert torch.equal(torch.cat([p[i][1] for p in parts]), y)
    with pytest.raises(ValueError, match="can't be shared out evenly to 5"):
        make(share=(0, 5))


def test_evaluation_sees_all_images_in_order():
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    p = Preprocess(4, 0)
    parts = list(evaluation_batches(images, p, 4))
    assert [len(x) for x in parts] == [4, 4, 2]
    expected = (images.double() - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)
    assert torch.allclose(torch.cat(parts).double(), expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from((0.0, 0.1, 0.3)))
def test_augmented_pixels_come_from_the_place_that_the_shift_says(seed, flip, shift):
    """The image holds its own coordinates, so what comes out tells where it was taken from."""
    size, n = 10, 6
    rows = torch.arange(size).view(1, 1, size, 1).expand(n, 1, size, size)
    columns = torch.arange(size).view(1, 1, 1, size).expand(n, 1, size, size)
    out = augment(torch.cat([rows, columns], 1), Recipe(flip=flip, shift=shift), torch.Generator().manual_seed(seed))
    reach = max(1, round(shift * size)) if shift else 0
    for image in out:
        y, x = image[0, :, 0], image[1, 0, :]
        assert (image[0] == y[:, None]).all()
        assert (image[1] == x[None, :]).all()
        mirrored = bool(x[0] > x[-1])
        assert not mirrored or flip
        x = x.flip(0) if mirrored else x
        for line in (y, x):
            offsets = {int(v) - i for i, v in enumerate(line.tolist()) if 0 < v < size - 1}
            assert len(offsets) == 1
            assert abs(offsets.pop()) <= reach


def test_half_of_the_images_are_mirrored_and_the_erased_share_is_as_asked():
    ramp = torch.arange(1, 21).view(1, 1, 1, 20).expand(4000, 1, 20, 20).float()
    generator = torch.Generator().manual_seed(0)
    mirrored = augment(ramp, Recipe(flip=True, shift=0.0), generator)[:, 0, 0, 0] == 20
    assert abs(mirrored.float().mean() - 0.5) < 0.03
    erased = augment(ramp, Recipe(flip=False, shift=0.0, erase=0.5), generator) == 0
    sides = erased[:, 0].any(2).sum(1)
    assert int(sides.max()) == 9  # |row - centre| < 5
    assert erased.flatten(1).any(1).all()


def test_normalise_is_the_definition_and_channels_last():
    x = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    out = normalise(x, Preprocess(6, 0))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out[1, 2, 3, 4].item() == pytest.approx((int(x[1, 2, 3, 4]) - 0.406 * 255) / (0.225 * 255), rel=1e-5)


def test_random_erasing_takes_rectangles_of_its_area_and_aspect_from_its_share_of_images():
    images = torch.ones(600, 3, 40, 60)
    recipe = Recipe(flip=False, shift=0.0, random_erase=0.25)
    out = augment(images, recipe, torch.Generator().manual_seed(0))
    gone = out[:, 0] == 0
    assert torch.equal(gone, out[:, 2] == 0)
    hit = gone.flatten(1).any(1)
    assert 110 <= int(hit.sum()) <= 190
    tall, wide = gone[hit].any(2).sum(1), gone[hit].any(1).sum(1)
    assert torch.equal(tall * wide, gone[hit].sum((1, 2)))  # rectangles
    share = (tall * wide) / 2400
    assert share.min() > 0.015
    assert share.max() < 0.36
    aspect = (tall / wide).log()
    assert aspect.abs().max() < 1.35  # 0.3, and rounding
    assert (aspect > 0.5).any()
    assert (aspect < -0.5).any()
    assert gone[:, 0].any()
    assert gone[:, :, -1].any()
