"""Batch norm over the images of several processes, and in one process over groups of images.

The statistics of batch norm decide a training's result, so the number of images that share them is a setting of its own,
apart from how many processes there are. Official rule: `norm_groups`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from triscale import blocks
from triscale.blocks import BatchNorm
from triscale.train.dist import World


def norm_groups(replicas: int) -> int:
    """How many processes share batch-norm statistics: 1 (none) up to 8 processes, else max(8, replicas // 8).

    As there, the number of processes must be a multiple of it, or `share_norms` raises. Source: official utils.py.
    """
    if replicas < 1:
        raise ValueError(f"norm_groups: expected 1 or more processes, found {replicas}")
    return 1 if replicas <= 8 else max(8, replicas // 8)


class Peers:
    """The processes that share a norm's statistics. Not copied with a module: a process group has no copy."""

    def __init__(self, size: int, group: Any) -> None:
        self.size, self.group = size, group

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,), biased variance (C,) and number () of the values in each channel of x (N, C, H, W) in all processes.

        float32 or wider. The parts are joined by their means and variances, as a sum of squares would cancel; they may differ
        in size. Source: Chan, Golub and LeVeque 1979.
        """
        if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()  # else the statistics come in that type, as they don't on CUDA
        # Batch norm's own pass, without running statistics to update: torch.var_mean took 20 times as long on a CPU.
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        own = torch.cat([mean, variance, mean.new_full((1,), x.numel() // x.shape[1])])
        parts = own.new_empty(self.size, len(own))
        dist.all_gather(list(parts.unbind()), own, group=self.group)
        means, variances, counts = torch.split(parts, [len(mean), len(mean), 1], 1)
        count = counts.sum()
        share = counts / count
        mean = (share * means).sum(0)
        return mean, (share * (variances + (means - mean).square())).sum(0), count

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every peer's (n,) values, in their place."""
        dist.all_reduce(values, group=self.group)
        return values


class _Normalise(Function):
    """Affine batch norm by given statistics, whose backward knows that these came from the inputs of all peers.

    The gradient of weight and bias is this process's part: what is done to all gradients (their mean) joins it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor, eps: float, peers: Peers) -> Tensor:
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.peers = eps, peers
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # In evaluation mode this gives sum dy (x - mean) / std and sum dy over this process's values, in one pass.
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(dy, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True])
        dx = None
        if ctx.needs_input_grad[0]:
            total_dweight, total_dbias = ctx.peers.sum(torch.cat([dweight, dbias])).chunk(2)
            # weight / std (dy - mean of dy - x^ mean of dy x^), x^ = (x - mean) / std: written as a dy + b x + c.
            inverse = torch.rsqrt(variance + ctx.eps)
            a = weight * inverse
            b = -a * inverse * total_dweight / count
            c = -a * total_dbias / count - b * mean
            a, b, c = (v.view(1, -1, 1, 1) for v in (a, b, c))
            dx = torch.addcmul(c, x, b).addcmul_(dy, a).to(x.dtype)
        return dx, dweight, dbias, None, None, None, None, None


class SharedBatchNorm(BatchNorm):
    """Batch norm with the statistics of all `peers`' images in training; every peer's running statistics are the same.

    Two collectives a step: one forward (2 C + 1 numbers of each peer), one backward (the sum of 2 C). All peers have to run it
    equally often. Under torch.compile it breaks the graph.
    """

    peers: Peers

    def normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().normalise(x)
        with torch.no_grad():
            mean, variance, count = self.peers.moments(x)
            if not blocks._recomputing:
                kept = variance if self.biased else variance * (count / (count - 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(kept.to(self.running_var.dtype), self.momentum)
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, mean, variance, count, self.eps, self.peers)
        return y


class GhostBatchNorm(BatchNorm):
    """Batch norm of groups of `images` consecutive images each by itself; the running statistics see one group after the other."""

    images: int

    def normalise(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.images:
            return super().normalise(x)
        return torch.cat([BatchNorm.normalise(self, part) for part in torch.split(x, self.images)])


def share_norms(model: nn.Module, world: World, group: int) -> nn.Module:
    """`model`, in place, whose BatchNorms take their training statistics over each `group` consecutive ranks; 1 leaves them alone.

    Parameters, buffers and their names stay. Evaluation gives the same outputs to rounding: ConvNormAct folds plain BatchNorms
    only. Every process has to call it, before `parallel`. Raises ValueError where `group` doesn't divide the processes.
    """
    if group < 1 or world.size % group:
        raise ValueError(f"share_norms: groups of {group} processes don't divide the {world.size} there are")
    if group == 1:
        return model
    mine = None  # torch's name of the group of all processes
    if group < world.size:
        # Every process takes part in making every group, also those it isn't in.
        made = [dist.new_group(list(range(start, start + group))) for start in range(0, world.size, group)]
        mine = made[world.rank // group]
    peers = Peers(group, mine)
    for norm in _plain_norms(model):
        norm.__class__ = SharedBatchNorm  # rather than a new module: parameters, hooks and what refers to it stay
        norm.peers = peers  # type: ignore[assignment]
    return model


def ghost_norms(model: nn.Module, images: int) -> nn.Module:
    """`model`, in place, whose BatchNorms normalise groups of `images` consecutive images of the batch; 0 leaves them alone.

    Outputs and gradients are those of as many processes (or accumulated batches) of `images` each; the last group may be smaller.
    The running statistics are updated group after group: those of accumulation, not the mean that processes make of theirs
    (`average_buffers`). Evaluation as in `share_norms`. Source: Hoffer et al. 2017, arXiv 1705.08741.
    """
    if images < 0:
        raise ValueError(f"ghost_norms: expected 0 or more images, found {images}")
    for norm in _plain_norms(model) if images else ():
        norm.__class__ = GhostBatchNorm
        norm.images = images  # type: ignore[assignment]
    return model


def _plain_norms(model: nn.Module) -> list[BatchNorm]:
    return [m for m in model.modules() if type(m) is BatchNorm]
