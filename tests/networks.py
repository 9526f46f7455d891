"""Built networks without memory, shared by the tests that only count."""

from functools import cache

import torch

import triscale as ts


@cache
def meta_build(arch, num_classes=1000, in_channels=3):
    """The module on the meta device, in evaluation: sizes and no values. Shared, so leave it as it is."""
    with torch.device("meta"):
        return ts.build(arch, num_classes, in_channels).eval()
