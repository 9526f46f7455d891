"""The scores without training: hand-computed networks, plain implementations beside them, numerics over the space."""

import math
import pickle
import random
import sys
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from networks import images as smooth

import triscale as ts
from triscale.architecture import Arch, Head, Numerics, Stage, Stem
from triscale.blocks import BatchNorm, ConvNormAct
from triscale.scaling import fit_input
from triscale.search.space import mnasnet_space
from triscale.search.zerocost import ZeroCostScore, log_determinant, naswot, synflow

PLAIN = Numerics(activation="relu", drop_path=0.0)


def chain(channels, layers=1, *, stem=1, skip="none", resolution=2):
    """1x1 convolutions alone."""
    return Arch(Stem(stem, 1, 1), (Stage("conv", 1, 1, 1, 0, skip, channels, layers),), Head(0), resolution, 0.0, PLAIN)


def weights(net):
    return [m.weight for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]


def set_weights(net, *values):
    for weight, value in zip(weights(net), values, strict=True):
        weight.data = torch.tensor(value, dtype=torch.float32).reshape(weight.shape)
    return net


# A little of everything: strides, expansions, gates, both kinds of shortcut, a head.
SMALL = Arch(
    Stem(8, 3, 2),
    (
        Stage("conv", 3, 1, 1, 0.25, "identity", 8, 2),
        Stage("mbconv", 5, 2, 3, 0.25, "pool", 12, 2),
        Stage("mbconv", 3, 1, 1, 0, "none", 16, 1),
    ),
    Head(24),
    16,
)


@cache
def points(count=30):
    """Random networks of the space around B0 for 32 px."""
    space, rng = mnasnet_space(ts.fit_budget(fit_input(ts.arch("efficientnet_b0"), 32), macs=6e6).arch), random.Random(0)
    return [space.decode(space.random(rng)) for _ in range(count)]


def test_log_determinant_is_that_of_numpy_and_knows_0():
    x = np.random.default_rng(0).normal(size=(12, 40))
    assert log_determinant(torch.from_numpy(x @ x.T)) == pytest.approx(np.linalg.slogdet(x @ x.T)[1], rel=1e-12)
    assert log_determinant(torch.from_numpy(x.T @ x)) == -math.inf
    assert log_determinant(torch.full((3, 3), 7.0, dtype=torch.float64)) == -math.inf


def test_naswot_of_two_images_by_hand():
    """Each image is above the mean at two of four pixels, and they agree on two. Stem and stage see the same signs: of 8 units
    4 agree, K = [[8, 4], [4, 8]], whose determinant is 48. Turned signs agree as often."""
    images = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[1.0, 0.0], [1.0, 0.0]]]])
    for stem, stage in ((1.0, 1.0), (2.0, -3.0)):
        net = set_weights(ts.build(chain(1), 2, 1), [stem], [stage], [1.0, 1.0])
        assert naswot(net, images) == pytest.approx(math.log(48), rel=1e-12)


def test_naswot_of_equal_images_is_minus_infinity():
    images = smooth(4, (16, 16), 0)
    images[3] = images[1]
    assert naswot(SMALL, images) == -math.inf


@pytest.mark.parametrize("activation", ["silu", "relu", "relu6"])
def test_naswot_is_the_definition_counted_one_by_one(activation):
    arch, images = SMALL.with_numerics(activation=activation), smooth(6, (16, 16), 3)
    torch.manual_seed(5)
    net = ts.build(arch, 4)
    codes = []  # of the norms before an activation, whose input their output is; a gate's activation has no norm before it
    for m in net.modules():
        if isinstance(m, ConvNormAct) and m.act:
            m.norm.register_forward_hook(lambda norm, inputs, out: codes.append((out.detach() > 0).flatten(1).numpy().copy()))
        if isinstance(m, torch.nn.Module) and not isinstance(m, BatchNorm):
            m.training = False
    with torch.no_grad():
        net(images)
    code = np.concatenate(codes, 1)
    kernel = np.array([[float(sum(a == b for a, b in zip(x, y, strict=True))) for y in code.tolist()] for x in code.tolist()])
    assert len(codes) == 1 + 2 + 4 + 1 + 1  # stem, convs, two mbconvs, one without expansion, head
    assert 0.3 < code.mean() < 0.7
    assert naswot(arch, images, classes=4, seed=5) == pytest.approx(np.linalg.slogdet(kernel)[1], rel=1e-12)


def test_synflow_of_a_chain_is_its_layers_times_their_product():
    """R = 1'|C||B||A|1, linear in each of the three: the sum is 3 R."""
    rng = np.random.default_rng(1)
    a, b, c = rng.normal(size=(3, 2)), rng.normal(size=(5, 3)), rng.normal(size=(4, 5))
    net = set_weights(ts.build(chain(5, stem=3), 4, 2), a, b, c)
    a, b, c = (np.abs(m.astype(np.float32).astype(np.float64)) for m in (a, b, c))
    assert synflow(net) == pytest.approx(math.log(3 * (c @ b @ a).sum()), rel=1e-12)


def test_synflow_with_a_shortcut_by_hand():
    """x = a, y = a b + a, R = (a b + a) c. Of a and c it is R each, of b what goes through it: a b c."""
    a, b, c = 0.5, 3.0, 2.0
    net = set_weights(ts.build(chain(1, skip="identity"), 1, 1), [-a], [b], [-c])
    assert synflow(net) == pytest.approx(math.log(2 * (a * b + a) * c + a * b * c), rel=1e-12)


@pytest.mark.parametrize("skip", ["identity", "pool", "none"])
@pytest.mark.parametrize("kind", ["conv", "separable", "mbconv", "fused_mbconv", "basic", "bottleneck"])
def test_synflow_is_the_plain_sum(kind, skip):
    """Against ReLU and norms that do nothing, in one pass without divisors. The weights don't depend on the activation."""
    stages = (Stage(kind, 3, 2, 2, 0, skip, 16, 2), Stage(kind, 5, 1, 1, 0, skip, 12, 1))
    arch = Arch(Stem(8, 3, 1, pool=True), stages, Head(20), 15)
    torch.manual_seed(3)
    net = ts.build(arch.with_numerics(activation="relu"), 7).double().eval()
    for m in net.modules():
        if isinstance(m, BatchNorm):
            m.eps = 0.0
    for p in net.parameters():
        p.data.abs_()
    net(torch.ones(1, 3, 15, 15, dtype=torch.float64)).sum().backward()
    plain = sum((w * w.grad).sum().item() for w in weights(net))
    assert synflow(arch, classes=7, seed=3) == pytest.approx(math.log(plain), rel=1e-12)


def test_synflow_of_a_chain_beyond_every_float():
    """600 layers, each of which multiplies by about 9."""
    arch = chain(64, 600, stem=64)
    torch.manual_seed(0)
    net = ts.build(arch, 10)
    x, log = np.ones(3), 0.0
    for w in weights(net):
        x = np.abs(w.detach().double().flatten(1).numpy()) @ x
        log, x = log + math.log(x.max()), x / x.max()
    want = math.log(602) + log + math.log(x.sum())
    assert want > math.log(sys.float_info.max)
    assert synflow(net) == pytest.approx(want, rel=1e-12)


def test_gates_and_biases_do_not_count():
    torch.manual_seed(0)
    net = ts.build(SMALL, 4)
    before = synflow(net)
    for name, p in net.named_parameters():
        if ".se." in name or name.endswith("bias"):
            p.data.normal_()
    assert synflow(net) == before
    weights(net)[0].data.mul_(2)
    assert synflow(net) == pytest.approx(before + math.log(2), rel=1e-12)


def test_the_given_network_and_the_random_numbers_stay_as_they_were():
    net = ts.build(SMALL, 4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    assert synflow(SMALL, seed=1) != synflow(SMALL, seed=2)
    images = smooth(4, (16, 16), 0)
    assert naswot(net, images) == naswot(net, images)
    assert synflow(net) == synflow(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@dataclass(frozen=True)
class Pictures:
    count: int = 8

    def __call__(self, resolution):
        return smooth(self.count, (resolution, resolution), 1)


def scores(images=Pictures()):
    return ZeroCostScore("naswot", 10, images=images), ZeroCostScore("synflow", 10)


@pytest.mark.parametrize("score", scores(), ids=lambda s: s.name)
def test_scores_over_the_space_are_finite_and_the_seeds(score):
    values = [score(arch) for arch in points()]
    assert all(map(math.isfinite, values))
    assert len(set(values)) == len(values)
    again = pickle.loads(pickle.dumps(score))
    assert [again(arch) for arch in points(3)] == values[:3]
    assert [replace(score, seed=1)(arch) for arch in points(3)] != values[:3]


@pytest.mark.parametrize("score", scores(), ids=lambda s: s.name)
def test_wider_networks_of_one_shape_score_higher(score):
    """The case both are known to rank: B0 for 32 px at a quarter, a half and all of its width."""
    base = fit_input(ts.arch("efficientnet_b0"), 32)
    values = [score(ts.scale(base, width=w)) for w in (0.25, 0.5, 1)]
    assert values == sorted(values)
    assert len(set(values)) == 3


def test_a_network_of_one_path_tells_images_apart_less():
    """Not size alone: the same layers with a stage that is one channel wide, through which every image has to go."""
    wide = Arch(Stem(16, 3, 2), (Stage("conv", 3, 2, 1, 0, "none", 16, 1), Stage("conv", 3, 1, 1, 0, "none", 16, 3)), Head(0), 16)
    narrow = replace(wide, stages=(replace(wide.stages[0], channels=1), replace(wide.stages[1], layers=3)))
    for seed in range(3):
        assert naswot(narrow, Pictures(16)(16), seed=seed) < naswot(wide, Pictures(16)(16), seed=seed)


def test_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="unknown zero-cost score 'naswort'; nearest is 'naswot'"):
        ZeroCostScore("naswort", 10)
    with pytest.raises(ValueError, match="naswot: expected images"):
        ZeroCostScore("naswot", 10)
    for wrong in (torch.zeros(1, 3, 16, 16), torch.zeros(4, 3, 16), torch.zeros(4, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"naswot: expected images \(B, C, S, S\) float with B from 2, found"):
            naswot(SMALL, wrong)
