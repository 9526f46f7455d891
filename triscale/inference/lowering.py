"""A built network in evaluation -> the steps it comes down to, batch norms folded in float64.

The steps are a snapshot: they share no memory with the network, and changing its weights doesn't change them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from triscale.architecture import Activation
from triscale.blocks import (
    Basic,
    Bottleneck,
    Conv2d,
    ConvBlock,
    ConvNormAct,
    DepthwiseSeparable,
    FusedMBConv,
    MBConv,
    PoolShortcut,
    Residual,
    SqueezeExcite,
)
from triscale.inference.steps import (
    Classifier,
    Convolution,
    Depthwise,
    Expand,
    ExpandDepthwise,
    Head,
    Keep,
    MaxPool,
    Plain,
    Project,
    Squeeze,
    Stem,
    Step,
    Window,
)
from triscale.model import Classifier as Dense
from triscale.model import ConvNet, StemPool, build

M = TypeVar("M", bound=nn.Module)


def check(net: nn.Module) -> ConvNet:
    """`net`, or ValueError where it isn't a network of `build` in evaluation mode."""
    if type(net) is not ConvNet:  # a subclass may compute something else
        raise ValueError(f"optimize: expected a network made by triscale.build, found {type(net).__name__}")
    if any(m.training for m in net.modules()):
        raise ValueError("optimize: expected a network in evaluation mode, found training mode; call net.eval() first")
    return net


def lower(net: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Step, ...]:
    """The steps of `net`, their weights in `dtype` on the network's device, contiguous. Raises ValueError as `check` does.

    A block that is not as it was built (hooks, other modules, parametrised weights, its own forward), and one whose shortcut pools,
    becomes a Plain step; the whole network, where its blocks are fewer or more.
    """
    with torch.inference_mode(False), torch.no_grad():
        return tuple(converted(step, dtype) for part in _parts(check(net)) for step in part)


def hooked(module: nn.Module) -> bool:
    """Whether it, or a module in it, has hooks on its forward pass."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def plain_kinds(steps: Iterable[Step]) -> list[str]:
    """What has no faster form, by the names of the modules."""
    return sorted({step.kind for step in steps if isinstance(step, Plain)})


def _parts(net: ConvNet) -> Iterator[list[Step]]:
    with torch.device("meta"):
        built = build(net.arch, net.num_classes, net.in_channels)
    if [len(cast(nn.ModuleList, stage)) for stage in net.body] != [len(cast(nn.ModuleList, stage)) for stage in built.body]:
        yield [Plain(copy.deepcopy(net), type(net).__name__)]
        return
    yield _lowered(net.stem, built.stem, _stem)
    if net.pool is not None:
        yield _lowered(net.pool, built.pool, _stem_pool)
    for stage, as_built in zip(net.body, built.body, strict=True):
        for block, original in zip(cast(nn.ModuleList, stage), cast(nn.ModuleList, as_built), strict=True):
            yield _lowered(cast(Residual, block), original, _block)
    head: list[Step] = [Head()] if net.head is None else _lowered(net.head, built.head, _head)
    yield head if isinstance(head[0], Head) else [*head, Head()]
    dense: nn.Module | None = net.classifier
    if isinstance(dense, nn.Linear) and type(dense) in (Dense, nn.Linear) and not _altered(dense):  # exchanged for transfer, most likely
        yield [Classifier(dense.weight, dense.bias)]
    elif dense is not None:
        yield [Plain(copy.deepcopy(dense), type(dense).__name__)]


def _lowered(module: M, original: nn.Module | None, lowered: Callable[[M], list[Step]]) -> list[Step]:
    """`lowered(module)` where the module is as it was built; else the module, Plain."""
    if original is None or _altered(module) or _structure(module) != _structure(original):
        return [Plain(copy.deepcopy(module), type(module).__name__)]
    return lowered(module)


def _altered(module: nn.Module) -> bool:
    return hooked(module) or any("forward" in vars(m) for m in module.modules())


def _structure(module: nn.Module) -> list[tuple[object, ...]]:
    """Every module in it by name, exact type (a subclass may compute something else) and, of convolutions, geometry."""
    found: list[tuple[object, ...]] = []
    for name, m in module.named_modules():
        shape = (m.weight.shape, m.stride, m.padding, m.dilation, m.groups) if isinstance(m, Conv2d) else ()
        if not name.endswith("auxiliary"):  # AdvProp's second norms; `fold` takes the one that is switched on
            found.append((name, type(m), *shape))
    return found


def fold(part: ConvNormAct) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of the one convolution that equals convolution and norm in evaluation."""
    norm = part.norm.chosen
    factor = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    weight = part.conv.weight.double() * factor.view(-1, 1, 1, 1)
    return weight, norm.bias.double() - norm.running_mean.double() * factor


def _window(conv: Conv2d) -> Window:
    return Window(conv.kernel_size[0], conv.stride[0], conv.same)


def _dense(
    part: ConvNormAct, *, residual: Literal["none", "before", "after"] = "none", pool: bool = False, act: Activation | None = None
) -> Convolution:
    return Convolution(*fold(part), _window(part.conv), act or part.act or "none", residual, pool)


def _matrix(part: ConvNormAct) -> tuple[Tensor, Tensor]:
    weight, bias = fold(part)
    return weight.flatten(1).T, bias


def _stem(part: ConvNormAct) -> list[Step]:
    weight, bias = fold(part)
    return [Stem(weight.permute(2, 3, 1, 0), bias, _window(part.conv), part.act or "none")]


def _stem_pool(pool: StemPool) -> list[Step]:
    return [MaxPool(Window(3, 2, pool.same))]


def _head(part: ConvNormAct) -> list[Step]:
    return [Head(*_matrix(part), part.act or "none")]


def _block(block: Residual) -> list[Step]:
    """The steps of a block as it was built; Plain where its shortcut pools, or a gate has no projection to go into."""
    shortcut = block.shortcut
    if isinstance(shortcut, PoolShortcut) or (isinstance(block, ConvBlock) and isinstance(block.se, SqueezeExcite)):
        return [Plain(folded_copy(block), type(block).__name__)]
    keep = [Keep(_dense(shortcut) if isinstance(shortcut, ConvNormAct) else None)] if block.joined else []
    return [*keep, *_branch(block)]


def _branch(block: Residual) -> Iterator[Step]:
    match block:
        case MBConv():
            return _mbconv(block)
        case FusedMBConv():
            return _fused(block)
        case ConvBlock():
            return iter([_dense(block.conv, residual="after" if block.joined else "none")])
        case DepthwiseSeparable():
            return iter([_depthwise(block.depthwise, False), Project(*_matrix(block.pointwise), block.final_act or "none", False, block.joined)])
        case Basic():
            second = _dense(block.conv2, residual="before" if block.joined else "none", act=block.final_act)
            return iter([_dense(block.conv1), second])
        case Bottleneck():
            last = Project(*_matrix(block.conv3), block.final_act or "none", False, block.joined)
            return iter([Expand(*_matrix(block.conv1), block.conv1.act or "none"), _dense(block.conv2), last])
    raise AssertionError(f"no such block: {type(block).__name__}")


def _depthwise(part: ConvNormAct, pool: bool) -> Depthwise:
    weight, bias = fold(part)
    return Depthwise(weight.squeeze(1).permute(1, 2, 0), bias, _window(part.conv), part.act or "none", pool)


def _squeeze(se: nn.Module) -> Iterator[Step]:
    if isinstance(se, SqueezeExcite):
        w1, w2 = (conv.weight.flatten(1) for conv in (se.reduce, se.expand))
        assert se.reduce.bias is not None
        assert se.expand.bias is not None
        yield Squeeze(w1, se.reduce.bias, w2, se.expand.bias, se.act)


def _mbconv(block: MBConv) -> Iterator[Step]:
    gated = isinstance(block.se, SqueezeExcite)
    depthwise = _depthwise(block.depthwise, gated)
    if isinstance(block.expand, ConvNormAct):
        yield ExpandDepthwise(Expand(*_matrix(block.expand), block.expand.act or "none"), depthwise)
    else:
        yield depthwise
    yield from _squeeze(block.se)
    yield Project(*_matrix(block.project), "none", gated, block.joined)


def _fused(block: FusedMBConv) -> Iterator[Step]:
    gated = isinstance(block.se, SqueezeExcite)
    yield _dense(block.expand, pool=gated)
    yield from _squeeze(block.se)
    yield Project(*_matrix(block.project), "none", gated, block.joined)


def folded_copy(module: nn.Module) -> nn.Module:
    """The module with each norm folded into its convolution, which gets a bias; `module` must be as it was built."""
    out = copy.deepcopy(module)
    for part in out.modules():
        if isinstance(part, ConvNormAct):
            weight, bias = fold(part)
            part.conv.weight.data = weight.to(part.conv.weight.dtype)
            part.conv.bias = nn.Parameter(bias.to(part.conv.weight.dtype))
            part.norm = nn.Identity().eval()  # type: ignore[assignment]
    return out


def converted(step: Step, dtype: torch.dtype) -> Step:
    """The step with its weights contiguous, detached, each with memory of its own: matrices and dense convolutions in `dtype`.

    The rest is small, and rounding it would show: stems, depthwise convolutions, squeezes, classifiers and biases (but those of
    dense convolutions, whose libraries want one type) in float32 at least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    values: dict[str, object] = {}
    for name, value in vars(step).items():
        if isinstance(value, Tensor):
            narrow = isinstance(step, Convolution) or (name == "weight" and isinstance(step, (Expand, Project, Head)))
            layout = torch.channels_last if value.ndim == 4 and isinstance(step, Convolution) else torch.contiguous_format
            value = value.detach().to(dtype if narrow else wide, memory_format=layout, copy=True)
        elif isinstance(value, nn.Module):
            value = value.to(dtype).requires_grad_(False)
        elif isinstance(value, (Convolution, Expand, Depthwise)):
            value = converted(value, dtype)
        values[name] = value
    return type(step)(**values)  # type: ignore[arg-type]
