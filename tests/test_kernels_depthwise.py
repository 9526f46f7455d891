"""Depthwise convolution and stem as kernels, against float64. Whatever surrounds a tensor is NaN, and so is an output before."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, run_apart, runs_here

from triscale.blocks import same_padding

if runs_here():
    import triton
    import triton.language as tl

    from triscale.kernels import depthwise as kernels
    from triscale.kernels.activation import activate, halved, rounded, sigmoid
    from triscale.kernels.depthwise import depthwise, depthwise_reference
    from triscale.kernels.stem import Config as StemConfig
    from triscale.kernels.stem import configs as stem_configs
    from triscale.kernels.stem import stem, stem_reference
    from triscale.kernels.tiling import MOST_REGISTERS, Config, Shape, configs, registers, tiles

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 4e-3, FP16: 1e-3}
FRAME = 64  # elements before and after
MEAN, INV_STD = torch.tensor([123.7, 116.3, 103.5]), 1 / torch.tensor([58.4, 57.1, 57.4])  # ImageNet's, for 0 to 255


def framed(tensor):
    """A copy between NaNs (255 for uint8)."""
    outside = math.nan if tensor.is_floating_point() else 255
    buffer = torch.full((tensor.numel() + 2 * FRAME,), outside, dtype=tensor.dtype, device=DEVICE)
    inside = buffer[FRAME : FRAME + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


@contextmanager
def poisoned():
    """What torch allocates inside starts as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(found, expected):
    """Relative L2 distance."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def problem(shape, dtype, seed=0):
    """x, weight (fp32) and bias of a convolution, normal; framed."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.images, shape.height, shape.width, shape.channels, generator=g).to(dtype)
    weight = torch.randn(shape.size, shape.size, shape.channels, generator=g) / shape.size
    return framed(x), framed(weight), framed(torch.randn(shape.channels, generator=g))


def expected(tensors, shape, act, pool=True):
    x, weight, bias = (t.double() for t in tensors)
    return depthwise_reference(x, weight, bias, stride=shape.stride, pad=shape.pad, act=act, pool=pool)


def run(tensors, shape, act, config, *, images=None):
    """y and its sums, computed into framed NaNs by `config`."""
    x = tensors[0]
    y = framed(torch.full((shape.images, shape.out_height, shape.out_width, shape.channels), math.nan, dtype=x.dtype))
    sums = framed(torch.full((shape.images, math.prod(tiles(shape, config)), shape.channels), math.nan))
    for part in images or [range(shape.images)]:
        kernels.launch((*tensors, y, sums), shape, config, act, part)
    for out in (y, sums):
        buffer = out._base
        assert buffer[:FRAME].isnan().all()
        assert buffer[-FRAME:].isnan().all()
    return y, sums


@st.composite
def shapes(draw):
    size, stride = draw(st.sampled_from((1, 3, 3, 5, 5, 7))), draw(st.sampled_from((1, 2)))
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    kind = draw(st.sampled_from(("same", "same", "symmetric", "any")))
    if kind == "same":
        pad = (*same_padding(height, size, stride), *same_padding(width, size, stride))
    elif kind == "symmetric":
        pad = (size // 2,) * 4
    else:
        pad = tuple(draw(st.integers(0, size + 2)) for _ in range(4))
        height, width = max(height, size), max(width, size)
    return Shape(draw(st.integers(1, 2)), height, width, draw(st.integers(1, 9)), size, stride, pad)


acts = st.sampled_from(("silu", "relu", "relu6", "none"))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), dtype=st.sampled_from((BF16, FP16)), act=acts)
def test_depthwise_is_the_convolution_of_any_shape_in_any_tiling(data, dtype, act):
    shape = data.draw(shapes())
    config = Config(*(data.draw(st.sampled_from(v)) for v in ((1, 2, 3, 5, 7), (1, 2, 5, 12), (1, 2, 4), (1, 2))))
    tensors = problem(shape, dtype)
    y, sums = run(tensors, shape, act, config)
    reference, total = expected(tensors, shape, act)
    assert error(y, reference) <= TOLERANCE[dtype]
    assert error(sums.double().sum(1), total[:, 0]) <= 1e-3


@pytest.mark.parametrize(
    ("size", "stride", "side", "channels", "pad"),
    [
        (3, 1, 8, 24, (1, 1, 1, 1)),
        (3, 2, 10, 32, (0, 1, 0, 1)),  # SAME
        (3, 2, 10, 32, (1, 1, 1, 1)),
        (5, 1, 7, 40, (2, 2, 2, 2)),
        (5, 2, 10, 12, (1, 2, 1, 2)),  # SAME
        (5, 2, 9, 12, (2, 2, 2, 2)),
    ],
)
def test_depthwise_of_the_family(size, stride, side, channels, pad):
    """The public call, by its own choice of tiling: values, sums, and the same bits twice."""
    shape = Shape(2, side, side, channels, size, stride, pad)
    tensors = problem(shape, BF16)
    with poisoned():
        y, sums = depthwise(*tensors, stride=stride, pad=pad, act="silu", pool=True)
        again = depthwise(*tensors, stride=stride, pad=pad, act="silu", pool=True)
        alone, none = depthwise(*tensors, stride=stride, pad=pad, act="silu")
    reference, total = expected(tensors, shape, "silu")
    assert error(y, reference) <= 4e-3
    assert error(sums.double().sum(1), total[:, 0]) <= 1e-3
    assert torch.equal(y, again[0])
    assert torch.equal(sums, again[1])
    assert torch.equal(y, alone)
    assert none is None


def test_no_output_depends_on_the_tiling_or_on_other_images():
    """Each is the same sum in the same order, so that the bits agree: what is tuned changes no result."""
    shape = Shape(3, 6, 9, 4, 3, 1, (1, 1, 1, 1))
    tensors = problem(shape, BF16)
    whole, sums = run(tensors, shape, "silu", Config(4, 6, 2, 1))
    for config in configs(shape)[::4]:
        assert torch.equal(run(tensors, shape, "silu", config)[0], whole), config
    parted, parts = run(tensors, shape, "silu", Config(4, 6, 2, 1), images=[range(2, 3), range(0, 2)])
    assert torch.equal(parted, whole)
    assert torch.equal(parts, sums)


def test_a_broken_pixel_breaks_the_outputs_that_see_it_and_no_others():
    shape = Shape(1, 7, 7, 3, 3, 1, (1, 1, 1, 1))
    tensors = problem(shape, BF16)
    tensors[0][0, 3, 2, 1] = math.nan
    for act in ("silu", "relu", "relu6", "none"):
        y, _ = run(tensors, shape, act, Config(3, 4, 1, 1))
        assert torch.equal(y.isnan(), expected(tensors, shape, act)[0].isnan()), act


def test_offsets_beyond_2_to_the_31():
    """The last of 524 301 images, whose elements lie past 2^31 in x and in y. The rest of that memory is never touched."""
    shape = Shape(2**31 // 4096 + 13, 8, 8, 64, 3, 1, (1, 1, 1, 1))
    small = Shape(1, 8, 8, 64, 3, 1, (1, 1, 1, 1))
    x, weight, bias = problem(small, BF16)
    config = Config(8, 8, 2, 8)
    large = torch.empty((shape.images, 8, 8, 64), dtype=BF16, device=DEVICE)
    y = torch.empty_like(large)
    sums = torch.empty((shape.images, 1, 64), device=DEVICE)
    large[-1], y[-1], sums[-1] = x[0], math.nan, math.nan
    kernels.launch((large, weight, bias, y, sums), shape, config, "silu", range(shape.images - 1, shape.images))
    reference, total = expected((x, weight, bias), small, "silu")
    assert error(y[-1], reference[0]) <= 4e-3
    assert error(sums[-1], total[0]) <= 1e-3


@settings(max_examples=60, deadline=None)
@given(
    images=st.sampled_from((1, 128, 10**6)),
    side=st.integers(1, 4000),
    channels=st.integers(1, 4000),
    size=st.sampled_from((1, 3, 5, 7)),
    stride=st.sampled_from((1, 2)),
)
def test_configurations_fit_and_count_in_32_bits(images, side, channels, size, stride):
    shape = Shape(images, side, side, channels, size, stride, (size // 2,) * 4)
    found = configs(shape)
    assert found
    assert len(set(found)) == len(found)
    for config in found:
        assert registers(shape, config) <= MOST_REGISTERS
        assert channels % config.vector == 0
        down, across = tiles(shape, config)
        assert (down - 1) * config.rows < shape.out_height <= down * config.rows
        assert (across - 1) * config.strip < shape.out_width <= across * config.strip
        lanes = kernels.images_at_once(shape, config) * across * channels
        width = 32 * config.warps * config.vector
        assert lanes + width < 2**31
        assert down * -(-lanes // width) < 2**31


def stem_error(x, size, stride, channels, pad, act, config):
    """Relative error of the stem of x, uint8 or in normalised units; also asserts its type and shape."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(size, size, 3, channels, generator=g) / size, torch.randn(channels, generator=g)
    mean, inv_std = (MEAN, INV_STD) if x.dtype == torch.uint8 else (torch.tensor([0.1, 0.0, -0.2]), torch.tensor([1.0, 2.0, 0.5]))
    tensors = [framed(t) for t in (x, weight, bias, mean, inv_std)]
    with poisoned():
        y = stem(*tensors, stride=stride, pad=pad, act=act, config=config)
    reference = stem_reference(*(t.double() if t.is_floating_point() else t for t in tensors), stride=stride, pad=pad, act=act)
    assert y.dtype == (FP16 if x.dtype == FP16 else BF16)
    assert y.shape == reference.shape
    return error(y, reference) / TOLERANCE[y.dtype]


def pixels(height, width, dtype):
    x = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return x if dtype == torch.uint8 else (x / 64 - 2).to(dtype)


@settings(max_examples=10, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from((torch.uint8, BF16, FP16)),
    size=st.sampled_from((1, 3, 3, 5, 7)),
    stride=st.sampled_from((1, 2)),
    channels=st.integers(1, 20),
    act=acts,
)
def test_stem_is_the_convolution_of_the_normalised_image(data, dtype, size, stride, channels, act):
    height, width = data.draw(st.integers(size, 14)), data.draw(st.integers(size, 14))
    pad = data.draw(st.sampled_from(((*same_padding(height, size, stride), *same_padding(width, size, stride)), (size // 2,) * 4, (0, 2, 3, 1))))
    config = data.draw(st.sampled_from((None, StemConfig(4, 4, 16, 1), StemConfig(1, 32, 64, 4))))
    assert stem_error(pixels(height, width, dtype), size, stride, channels, pad, act, config) <= 1


@pytest.mark.parametrize(
    ("size", "stride", "side", "pad"),
    [
        (3, 2, 16, (0, 1, 0, 1)),
        (3, 2, 16, (1, 1, 1, 1)),
        (3, 2, 16, (1, 0, 1, 0)),
        (3, 1, 8, (1, 1, 1, 1)),
        (5, 1, 12, (0, 0, 0, 0)),
        (7, 2, 16, (3, 3, 3, 3)),
    ],
)
def test_stem_where_tiles_fill_the_output(size, stride, side, pad):
    """Tiles of 4 x 4 with none to spare: what lies outside the image is their taps alone, at each of its sides in turn."""
    for dtype in (torch.uint8, FP16):
        assert stem_error(pixels(side, side, dtype), size, stride, 16, pad, "silu", StemConfig(4, 4, 32, 1)) <= 1
        assert stem_error(pixels(side, side + 2, dtype), size, stride, 16, pad, "none", StemConfig(4, 4, 32, 1)) <= 1


def test_stem_configurations_waste_little():
    """First comes the tile that computes the fewest places in vain: none at B0's 112 x 112."""
    for side in (1, 7, 112, 190, 300):
        wasted = [-(-side // c.tall) * c.tall * -(-side // c.wide) * c.wide for c in stem_configs(side, side)]
        assert wasted == sorted(wasted)
    assert (112 % stem_configs(112, 112)[0].tall, 112 % stem_configs(112, 112)[0].wide) == (0, 0)


def test_activations():
    """fp32 in, fp32 out, far beyond where exp overflows; and rounding to the nearest, ties to even."""

    @triton.jit
    def kernel(z, y, act: tl.constexpr):
        at = tl.arange(0, 16)
        value = tl.load(z + at)
        if act == "sigmoid":
            value = sigmoid(value)
        elif act != "rounded":
            value = activate(halved(value, act), act)
        tl.store(y + at, rounded(value, y.dtype.element_ty))

    z = torch.tensor([-3e38, -1e4, -88.0, -20.0, -3.0, -1.0, -1e-3, 0.0, 1e-3, 0.5, 1.0, 3.0, 6.5, 20.0, 88.0, 1e4], device=DEVICE)
    y = torch.full((16,), math.nan, device=DEVICE)
    known = {"silu": z * z.double().sigmoid(), "relu": z.clamp_min(0), "relu6": z.clamp(0, 6), "none": z, "sigmoid": z.double().sigmoid()}
    for act, want in known.items():
        kernel[(1,)](z, y, act)
        torch.testing.assert_close(y.double(), want.double(), rtol=1e-3, atol=6e-4 * 20 if act == "silu" else 6e-4)
    ties = framed(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20] * 4))
    halves = framed(torch.full((16,), math.nan, dtype=BF16))
    kernel[(1,)](ties, halves, "rounded")
    assert torch.equal(halves, ties.to(BF16))


BAD = {
    "depthwise: expected a contiguous": {"x": torch.zeros(1, 4, 4, 2)},
    "expected weight": {"weight": torch.zeros(9, 9, 2)},
    "stride 1 or 2": {"stride": 3},
    "finds no place": {"x": torch.zeros(1, 1, 4, 2, dtype=BF16), "pad": (0, 0, 0, 0)},
}


@pytest.mark.parametrize("told", BAD)
def test_depthwise_says_what_it_cannot_take(told):
    given = {"x": torch.zeros(1, 4, 4, 2, dtype=BF16), "weight": torch.zeros(3, 3, 2), "bias": torch.zeros(2), "stride": 1, "pad": (1,) * 4}
    with pytest.raises(ValueError, match=told) as raised:
        depthwise(**{**given, **BAD[told]}, act="silu")
    assert "\n" not in str(raised.value)


def test_stem_says_what_it_cannot_take():
    weight, three = torch.zeros(3, 3, 3, 2), torch.zeros(3)
    for x, w, stride in (
        (torch.zeros(1, 4, 4, 3), weight, 2),
        (torch.zeros(1, 4, 4, 3, dtype=BF16), weight[:2], 2),
        (three[None, None, None].to(BF16), weight, 2),
    ):
        with pytest.raises(ValueError, match="stem: expected"):
            stem(x, w, torch.zeros(2), three, three, stride=stride, pad=(0, 0, 0, 0), act="silu")


def test_no_images_make_no_outputs():
    y, sums = depthwise(
        torch.zeros(0, 8, 8, 4, dtype=BF16, device=DEVICE),
        *(torch.zeros(s, device=DEVICE) for s in ((3, 3, 4), (4,))),
        stride=2,
        pad=(0, 1, 0, 1),
        act="relu",
        pool=True,
    )
    assert y.shape == (0, 4, 4, 4)
    assert sums.shape[0] == 0


run_apart(globals())
