"""How the kernels cut their work: the configurations fit the GPU and its 32-bit counters, and leave the next kernel little. Arithmetic alone."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import HAVE_TRITON

import triscale as ts
from triscale.blocks import same_padding
from triscale.kernels.machine import SHARED
from triscale.kernels.pointwise_tiles import configs as pointwise_configs
from triscale.kernels.pointwise_tiles import halves
from triscale.kernels.tiling import MOST_REGISTERS, Shape, configs, registers, tiles

if HAVE_TRITON:
    from triscale.kernels.depthwise import images_at_once
    from triscale.kernels.squeeze import configs as squeeze_configs
    from triscale.kernels.stem import configs as stem_configs

needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton isn't installed")


@needs_triton
@settings(max_examples=60, deadline=None)
@given(
    images=st.sampled_from((1, 128, 10**6)),
    side=st.integers(1, 4000),
    channels=st.integers(1, 4000),
    size=st.sampled_from((1, 3, 5, 7)),
    stride=st.sampled_from((1, 2)),
    pool=st.booleans(),
)
def test_configurations_fit_and_count_in_32_bits(images, side, channels, size, stride, pool):
    shape = Shape(images, side, side, channels, size, stride, (size // 2,) * 4)
    found = configs(shape, pool=pool)
    assert found
    assert len(set(found)) == len(found)
    for config in found:
        assert registers(shape, config) <= MOST_REGISTERS
        assert channels % config.vector == 0
        down, across = tiles(shape, config)
        assert (down - 1) * config.rows < shape.out_height <= down * config.rows
        assert (across - 1) * config.strip < shape.out_width <= across * config.strip
        lanes = images_at_once(shape, config) * across * channels
        width = 32 * config.warps * config.vector
        assert lanes + width < 2**31
        assert down * -(-lanes // width) < 2**31


def sums_of_b0(images):
    """Bytes of the partial sums of an image, for each depthwise convolution of B0 by each of its configurations."""
    side = 112
    for block in ts.arch("efficientnet_b0").blocks():
        pad = same_padding(side, block.stage.kernel, block.stride)
        shape = Shape(images, side, side, block.inner, block.stage.kernel, block.stride, (*pad, *pad))
        side = shape.out_height
        yield [4 * math.prod(tiles(shape, config)) * shape.channels for config in configs(shape, pool=True)]


def test_the_squeeze_is_left_few_sums():
    """One of its programs reads all of an image's, and nothing hides how long: thousands of small tiles would cost more than they save."""
    alone, batch = list(sums_of_b0(1)), list(sums_of_b0(256))
    assert len(alone) == len(batch) == 16
    assert max(max(found) for found in alone + batch) <= 96 * 1024
    assert sum(found[0] for found in alone) <= 600e3
    assert sum(found[0] for found in batch) <= 100e3


@needs_triton
def test_stem_configurations_waste_little():
    """First comes the tile that computes the fewest places in vain: none at B0's 112 x 112."""
    for side in (1, 7, 112, 190, 300):
        wasted = [-(-side // c.tall) * c.tall * -(-side // c.wide) * c.wide for c in stem_configs(side, side)]
        assert wasted == sorted(wasted)
    assert (112 % stem_configs(112, 112)[0].tall, 112 % stem_configs(112, 112)[0].wide) == (0, 0)


@pytest.mark.parametrize("channels", [1, 3, 16, 24, 40, 80, 112, 144, 160, 192, 255, 256])
def test_held_input_channels_are_hardly_padded(channels):
    block, tail = halves(channels)
    assert channels <= block + tail < max(32, 1.34 * channels)
    assert {n.bit_count() for n in (block, tail)} <= {0, 1}


def test_configurations_fit_every_gpu_and_no_two_are_one():
    for shape in ((256 * 12544, 12544, 16, 96), (49, 49, 1152, 192), (256 * 361, 361, 3840, 640), (256 * 196, 196, 333, 53), (1, 1, 1, 1)):
        for kind in ({}, {"gated": True}, {"pool": True}, {"residual": True}, {"gated": True, "residual": True}):
            for shared in (SHARED, 99 * 1024):
                found = pointwise_configs(*shape, **kind, shared=shared)
                assert 1 <= len(found) == len(set(found)) <= 12
                assert all(c.shared(bool(kind.get("gated"))) <= shared for c in found)
                assert not kind.get("pool") or all(c.by_image for c in found)


@needs_triton
def test_configurations_of_the_squeeze_fit_every_gpu():
    for images, parts, (channels, squeezed) in product((1, 256), (1, 28, 448), ((32, 8), (1152, 48), (3840, 160), (8256, 344), (1, 1))):
        for shared in (SHARED, 99 * 1024):
            found = squeeze_configs(images, parts, channels, squeezed, shared=shared)
            assert 1 <= len(set(found)) <= 6
            assert all(c.shared(parts, squeezed) <= shared for c in found)
    assert squeeze_configs(1, 28, 1152, 48)[0].shared(28, 48) > 99 * 1024
