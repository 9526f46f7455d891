"""Name and shape of every tensor of a network, by arithmetic: what `build` makes, without torch and in a millisecond."""

from __future__ import annotations

from collections.abc import Iterator

from triscale.architecture import Arch, Block

Shape = tuple[int, ...]


def tensors(arch: Arch, num_classes: int = 1000, in_channels: int = 3) -> dict[str, Shape]:
    """Our tensor names -> shapes, in the order of `build(arch, num_classes, in_channels).state_dict()`."""
    out = dict(_conv_norm("stem", arch.stem.channels, in_channels, arch.stem.kernel))
    for block in arch.blocks():
        prefix = f"body.{block.stage_index}.{block.layer}."
        out |= {prefix + name: shape for name, shape in _block(block)}
    if arch.head.channels:
        out |= dict(_conv_norm("head", arch.head.channels, arch.stages[-1].channels, 1))
    if num_classes:
        out |= {"classifier.weight": (num_classes, arch.out_channels), "classifier.bias": (num_classes,)}
    return out


def _conv_norm(name: str, cout: int, cin: int, kernel: int) -> Iterator[tuple[str, Shape]]:
    """cin: input channels of one group."""
    yield f"{name}.conv.weight", (cout, cin, kernel, kernel)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.norm.{leaf}", (cout,)


def _squeeze(channels: int, squeezed: int) -> Iterator[tuple[str, Shape]]:
    yield "se.reduce.weight", (squeezed, channels, 1, 1)
    yield "se.reduce.bias", (squeezed,)
    yield "se.expand.weight", (channels, squeezed, 1, 1)
    yield "se.expand.bias", (channels,)


def _block(block: Block) -> Iterator[tuple[str, Shape]]:
    stage, cin, cout, inner = block.stage, block.in_channels, block.stage.channels, block.inner
    k, kind = stage.kernel, stage.block
    if block.shortcut == "projection":
        yield from _conv_norm("shortcut", cout, cin, 1)
    if kind == "conv" or (kind == "fused_mbconv" and stage.expand == 1):
        yield from _conv_norm("conv", cout, cin, k)
        if block.squeezed:
            yield from _squeeze(cout, block.squeezed)
    elif kind == "separable":
        yield from _conv_norm("depthwise", cin, 1, k)
        yield from _conv_norm("pointwise", cout, cin, 1)
    elif kind in ("basic", "bottleneck"):
        reduced = kind == "bottleneck"
        yield from _conv_norm("conv1", inner, cin, 1 if reduced else k)
        yield from _conv_norm("conv2", inner if reduced else cout, inner, k)
        if reduced:
            yield from _conv_norm("conv3", cout, inner, 1)
    else:
        if kind == "fused_mbconv":
            yield from _conv_norm("expand", inner, cin, k)
        else:
            if stage.expand != 1:
                yield from _conv_norm("expand", inner, cin, 1)
            yield from _conv_norm("depthwise", inner, 1, k)
        if block.squeezed:
            yield from _squeeze(inner, block.squeezed)
        yield from _conv_norm("project", cout, inner, 1)
