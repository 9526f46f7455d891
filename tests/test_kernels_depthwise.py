"""Depthwise convolution and stem as kernels, against float64. Whatever surrounds a tensor is NaN, and so is an output before."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, TANH, run_apart, runs_here

from triscale.blocks import same_padding

if runs_here():
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    from triscale.kernels import depthwise as kernels
    from triscale.kernels.activation import activate, halved, rounded, sigmoid
    from triscale.kernels.depthwise import depthwise, depthwise_kernel, depthwise_reference
    from triscale.kernels.stem import StemConfig, stem, stem_reference
    from triscale.kernels.tiling import DepthwiseConfig, Shape, configs, tiles

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


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from((BF16, FP16)), act=acts)
def test_depthwise_is_the_convolution_of_any_shape_in_any_tiling(data, dtype, act):
    shape = data.draw(shapes())
    config = DepthwiseConfig(*(data.draw(st.sampled_from(v)) for v in ((1, 2, 3, 5, 7), (1, 2, 5, 12), (1, 2, 4), (1, 2))))
    tensors = problem(shape, dtype)
    y, sums = run(tensors, shape, act, config)
    reference, total = expected(tensors, shape, act)
    approximate = TANH * expected(tensors, shape, "none")[0].abs() / 2 if act == "silu" else torch.zeros_like(reference)
    assert (y.double() - reference).norm() <= TOLERANCE[dtype] * reference.norm() + approximate.norm()
    # Sums of few values may cancel: the measure is the size of what was added.
    assert (sums.double().sum(1) - total[:, 0]).norm() <= (1e-5 * reference.abs() + approximate).sum((1, 2)).norm()


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
    """The public call, by its own choice of tiling, which pooling changes: values, sums, and the same bits by either."""
    shape = Shape(2, side, side, channels, size, stride, pad)
    tensors = problem(shape, BF16)
    with poisoned():
        y, sums = depthwise(*tensors, stride=stride, pad=pad, act="silu", pool=True)
        alone, none = depthwise(*tensors, stride=stride, pad=pad, act="silu")
    reference, total = expected(tensors, shape, "silu")
    assert error(y, reference) <= 4e-3
    assert error(sums.double().sum(1), total[:, 0]) <= 1e-3
    assert torch.equal(y, alone)
    assert none is None


def test_no_output_depends_on_the_tiling_or_on_other_images():
    """Of y each is the same sum in the same order, so that the bits agree. The sums are, from run to run: their parts are the tiles."""
    shape = Shape(3, 6, 9, 4, 3, 1, (1, 1, 1, 1))
    tensors = problem(shape, BF16)
    whole, sums = run(tensors, shape, "silu", DepthwiseConfig(4, 6, 2, 1))
    for config in configs(shape)[::4]:
        assert torch.equal(run(tensors, shape, "silu", config)[0], whole), config
    parted, parts = run(tensors, shape, "silu", DepthwiseConfig(4, 6, 2, 1), images=[range(2, 3), range(0, 2)])
    assert torch.equal(parted, whole)
    assert torch.equal(parts, sums)
    again = run(tensors, shape, "silu", DepthwiseConfig(4, 6, 2, 1))
    assert torch.equal(again[0], whole)
    assert torch.equal(again[1], sums)


def test_a_batch_in_parts_is_the_batch(monkeypatch):
    """Five images by twos, as a launch whose lanes would exceed 32 bits is split."""
    shape = Shape(5, 6, 5, 12, 3, 1, (1, 1, 1, 1))
    tensors, how = problem(shape, BF16), {"stride": 1, "pad": shape.pad, "act": "silu", "pool": True, "config": DepthwiseConfig(5, 3, 4, 2)}
    whole = depthwise(*tensors, **how)
    launched, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "images_at_once", lambda shape, config: 2)
    monkeypatch.setattr(kernels, "launch", lambda *given: launched.append(given[-1]) or launch(*given))
    with poisoned():
        parted = depthwise(*tensors, **how)
    assert launched == [range(2), range(2, 4), range(4, 5)]
    assert torch.equal(whole[0], parted[0])
    assert torch.equal(whole[1], parted[1])
    assert not whole[0].isnan().any()


def test_a_broken_pixel_breaks_the_outputs_that_see_it_and_no_others():
    shape = Shape(1, 7, 7, 3, 3, 1, (1, 1, 1, 1))
    tensors = problem(shape, BF16)
    tensors[0][0, 3, 2, 1] = math.nan
    for act in ("silu", "relu", "relu6", "none"):
        y, _ = run(tensors, shape, act, DepthwiseConfig(3, 4, 1, 1))
        assert torch.equal(y.isnan(), expected(tensors, shape, act)[0].isnan()), act


def test_images_beyond_2_to_the_31():
    """The last of 524 301 images, whose elements lie past 2^31 in x and in y. The rest of that memory is never touched."""
    shape = Shape(2**31 // 4096 + 13, 8, 8, 64, 3, 1, (1, 1, 1, 1))
    small = Shape(1, 8, 8, 64, 3, 1, (1, 1, 1, 1))
    x, weight, bias = problem(small, BF16)
    config = DepthwiseConfig(8, 8, 2, 8)
    large = torch.empty((shape.images, 8, 8, 64), dtype=BF16, device=DEVICE)
    y = torch.empty_like(large)
    sums = torch.empty((shape.images, 1, 64), device=DEVICE)
    large[-1], y[-1], sums[-1] = x[0], math.nan, math.nan
    kernels.launch((large, weight, bias, y, sums), shape, config, "silu", range(shape.images - 1, shape.images))
    reference, total = expected((x, weight, bias), small, "silu")
    assert error(y[-1], reference[0]) <= 4e-3
    assert error(sums[-1], total[0]) <= 1e-3


def test_rows_beyond_2_to_the_31(monkeypatch):
    """The last rows of one image of 32 772 x 64 x 1024. The interpreter runs the last program alone, which has the last columns."""
    shape, config = Shape(1, 2**15 + 4, 64, 1024, 3, 1, (1, 1, 1, 1)), DepthwiseConfig(2, 4, 4, 8)
    g = torch.Generator().manual_seed(0)
    x = torch.empty((1, shape.height, 64, 1024), dtype=BF16, device=DEVICE)
    y = torch.empty_like(x)
    sums = torch.empty((1, math.prod(tiles(shape, config)), 1024), device=DEVICE)
    weight, bias = torch.randn(3, 3, 1024, generator=g).to(DEVICE), torch.randn(1024, generator=g).to(DEVICE)
    x[:, -5:] = torch.randn(1, 5, 64, 1024, generator=g).to(BF16)
    y[:, -4:] = math.nan
    if DEVICE.type == "cpu":
        last = TensorHandle(np.array([tiles(shape, config)[0] * 32 - 1], dtype=np.int32), tl.int32)
        monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: last)
        monkeypatch.setattr(kernels, "depthwise_kernel", OneProgram())
    kernels.launch((x, weight, bias, y, sums), shape, config, "silu", range(1))
    end = depthwise_reference(x[:, -5:].double(), weight.double(), bias.double(), stride=1, pad=(0, 1, 1, 1), act="silu")[0]
    assert error(y[:, -4:, -2:], end[:, :, -2:]) <= 4e-3


class OneProgram:
    """The kernel on a grid of one."""

    def __getitem__(self, grid):
        return depthwise_kernel[(1,)]


def stem_error(x, size, stride, channels, pad, act, config):
    """Error of the stem of x, uint8 or in normalised units, in tolerances; also asserts its type and shape."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(size, size, 3, channels, generator=g) / size, torch.randn(channels, generator=g)
    mean, inv_std = (MEAN, INV_STD) if x.dtype == torch.uint8 else (torch.tensor([0.1, 0.0, -0.2]), torch.tensor([1.0, 2.0, 0.5]))
    tensors = [framed(t) for t in (x, weight, bias, mean, inv_std)]
    with poisoned():
        y = stem(*tensors, stride=stride, pad=pad, act=act, config=config)
    exact, how = [t.double() if t.is_floating_point() else t for t in tensors], {"stride": stride, "pad": pad}
    reference = stem_reference(*exact, **how, act=act)
    assert y.dtype == (FP16 if x.dtype == FP16 else BF16)
    assert y.shape == reference.shape
    # Pixels and weights are rounded to fp16, which shows where their products cancel.
    zero, one = torch.zeros_like(exact[3]), torch.ones_like(exact[3])
    normal = (exact[0].double() - exact[3]) * exact[4]
    squares = stem_reference(normal.square(), exact[1].square(), torch.zeros_like(exact[2]), zero, one, **how, act="none")
    rounding = 2**-10 * squares.sqrt().norm()
    approximate = TANH * stem_reference(*exact, **how, act="none").norm() / 2 if act == "silu" else 0.0
    return float((y.double() - reference).norm() / (TOLERANCE[y.dtype] * reference.norm() + rounding + approximate))


def pixels(height, width, dtype):
    x = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return x if dtype == torch.uint8 else (x / 64 - 2).to(dtype)


@settings(max_examples=10, deadline=None, derandomize=True)
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
