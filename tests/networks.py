"""Networks and images that several tests share."""

from functools import cache

import torch
import torch.nn.functional as F

import triscale as ts


@cache
def meta_build(arch, num_classes=1000, in_channels=3):
    """The module on the meta device, in evaluation: sizes and no values. Shared, so leave it as it is."""
    with torch.device("meta"):
        return ts.build(arch, num_classes, in_channels).eval()


def images(n, size, seed, dtype=torch.float32):
    """Smooth colour fields with noise, which differ more from each other than noise alone."""
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(n, 3, 5, 5, generator=g), size, mode="bilinear")
    return (smooth + 0.3 * torch.randn(n, 3, *size, generator=g)).to(dtype)


def randomise(net, x):
    """Norms and biases away from 0 and 1; each norm's running statistics near those of its own input, so the signal stays alive.

    The mean shift is 0.5: with 0 about it, a deep random network of norms and ReLUs amplifies rounding errors so much that
    timm's own float32 logits of ResNet-50 lie 2e-5 from its float64 ones.
    """
    for p in net.parameters():
        if p.ndim == 1:
            p.data.normal_(0, 0.1)

    def settle(norm, inputs):
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0.5, 0.5)
        norm.running_mean.normal_().mul_(0.1 * variance.sqrt()).add_(mean)
        norm.running_var.uniform_(0.5, 1.5).mul_(variance.clamp(min=0.1 * variance.mean().item()))

    hooks = [m.register_forward_pre_hook(settle) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    net.eval()
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()


def error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def assert_alive(logits):
    """Two images give logits that differ by a fair part of their size: else no error would show."""
    assert (logits[0] - logits[1]).abs().max() > 0.05 * logits.abs().max()
