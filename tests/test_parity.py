"""On the same weights ours and timm's networks give the same numbers: logits, features, gradients.

Held to 1e-5 of the largest value in float32 and 1e-9 in float64. timm is an independent implementation; its `tf_` models
pad as TensorFlow does.
"""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import assert_alive, error, images, randomise
from safetensors.torch import load_file

import triscale as ts
from triscale.weights.dialects import dialect_of, names
from triscale.weights.load import translate

TORCH_DIALECT = {"padding": "symmetric", "norm_eps": 1e-5, "norm_momentum": 0.1, "running_variance": "unbiased"}
ARCHS = {
    **{f"tf_efficientnet_b{i}": ts.arch(f"efficientnet_b{i}") for i in range(5)},
    "tf_efficientnetv2_b0": ts.arch("efficientnetv2_b0"),
    "tf_efficientnet_lite0": ts.arch("efficientnet_lite0"),
    "efficientnet_b0": ts.arch("efficientnet_b0").with_numerics(**TORCH_DIALECT),
    "mobilenetv1_100": ts.arch("mobilenet_v1"),
    "mobilenetv2_100": ts.arch("mobilenet_v2"),
    "resnet18": ts.arch("resnet18"),
    "resnet50": ts.arch("resnet50"),
}
SMALL = ((75, 75), (64, 96))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def random_timm(name, size):
    """timm's network in evaluation, with random weights, and statistics as images of that size give."""
    torch.manual_seed(1)
    net = timm.create_model(name)
    randomise(net, images(2, (size, size), seed=0))
    return net


@pytest.fixture(scope="module", params=ARCHS)
def nets(request):
    """timm's network and ours with the same weights."""
    theirs, arch = random_timm(request.param, 144), ARCHS[request.param]
    ours = ts.build(arch)
    ours.load_state_dict(translate(theirs.state_dict(), arch))
    return theirs, ours.eval()  # each test puts them into the type that it needs


def assert_same_logits(theirs, ours):
    """On both our paths: with autograd, and without, where norms are folded into the convolutions."""
    native = (ours.arch.resolution,) * 2
    for dtype, sizes, n in ((torch.float32, (native, *SMALL), 2), (torch.float64, SMALL, 1)):
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        for size in sizes:
            x = images(n, size, seed=1, dtype=dtype)
            with torch.no_grad():
                expected, folded = theirs(x), ours(x)
            if n == 2:
                assert_alive(expected)
            assert error(folded, expected) <= TOLERANCE[dtype], (dtype, size)
            if size == SMALL[0]:
                plain = ours(x)
                assert plain.requires_grad
                assert error(plain.detach(), expected) <= TOLERANCE[dtype], (dtype, size)


def test_logits(nets):
    assert_same_logits(*nets)


def test_logits_of_real_weights(shared):
    """EfficientNetV2-B0, trained on ImageNet."""
    state = load_file(shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors")
    theirs = timm.create_model("tf_efficientnetv2_b0").eval()
    theirs.load_state_dict(state)
    arch = ts.arch("efficientnetv2_b0")
    ours = ts.build(arch).eval()
    ours.load_state_dict(translate(state, arch))
    assert_same_logits(theirs, ours)


def test_stages(nets):
    """`stages` gives the maps that timm's feature extraction gives, at strides 2 to 32."""
    theirs, ours = (net.double() for net in nets)
    x = images(1, (75, 97), seed=3, dtype=torch.float64)
    with torch.no_grad():
        expected, got = theirs.forward_intermediates(x, intermediates_only=True), ours.stages(x)
    assert list(got) == ["stride2", "stride4", "stride8", "stride16", "stride32"]
    for want, have in zip(expected, got.values(), strict=True):
        assert have.shape == want.shape
        assert error(have, want) <= 1e-9


def betas_without_gradient(arch):
    """The shifts of projection norms that no loss can see in training: a constant per channel that reaches nothing but 1x1
    convolutions followed by batch norm, which subtracts it again.

    A projection's output goes to the next block and, where that one has an identity skip, to the one after it. A block
    whose first convolution is larger than 1x1 sees the constant end at the zero padding, so the gradient is not 0 there.
    """
    blocks = [*arch.blocks(), None]
    pointwise = [b is None or (b.stage.block == "mbconv" and b.stage.expand != 1) for b in blocks]
    unseen = set()
    for i, block in enumerate(blocks[:-1]):
        if block.stage.block not in ("mbconv", "fused_mbconv") or (block.stage.block == "fused_mbconv" and block.stage.expand == 1):
            continue
        readers = [i + 1]
        while blocks[readers[-1]] is not None and blocks[readers[-1]].shortcut == "identity":
            readers.append(readers[-1] + 1)
        if all(pointwise[r] for r in readers):
            unseen.add(f"body.{block.stage_index}.{block.layer}.project.norm.bias")
    return unseen


@pytest.mark.parametrize(
    ("name", "unseen"),
    [
        ("tf_efficientnet_b0", 16),
        ("tf_efficientnet_b1", 22),
        ("tf_efficientnet_b2", 22),
        ("tf_efficientnet_b3", 25),
        ("tf_efficientnet_b4", 31),
        ("tf_efficientnet_lite0", 16),
        ("tf_efficientnetv2_b0", 17),
        ("mobilenetv2_100", 17),
        ("mobilenetv1_100", 0),
        ("resnet50", 0),
    ],
)
def test_gradients(name, unseen):
    """Of a cross entropy in float64, in training mode with drop connect and dropout off, for every parameter."""
    arch = replace(ARCHS[name].with_numerics(drop_path=0.0), dropout=0.0)
    theirs = random_timm(name, 64).double().train()
    ours = ts.build(arch).double().train()
    ours.load_state_dict(translate(theirs.state_dict(), arch))
    x, y = images(3, (48, 64), seed=5, dtype=torch.float64), torch.tensor([3, 700, 999])
    for net in (theirs, ours):
        F.cross_entropy(net(x), y).backward()
    reference = {key: p.grad for key, p in theirs.named_parameters()}
    named, own, skipped = names(arch, dialect_of("timm", arch)), dict(ours.named_parameters()), betas_without_gradient(arch)
    assert len(skipped) == unseen
    largest = max(grad.abs().max() for grad in reference.values())
    for key, p in own.items():
        want = reference[named[key]]
        if key in skipped:
            assert max(p.grad.abs().max(), want.abs().max()) < 1e-12 * largest, key
        else:
            assert error(p.grad, want) <= 1e-9, key
