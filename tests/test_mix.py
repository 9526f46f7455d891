"""Mixup and CutMix: the shares of pixels and of labels are the same, by hand and by counting."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triscale.data.loader import Finish
from triscale.data.mix import box, mix
from triscale.recipe import Preprocess, Recipe


def batch(n=6, height=9, width=7):
    """Image i is i everywhere, so that a pixel tells where it comes from."""
    return torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, height, width).clone(), torch.arange(n)


@given(st.floats(0.1, 5), st.integers(0, 2**31), st.integers(1, 9))
def test_mixups_pixels_have_the_labels_shares(alpha, seed, n):
    images, labels = batch(n)
    mixed, target = mix(images.clone(), labels, n, Recipe(mixup=alpha), torch.Generator().manual_seed(seed))
    own = target[torch.arange(n), labels]
    for i in range(n):
        other = n - 1 - i
        share = 1.0 if other == i else float(own[i])
        assert mixed[i].numpy() == pytest.approx(share * i + (1 - share) * other, abs=1e-4)
        assert float(target[i, other]) == pytest.approx(1.0 if other == i else 1 - share, abs=1e-6)
    assert torch.allclose(target.sum(1), torch.ones(n))


@given(st.floats(0.1, 5), st.integers(0, 2**31), st.integers(2, 12), st.integers(2, 12))
def test_cutmixs_labels_are_the_count_of_the_pixels(alpha, seed, height, width):
    images, labels = batch(6, height, width)
    mixed, target = mix(images.clone(), labels, 6, Recipe(cutmix=alpha), torch.Generator().manual_seed(seed))
    for i in range(6):
        values = set(mixed[i].unique().tolist())
        assert values <= {float(i), float(5 - i)}
        assert float(target[i, i]) == pytest.approx(float((mixed[i, 0] == i).float().mean()), abs=1e-6)
    pasted = mixed[0, 0] == 5
    assert pasted.sum() == int(pasted.any(1).sum()) * int(pasted.any(0).sum())  # one box


def test_a_box_has_its_share_of_the_area_where_it_is_not_cut():
    inside = [box(100, 80, 0.75, np.random.default_rng(seed)) for seed in range(200)]
    whole = [b for b in inside if b[0] > 0 and b[1] < 100 and b[2] > 0 and b[3] < 80]
    assert whole
    assert {(b - t, r - le) for t, b, le, r in whole} == {(50, 40)}
    assert any(b[0] == 0 for b in inside)
    assert any(b[3] == 80 for b in inside)


def test_with_both_each_batch_takes_one_at_even_odds():
    kinds = []
    for seed in range(200):
        mixed, _ = mix(*batch(2), 2, Recipe(mixup=1.0, cutmix=1.0), torch.Generator().manual_seed(seed))
        kinds.append(len(set(mixed[0].unique().tolist()) - {0.0, 1.0}) == 0)
    assert 60 < sum(kinds) < 140


def test_the_share_follows_beta():
    """Beta(0.2, 0.2) has mean 1/2 and variance 1 / (4 x 1.4)."""
    own = []
    for seed in range(600):
        _, target = mix(*batch(2), 2, Recipe(mixup=0.2), torch.Generator().manual_seed(seed))
        own.append(float(target[0, 0]))
    assert np.mean(own) == pytest.approx(0.5, abs=0.05)
    assert np.var(own) == pytest.approx(1 / 5.6, abs=0.02)


def test_the_loader_mixes_after_everything_else():
    preprocess = Preprocess(8, 0, mean=(0.0,) * 3, std=(1.0,) * 3)
    recipe = Recipe(mixup=1.0, flip=False, shift=0.0)
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    x, y = Finish(preprocess, recipe, 4)(images, torch.arange(4), torch.Generator().manual_seed(3))
    assert x[:, 0, 0, 0].tolist() == pytest.approx((y @ torch.arange(4.0)).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="number of classes"):
        Finish(preprocess, recipe)
