"""The streaming loader: every sample once, the right label, the same bits for any number of workers and from any place on."""

import contextlib
import os

import numbered
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triscale.data.datasets import find, load
from triscale.data.loader import Batches, Finish
from triscale.data.normalising import copied, normalise
from triscale.data.sources import Joined
from triscale.data.stream import StreamedBatches, evaluation_stream
from triscale.data.work import crop_numbers
from triscale.recipe import Preprocess, Recipe

SMALL = Preprocess(16, 0)
EACH, BATCH = 28, 12  # 3 x 28 samples make 7 batches of 12, which 1, 2 and 3 processes share


class AsTheyAre:
    """In place of Finish: uint8 images, so that they tell their numbers."""

    def __call__(self, images, labels, generator, part, whole):
        return images, labels


def stream(samples, recipe=None, *, workers=0, share=(0, 1), finish=None, preprocess=SMALL, **more):
    recipe = recipe or Recipe(batch_size=BATCH)
    return contextlib.closing(StreamedBatches(samples, preprocess, recipe, finish=finish or AsTheyAre(), workers=workers, share=share, **more))


def all_of(samples, recipe, epoch=0, start=0, **options):
    with stream(samples, recipe, **options) as batches:
        return list(batches.epoch(epoch, start))


def equal(a, b):
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same kind of samples from a folder, tar shards and Parquet; the numbers that pictures tell go on from one to the next."""
    pytest.importorskip("pyarrow")
    root = tmp_path_factory.mktemp("sources")
    made = [getattr(numbered, kind)(root / kind, i * EACH, EACH) for i, kind in enumerate(("folder", "shards", "parquet"))]
    return {kind: find(data).train for kind, data in zip(("folder", "shards", "parquet"), made, strict=True)}


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_no_sample_is_lost_or_seen_twice(sources, workers, processes):
    """All three sources in one, as an epoch over it has each of theirs."""
    samples, parts = numbered.WithoutTorch(Joined(list(sources.values()))), []
    with stream(samples, workers=workers, share=(0, processes)) as batches:
        for rank in range(processes):
            batches.rank = rank  # the same workers serve each rank in turn: starting them is what takes time here
            parts.append(list(batches.epoch(1)))
    told = [numbered.numbers_in(torch.cat([part[i][0] for part in parts])) for i in range(7)]
    assert sorted(torch.cat(told).tolist()) == list(range(3 * EACH))
    labels = torch.cat([part[i][1] for i in range(7) for part in parts])
    assert torch.equal(labels, torch.cat(told) % numbered.CLASSES)
    order = torch.cat([part[i][2] for i in range(7) for part in parts])
    with stream(samples.samples) as one:
        assert torch.equal(order, torch.cat([numbers for _, _, numbers in one.epoch(1)]))
        assert all(f"{t:04}" in name or "parquet" in name for t, name in zip(torch.cat(told).tolist(), one.names(order), strict=True))


@pytest.mark.parametrize("kind", ["folder", "shards", "parquet"])
def test_resumed_in_mid_epoch(sources, kind):
    recipe = Recipe(batch_size=6, crop_area=0.1, seed=3)
    with stream(sources[kind], recipe, workers=2, finish=Finish(SMALL, recipe)) as batches:
        whole = list(batches.epoch(2))
        for start in range(len(batches)):
            equal(list(batches.epoch(2, start)), whole[start:])
        assert list(batches.epoch(2, len(batches))) == []
    equal(all_of(sources[kind], recipe, 2, 1, finish=Finish(SMALL, recipe)), whole[1:])


def test_the_same_bits_whoever_does_the_work(sources):
    recipe = Recipe(batch_size=BATCH, crop_area=0.1, erase=0.2, seed=1)
    samples, finish = Joined(list(sources.values())), Finish(SMALL, recipe)
    alone = all_of(samples, recipe, finish=finish)
    equal(all_of(samples, recipe, finish=finish, workers=3), alone)
    parts = [all_of(samples, recipe, finish=finish, share=(rank, 3)) for rank in range(3)]
    equal([[torch.cat(t) for t in zip(*same, strict=True)] for same in zip(*parts, strict=True)], alone)


def test_crops_differ_by_epoch_sample_and_seed_alone():
    whole = Recipe(batch_size=4, crop_area=0.05)
    seen = {}
    for key, recipe, epoch in (("a", whole, 0), ("b", whole, 1), ("c", Recipe(batch_size=4, crop_area=0.05, seed=1), 0)):
        batches = all_of(numbered.Pixels(8), recipe, epoch)
        seen[key] = {int(n): image for images, _, numbers in batches for image, n in zip(images, numbers, strict=True)}
    smaller = {int(n): im for x, _, ns in all_of(numbered.Pixels(8), Recipe(batch_size=2, crop_area=0.05)) for im, n in zip(x, ns, strict=True)}
    for n in range(8):
        assert torch.equal(seen["a"][n], smaller[n])
        assert not torch.equal(seen["a"][n], seen["b"][n])
        assert not torch.equal(seen["a"][n], seen["c"][n])


def test_batches_are_those_of_images_held_in_memory(tmp_path):
    """Of a filter that has no fast form, so that the pixels are the same too."""
    listing, nearest = find(numbered.folder(tmp_path / "data", 0, 20)), Preprocess(16, 0, interpolation="nearest")
    held = load(listing, nearest).train
    recipe = Recipe(batch_size=6, erase=0.2)
    in_memory = Batches(held.images, held.labels, nearest, recipe, names=held.names)
    streamed = all_of(listing.train, recipe, finish=Finish(nearest, recipe), workers=1, preprocess=nearest)
    equal(streamed, list(in_memory.epoch(0)))
    with stream(listing.train, recipe) as batches:
        assert len(batches) == len(in_memory) == 3
        assert batches.names(torch.tensor([3, 0])) == in_memory.names(torch.tensor([3, 0]))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 3), st.data())
def test_shares_make_up_the_batches(count, size, processes, epoch, data):
    samples, recipe = numbered.Pixels(count), Recipe(batch_size=size)
    size = min(size, count)
    if size % processes:
        with pytest.raises(ValueError, match=f"a batch of {size} images can't be shared out evenly to {processes} processes"):
            all_of(samples, recipe, share=(0, processes))
        return
    start = data.draw(st.integers(0, count // size))
    parts = [all_of(samples, recipe, epoch, start, share=(rank, processes), preprocess=Preprocess(1, 0)) for rank in range(processes)]
    assert {len(part) for part in parts} == {count // size - start}
    told = [int(n) for batch in zip(*parts, strict=True) for images, _, _ in batch for n in numbered.numbers_in(images)]
    assert told == [int(n) for batch in zip(*parts, strict=True) for _, _, numbers in batch for n in numbers]
    assert len(set(told)) == len(told) == (count // size - start) * size


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.data())
def test_evaluation_has_each_sample_once_and_in_order(count, batch, processes, data):
    numbers = data.draw(st.none() | st.lists(st.integers(0, count - 1), max_size=20))
    wanted = list(range(count)) if numbers is None else numbers
    sizes, seen = [], []
    for rank in range(processes):
        for images, which in evaluation_stream(
            numbered.Pixels(count), Preprocess(1, 0), batch=batch, workers=0, share=(rank, processes), numbers=numbers
        ):
            assert torch.equal(numbered.numbers_in(images), which)
            assert 1 <= len(which) <= batch
            seen += which.tolist()
        sizes.append(len(seen) - sum(sizes))
    assert seen == wanted
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_by_workers_and_by_the_reference(sources):
    """The reference is what loading into memory gives; the fast path stays within a few levels of it."""
    held = load(find(str(sources["folder"].root).removesuffix("/train")), SMALL).train
    made = {}
    for workers, reference in ((0, False), (2, False), (1, True)):
        with contextlib.closing(evaluation_stream(sources["folder"], SMALL, batch=10, workers=workers, reference=reference)) as batches:
            made[workers] = torch.cat([images for images, _ in batches])
    assert torch.equal(made[1], held.images)
    assert torch.equal(made[2], made[0])
    assert (made[0].int() - held.images.int()).abs().float().mean() < 3


def test_grey_images():
    grey = Preprocess(16, 0, mean=(127.5,), std=(127.5,))
    ((images, _),) = evaluation_stream(numbered.Pixels(3), grey, batch=3, workers=0)
    red, green, blue = (torch.from_numpy(np.stack([numbered.picture(n)[:, :, i] for n in range(3)])).double().mean((1, 2)) for i in range(3))
    assert images.shape == (3, 1, 16, 16)
    torch.testing.assert_close(images.double().mean((1, 2, 3)), 0.299 * red + 0.587 * green + 0.114 * blue, atol=6, rtol=0)


def test_workers_last_over_epochs():
    with stream(numbered.Whose(24), Recipe(batch_size=24), workers=2) as batches:
        epochs = [{(int(x[0, 0, 0]), int(x[1, 0, 0])) for images, _, _ in batches.epoch(e) for x in images} for e in range(3)]
        assert batches.notes == batches.left_out == []
    assert len(set.union(*epochs)) <= 2
    assert (os.getpid() % 251, os.getpid() // 251 % 251) not in set.union(*epochs)


def test_an_abandoned_epoch_leaves_nothing_behind():
    recipe = Recipe(batch_size=4)
    with stream(numbered.Pixels(40), recipe, workers=2) as batches:
        first = batches.epoch(0)
        next(first)
        for epoch in (0, 5):
            told = [(numbered.numbers_in(images), numbers) for images, _, numbers in batches.epoch(epoch)]
            assert all(torch.equal(t, n) for t, n in told)
            assert sorted(torch.cat([n for _, n in told]).tolist()) == list(range(40))
        with pytest.raises(RuntimeError, match="another epoch of these batches has begun"):
            next(first)
    again = batches.epoch(0)  # new workers after close
    assert torch.equal(numbered.numbers_in(next(again)[0]), next(batches.epoch(0))[2])
    batches.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [({"workers": -1}, "--workers"), ({"share": (2, 2)}, "share: expected"), ({"broken_share": 1.5}, "broken_share: expected 0 to 1, found 1.5")],
)
def test_counts_that_make_no_sense(options, told):
    with pytest.raises(ValueError, match=told):
        stream(numbered.Pixels(4), **options)


def test_no_samples():
    with pytest.raises(ValueError, match="at least one image"):
        stream(numbered.Pixels(0))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 5), st.sampled_from((1, 3)), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_normalised_to_the_bits_of_the_expression(count, channels, height, width, last):
    preprocess = Preprocess(16) if channels == 3 else Preprocess(16, mean=(120.0,), std=(3.0,))
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocess.mean, preprocess.std))
    out = normalise(images, preprocess)
    assert torch.equal(out, (images.float() - mean) / std)
    assert out.is_contiguous(memory_format=torch.channels_last)
    copy = copied(images)
    assert torch.equal(copy, images)
    assert copy.is_contiguous(memory_format=torch.channels_last)
    assert not count or copy.data_ptr() != images.data_ptr()


def test_memory_is_used_again_once_nothing_refers_to_it():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    def place():
        return normalise(images, SMALL).data_ptr()

    first = place()
    assert place() == first  # free at once
    held = normalise(images, SMALL)[1:, :, 3]  # a part of it is enough
    assert held.untyped_storage().data_ptr() == first != place()
    before = held.clone()
    weight = torch.ones(1, requires_grad=True)
    saved = (weight * normalise(images, SMALL)).sum()  # autograd alone holds its factor
    kept = [normalise(images * 0, SMALL) for _ in range(9)]
    assert len({k.data_ptr() for k in kept}) == 9
    assert torch.equal(held, before)
    saved.backward()
    torch.testing.assert_close(weight.grad[0], normalise(images, SMALL).sum())


keys = st.tuples(st.integers(0, 1 << 40), st.integers(0, 100_000), st.integers(0, 1 << 40))


@given(keys, keys)
def test_the_numbers_of_crops_are_their_keys_own(key, other):
    numbers = crop_numbers(*key)
    assert np.array_equal(numbers, crop_numbers(*key))
    assert key == other or not np.intersect1d(numbers, crop_numbers(*other)).size


def test_the_numbers_of_crops_are_spread_evenly_and_known():
    """Within a sample, over samples, over epochs and over seeds; and the same for ever."""
    for i in range(3):
        drawn = np.array([crop_numbers(*(n if i == j else 5 for j in range(3))) for n in range(2000)])
        assert drawn.shape == (2000, 10, 4)
        sorted_ = np.sort(drawn.reshape(2000, 40), axis=0)
        assert np.abs(sorted_ - (np.arange(2000)[:, None] + 0.5) / 2000).max() < 0.05  # Kolmogorov: 0.044 once in 1000
        correlation = np.corrcoef(drawn.reshape(2000, 40), rowvar=False) - np.eye(40)
        assert np.abs(correlation).max() < 0.1
    assert _reference(0, 0, 0)[:3] == crop_numbers(0, 0, 0).reshape(-1)[:3].tolist()
    assert _reference(7, 3, 123456789) == crop_numbers(7, 3, 123456789).reshape(-1).tolist()


def _reference(*key):
    """By Python's integers."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    state = 0
    for part in key:
        state = mix(state ^ part)
    return [(mix(state + i * 0x9E3779B97F4A7C15) >> 11) / 2**53 for i in range(40)]
