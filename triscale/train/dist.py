"""Training on many devices and machines: the processes that torchrun starts, and what they tell each other.

Every process runs the same program on its own part of each batch. A single process needs no group, and all functions here
leave its values as they are.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from triscale.text import first_line

T = TypeVar("T")
# A peer that says nothing for so long has failed: longer than any step, save, compilation or batch of an evaluation, by which
# the processes' parts of it differ; shorter than a night. A process that is killed is noticed at once on gloo and by torchrun.
PATIENCE = timedelta(minutes=30)
SHOWN = 40  # characters of a text shown on either side of a difference


@dataclass(frozen=True)
class World:
    """This process among those of a training: its rank 0 .. size - 1, its number on this machine, its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """The processes that torchrun's RANK, WORLD_SIZE and LOCAL_RANK tell of, joined until the block ends; else this one alone.

    device: auto (cuda where there is one, else cpu), cuda (of several processes each takes the one of its local rank), or another
    of torch's. Messages go over gloo, tensors on CUDA over nccl. Raises ValueError for variables or a device that can't be,
    ConnectionError where the processes don't meet.
    """
    rank, size, local_rank = (_variable(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not 0 <= rank < size:
        raise ValueError(f"world: expected RANK from 0 to WORLD_SIZE - 1, found RANK {rank} of {size}")
    place = _device(device, local_rank, size)
    here = World(rank, size, local_rank, place)
    if size == 1:
        yield here
        return
    _meet(rank, size, "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield here
    finally:
        dist.destroy_process_group()


def _meet(rank: int, size: int, backend: str) -> None:
    """Joins the process group. gloo on CUDA too: numbers that are on the CPU anyway then make no process wait for its GPU."""
    try:
        store = _fresh(next(iter(rendezvous("env://", rank, size, timeout=PATIENCE)))[0], rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError; a variable that is missing a ValueError
        where = f"{os.environ.get('MASTER_ADDR', 'no MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'no MASTER_PORT')}"
        raise ConnectionError(f"process {rank} of {size} found no others at {where}: {first_line(error)}") from None


def _fresh(store: Store, rank: int, size: int) -> Store:
    """`store` under a prefix that the processes of this start alone know: rank 0's token, handed to each by a name of its own.

    torchrun (2.11 to 2.15) keeps its store when it restarts processes, and with it the addresses of those that are dead: a
    process that reads them waits for ever, in most restarts on a busy machine. Its count of restarts, which could tell them
    apart, differs between machines.
    """
    own = uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        token = store.get(f"answer/{own}").decode()  # waits for rank 0 of this start: no other knows the name
        store.set(f"has/{token}/{rank}", "")
        return PrefixStore(token, store)
    waiting, answered, end = set(range(1, size)), set(), time.monotonic() + PATIENCE.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"has/{own}/{other}"]):
                waiting.remove(other)
            elif store.check([f"asks/{other}"]) and (name := store.get(f"asks/{other}").decode()) not in answered:
                store.set(f"answer/{name}", own)  # a dead process's name gets an answer that nobody reads; then the next one
                answered.add(name)
        if waiting and time.monotonic() > end:
            raise RuntimeError(f"process {min(waiting)} hasn't come in {PATIENCE}")
        time.sleep(0.01)
    return PrefixStore(own, store)


def _variable(name: str, default: int) -> int:
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return default
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"world: expected a whole number in the variable {name}, found {text!r}")
    return int(text)


def _device(name: str, local_rank: int, size: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and size > 1:
        if local_rank >= torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise ValueError(
                f"device {name}: local process {local_rank}, but {there} devices here; start one process a device (--nproc-per-node=gpu)"
            )
        torch.cuda.set_device(local_rank)
        name = f"cuda:{local_rank}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"device {name}: {first_line(error)}") from None


def local_batch(images: int, world: World) -> int:
    """How many of the global batch's `images` each process takes. Raises ValueError where they don't divide: the mean over
    processes is the mean over images only for equal parts."""
    if images < world.size or images % world.size:
        raise ValueError(f"a batch of {images} images doesn't divide among {world.size} processes; give a multiple of {world.size}")
    return images // world.size


def parallel(model: nn.Module, world: World, *, find_unused: bool = False) -> nn.Module:
    """`model` whose backward leaves the mean of all processes' gradients, and that starts from rank 0's weights and buffers.

    A single process gets `model` itself. Running statistics stay each process's own: see `average_buffers`. find_unused: for a
    step that leaves parameters out. The module inside is `.module`.
    """
    if world.size == 1:
        return model
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)  # parameters DDP sends itself
    # 1x1 weights of channels-last networks: their gradients come with the other name of the same layout, and are copied.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    wrapper: Any = nn.parallel.DistributedDataParallel
    # torch 2.15 has a new name for it and warns of the old one.
    no_buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature(wrapper).parameters else "broadcast_buffers"
    devices = [world.device] if world.device.type == "cuda" else None
    # No static_graph: it forbids a step that differs (the last of an accumulation, an adversarial one), and was no faster here.
    options = {"gradient_as_bucket_view": True, "find_unused_parameters": find_unused, no_buffers: False}
    replica: nn.Module = wrapper(model, device_ids=devices, **options)
    return replica


def mean(values: Sequence[float], world: World) -> list[float]:
    """The mean of each value over the processes, the same in all, in float64; NaN where one has NaN. As many values in each."""
    if world.size == 1:
        return [float(v) for v in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    result: list[float] = (total / world.size).tolist()
    return result


def any_true(flag: bool, world: World) -> bool:
    """Whether one process says so. All have to ask: then a signal that reaches one of them stops all at the same step."""
    if world.size == 1:
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


@torch.no_grad()
def average_buffers(model: nn.Module, world: World) -> None:
    """Floating-point buffers become their mean over the processes, in place: one collective for each kind of number.

    For running statistics that is the right join: an exponential average is linear, so the mean of the processes' averages of
    equal decay is the average, with that decay, of the mean of their batches' statistics. It holds whenever, and however often,
    it is done.
    """
    if world.size == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        if buffer.is_floating_point():
            kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        flat = torch.cat([b.flatten() for b in buffers])
        dist.all_reduce(flat)
        for buffer, values in zip(buffers, torch.split(flat / world.size, [b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def same_everywhere(text: str, world: World) -> None:
    """Raises ValueError in every process where `text` (a recipe, a fingerprint of the data) isn't rank 0's in all of them.

    The message names the processes that differ, and shows the first difference of the first of them.
    """
    if world.size == 1:
        return
    texts: list[str] = [""] * world.size
    dist.all_gather_object(texts, text)
    other = [rank for rank in range(world.size) if texts[rank] != texts[0]]
    if not other:
        return
    ours, theirs = texts[0], texts[other[0]]
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [repr(t[max(at - SHOWN, 0) : at + SHOWN]) for t in (ours, theirs)]
    some = ", ".join(map(str, other[:8])) + (f" and {len(other) - 8} more" if len(other) > 8 else "")
    name = "processes" if len(other) > 1 else "process"
    raise ValueError(f"{name} {some} of {world.size} and process 0 differ; process 0 has {shown[0]}, process {other[0]} has {shown[1]}")


def everyones(texts: Sequence[str], world: World) -> list[str]:
    """The texts of all processes, in the order of their ranks, each once; every process has to ask."""
    parts: list[Sequence[str]] = [texts] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, list(texts))
    return list(dict.fromkeys(text for part in parts for text in part))


def gathered(value: T, world: World) -> list[T] | None:
    """Every process's value, in the order of their ranks: in process 0, None in the others. All have to call it, with what pickles."""
    if world.size == 1:
        return [value]
    parts: list[Any] | None = None if world.rank else [None] * world.size
    dist.gather_object(value, parts, dst=0)
    return parts


def told(make: Callable[[], T], world: World) -> T:
    """What process 0 alone makes, in every process: all have to ask. It has to pickle."""
    said: list[Any] = [None if world.rank else make()]
    if world.size > 1:
        dist.broadcast_object_list(said, src=0)
    value: T = said[0]
    return value


# ---- networks whose training state is too large for one device (EfficientNet-L2)


def sharded(optimizer_class: type[torch.optim.Optimizer], groups: Iterable[Any], world: World, **options: Any) -> torch.optim.Optimizer:
    """An optimiser of which each process holds and steps a part (ZeRO stage 1); the plain one in a single process.

    groups: parameters, or torch's groups of them. Steps are those of the plain optimiser. Its own state_dict needs `full_state`
    first. Source: Rajbhandari et al. 2020, arXiv 1910.02054.
    """
    groups = list(groups)
    if world.size == 1:
        return optimizer_class(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, optimizer_class=optimizer_class, **options)


def full_state(optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any] | None:
    """The whole state of a `sharded` optimiser, as a plain one's state_dict: in rank 0, None elsewhere. All have to call it."""
    if world.size == 1:
        return optimizer.state_dict()
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
    return optimizer.state_dict() if world.rank == 0 else None


def load_full_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `full_state` gave in rank 0, in every process: of as many processes as there are now, sharded or not."""
    # torch's sharded loader empties entries of the dictionary it is given.
    optimizer.load_state_dict({**state, "state": dict(state["state"])})


def shard_model(model: nn.Module, world: World) -> nn.Module:
    """`model`, in place, with parameters, gradients and optimiser state split over the processes (FSDP2), block by block.

    Instead of `parallel`, and after `share_norms`; the optimiser is a plain one, made afterwards. Buffers stay whole in each
    process. torch.distributed.checkpoint.state_dict gathers and loads its state. A single process gets `model` as it is.
    """
    if world.size == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from triscale.blocks import Residual

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in [m for m in model.modules() if isinstance(m, Residual)]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
