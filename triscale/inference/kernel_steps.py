"""Steps through the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from triscale.inference.executor import Torch
from triscale.inference.kernel_tuning import NoConfigurationError, Tuner
from triscale.inference.steps import Depthwise, Expand, Head, Project, Squeeze, Stem

T = TypeVar("T")


class Triton(Torch):
    """Each step by its kernel; where that doesn't run, in plain torch, which is told. Tensors between steps are (N, C, H, W) views
    of (N, H, W, C) ones."""

    def __init__(self, tune: Tuner, mean: Tensor, inv_std: Tensor) -> None:
        """mean, inv_std: (3,) float32, of uint8 pixels."""
        self.tune, self.mean, self.inv_std = tune, mean, inv_std
        self.as_is = torch.zeros_like(mean), torch.ones_like(inv_std)  # of images that are normalised already
        self.refused = set[str]()  # what doesn't run, and isn't tried again

    def _by(self, kernel: str, sizes: Mapping[str, Any], configs: Callable[[], Sequence[Any]], run: Callable[[Any], T], plain: Callable[[], T]) -> T:
        key = f"{kernel} {sizes}"
        if key in self.refused:
            return plain()
        try:
            return self.tune(kernel, sizes, configs, run)
        except NoConfigurationError as error:
            self.refused.add(key)
            listed = ", ".join(f"{name} {value}" for name, value in sizes.items())
            self.tune.tell(f"optimize: the kernel '{kernel}' doesn't run here for {listed}; torch computes such steps ({error})")
            return plain()

    def stem(self, step: Stem, x: Tensor) -> Tensor:
        from triscale.kernels.stem import configs, stem

        n, channels, height, width = x.shape
        if channels != 3:
            return super().stem(step, x)
        as_is = x.is_floating_point()  # normalised already
        mean, inv_std = self.as_is if as_is else (self.mean, self.inv_std)
        window, rows = step.window, _nhwc(x)

        def run(config: Any) -> Tensor:
            pad = window.pad(height, width)
            return stem(rows, step.weight, step.bias, mean, inv_std, stride=window.stride, pad=pad, act=step.act, config=config)

        def plain() -> Tensor:
            y = Torch.stem(self, step, x if as_is else self.normalised(x).to(self.tune.dtype))
            return _nhwc(y)

        sizes = {"n": n, "height": height, "width": width, "weight": list(step.weight.shape), "stride": window.stride, "uint8": not as_is}
        return _nchw(self._by("stem", sizes, lambda: configs(*window.out(height, width)), run, plain))

    def normalised(self, x: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) uint8 as the network takes them, float32."""
        return (x - self.mean.view(1, -1, 1, 1)) * self.inv_std.view(1, -1, 1, 1)

    def depthwise(self, step: Depthwise, x: Tensor) -> tuple[Tensor, Tensor | None]:
        from triscale.kernels.depthwise import SIZES, depthwise
        from triscale.kernels.tiling import Shape, configs

        window, rows = step.window, _nhwc(x)
        if window.kernel not in SIZES:
            return super().depthwise(step, x)
        n, height, width, channels = rows.shape
        pad = window.pad(height, width)
        shape = Shape(n, height, width, channels, window.kernel, window.stride, pad)

        def run(config: Any) -> tuple[Tensor, Tensor | None]:
            return depthwise(rows, step.weight, step.bias, stride=window.stride, pad=pad, act=step.act, pool=step.pool, config=config)

        sizes = {"n": n, "height": height, "width": width, "weight": list(step.weight.shape), "stride": window.stride, "pool": step.pool}

        def plain() -> tuple[Tensor, Tensor | None]:
            y, sums = Torch.depthwise(self, step, x)
            return _nhwc(y), sums

        y, sums = self._by("depthwise", sizes, partial(configs, shape, pool=step.pool), run, plain)
        return _nchw(y), sums

    def squeeze(self, step: Squeeze, sums: Tensor, places: int) -> Tensor:
        from triscale.kernels.squeeze import configs, squeeze

        n, parts, channels = sums.shape
        squeezed = step.w1.shape[0]

        def run(config: Any) -> Tensor:
            return squeeze(sums, places, step.w1, step.b1, step.w2, step.b2, act=step.act, config=config)

        sizes = {"n": n, "parts": parts, "channels": channels, "squeezed": squeezed}
        options = partial(configs, n, parts, channels, squeezed, shared=self.tune.shared)
        return self._by("squeeze", sizes, options, run, lambda: Torch.squeeze(self, step, sums, places))

    def pointwise(self, x: Tensor, step: Expand | Project | Head, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        return _nchw(self._product(x, step, gate, residual))

    def head(self, step: Head, x: Tensor) -> Tensor:
        if step.weight is None:
            return x.float().mean((2, 3))
        return self._product(x, step, None, None, pool=True).sum(1) / (x.shape[2] * x.shape[3])

    def _product(self, x: Tensor, step: Expand | Project | Head, gate: Tensor | None, residual: Tensor | None, *, pool: bool = False) -> Tensor:
        from triscale.kernels.pointwise import pointwise
        from triscale.kernels.pointwise_tiles import configs

        weight, bias, rows = step.weight, step.bias, _nhwc(x)
        assert weight is not None
        assert bias is not None
        n, height, width, cin = rows.shape
        other = None if residual is None else _nhwc(residual)

        def run(config: Any) -> Tensor:
            return pointwise(rows, weight, bias, act=step.act, gate=gate, residual=other, pool=pool, config=config)

        cout, kind = weight.shape[1], {"gated": gate is not None, "residual": other is not None, "pool": pool}
        options = partial(configs, n * height * width, height * width, cin, cout, **kind, shared=self.tune.shared)
        sizes = {"n": n, "height": height, "width": width, "cin": cin, "cout": cout, **kind}

        def plain() -> Tensor:
            y = Torch.pointwise(self, x, step, gate, residual)
            return y.sum((2, 3), dtype=torch.float32)[:, None] if pool else _nhwc(y)

        return self._by("pointwise", sizes, options, run, plain)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)
