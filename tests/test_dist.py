"""Several processes against one: steps, batch norm in groups, sharded optimisers, restarts. All over gloo on 127.0.0.1.

Run as a program this file is the processes: it imports torch once, forks them, and each writes what it found to a file.
"""

import copy
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.autograd import Function

import triscale as ts
from triscale.blocks import BatchNorm
from triscale.train import dist
from triscale.train.dist import World
from triscale.train.syncnorm import GhostBatchNorm, SharedBatchNorm, ghost_norms, norm_groups, share_norms

ALONE = World(0, 1, 0, torch.device("cpu"))
NUMERICS = ts.Numerics(drop_path=0.0, norm_momentum=0.1)
STAGES = (
    ts.Stage("mbconv", 3, 1, 1, 0.25, "identity", 8, 1),
    ts.Stage("mbconv", 3, 2, 4, 0.25, "identity", 16, 2),
    ts.Stage("mbconv", 5, 2, 4, 0.25, "identity", 24, 1),
)
NET = ts.Arch(ts.Stem(8), STAGES, ts.Head(32), 32, 0.0, NUMERICS)
BATCH, STEPS, CLASSES = 16, 5, 4


def fresh(dtype=torch.float64, arch=NET):
    torch.manual_seed(0)
    return ts.build(arch, CLASSES).to(dtype)


def batches(dtype=torch.float64, steps=STEPS):
    """Every step's (BATCH, 3, 32, 32) images, brighter from one to the next so that groups differ, and labels."""
    g = torch.Generator().manual_seed(1)
    bright = torch.linspace(-1, 1, BATCH).view(-1, 1, 1, 1)
    return [(torch.randn(BATCH, 3, 32, 32, generator=g).add(bright).to(dtype), torch.randint(CLASSES, (BATCH,), generator=g)) for _ in range(steps)]


def train(model, w, dtype=torch.float64, optimizer=None, steps=STEPS):
    """Global losses, the gradients of each step and the buffers after the last, of SGD on this process's part of each batch."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    n, losses, grads = dist.local_batch(BATCH, w), [], []
    for x, y in batches(dtype, steps):
        loss = F.cross_entropy(model(x[w.rank * n :][:n]), y[w.rank * n :][:n])
        optimizer.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        losses += dist.mean([loss.item()], w)
    inner = getattr(model, "module", model)
    return {"losses": losses, "grads": grads, "buffers": dict(inner.named_buffers()), "weights": [p.detach() for p in inner.parameters()]}


def error(got, expected):
    """The largest difference as a share of the largest value, of numbers or of tensors each by itself.

    Values below 1e-2 count as that: the gradient of a norm's bias that the next norm takes away is 0 but for rounding.
    """
    pairs = ((torch.as_tensor(v, dtype=torch.float64) for v in pair) for pair in zip(got, expected, strict=True))
    return max((a - b).abs().max().item() / max(b.abs().max().item(), 1e-2) for a, b in pairs)


def errors(got, expected):
    flat = [[g for step in r["grads"] for g in step] for r in (got, expected)]
    kinds = [[r["buffers"][k] for k in expected["buffers"]] for r in (got, expected)]
    return error(got["losses"], expected["losses"]), error(*flat), error(*kinds)


# ---- what the processes do


class Everywhere(Function):
    """The same tensor in all processes: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        dy = dy.contiguous().clone()
        torch.distributed.all_reduce(dy)
        return dy


class Joined(Function):
    """The processes' tensors behind each other, in all of them."""

    @staticmethod
    def forward(ctx, x):
        ctx.rows, parts = len(x), [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, dy):
        return dy[torch.distributed.get_rank() * ctx.rows :][: ctx.rows].contiguous()


def gradients_check(w):
    """gradcheck of the shared norm as one function of the whole batch, weight and bias; uneven parts have their own test."""
    norm = share_norms(BatchNorm(3, NUMERICS).double(), w, w.size)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) for s in ((4, 3, 2, 3), (3,), (3,)))

    def whole(x, weight, bias):
        part = Everywhere.apply(x)[w.rank * 2 :][:2]
        return Joined.apply(torch.func.functional_call(norm, {"weight": Everywhere.apply(weight), "bias": Everywhere.apply(bias)}, (part,)))

    return torch.autograd.gradcheck(whole, [t.requires_grad_() for t in (x, weight, bias)], atol=1e-8, rtol=1e-6)


def uneven_parts(w):
    """3 and 5 images: output, input gradient and running statistics of this process's."""
    norm = share_norms(BatchNorm(3, replace(NUMERICS, running_variance="unbiased")).double(), w, w.size)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = (x[:3] if w.rank == 0 else x[3:]).requires_grad_()
    y = norm(x)
    (y * y.detach().cos()).sum().backward()
    return y.detach(), x.grad, norm.running_mean, norm.running_var


def half_precision(w):
    """Errors of output and input gradient of the shared norm in bfloat16 against float64 on the same numbers."""
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(w.rank)).add(3).bfloat16().to(memory_format=torch.channels_last)
    out = []
    for dtype in (torch.bfloat16, torch.float64):
        norm = share_norms(BatchNorm(8, NUMERICS), w, w.size).to(torch.float32 if dtype is torch.bfloat16 else dtype)
        z = x.detach().to(dtype).requires_grad_()
        y = norm(z)
        (y * x.sin().to(dtype)).sum().backward()
        out.append((y.detach().double(), z.grad.double(), norm.running_var.double()))
    return [error([a], [b]) for a, b in zip(*out, strict=True)]


def told(work):
    try:
        work()
    except ValueError as problem:
        return str(problem)
    return None


def two(w, folder):
    found = {"world": (w.rank, w.size, w.local_rank, str(w.device))}
    found["mean"] = dist.mean([w.rank, 2.5, 1e300], w)
    found["any"] = [dist.any_true(f, w) for f in (False, w.rank == 1, True)]
    recipe = '{"epochs": 350, "batch_size": 4096, "lr": 0.256, "seed": %d, "ema": 0.9999, "optimizer": "rmsprop"}'
    found["same"] = told(lambda: dist.same_everywhere(recipe % 5, w))
    found["differ"] = told(lambda: dist.same_everywhere(recipe % (5 + 2 * w.rank), w))
    found["longer"] = told(lambda: dist.same_everywhere("photos" + ", more" * w.rank, w))
    found["gathered"] = dist.gathered({"rank": w.rank, "of": torch.full((3 * w.rank,), 0.5)}, w)
    found["told"] = dist.told(lambda: (w.rank, torch.arange(3)), w)
    found["odd"] = told(lambda: dist.local_batch(15, w))
    found["groups"] = told(lambda: share_norms(fresh(), w, 3))
    found["gradcheck"], found["uneven"], found["half"] = gradients_check(w), uneven_parts(w), half_precision(w)
    for dtype in (torch.float64, torch.float32):
        found["shared", dtype] = train(dist.parallel(share_norms(fresh(dtype), w, 2), w), w, dtype)
        model = dist.parallel(fresh(dtype), w)
        found["apart", dtype] = train(model, w, dtype)
        found["apart", dtype]["own"] = {k: v.clone() for k, v in model.named_buffers()}
        dist.average_buffers(model, w)
    again = share_norms(fresh(), w, 2)
    again.recompute = True
    found["recompute"] = train(dist.parallel(again, w), w)
    net = again.eval()
    plain = fresh()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        x = batches()[0][0]
        found["evaluated"] = [m(x) for m in (net, copy.deepcopy(net), plain.eval())]
    torch.manual_seed(w.rank)
    other = ts.build(NET, CLASSES)
    for buffer in other.buffers():
        buffer.add_(w.rank)
    found["start"] = [p.detach().clone() for p in dist.parallel(other, w).module.state_dict().values()]
    model = dist.parallel(fresh().to(memory_format=torch.channels_last), w)
    optimizer = dist.sharded(torch.optim.AdamW, groups_of(model), w, lr=0.01, eps=1e-3)
    found["sharded"], found["held"] = train(model, w, optimizer=optimizer), len(optimizer.optim.state)
    found["state"] = dist.full_state(optimizer, w)
    if w.rank == 0:
        torch.save({"model": model.module.state_dict(), "optimizer": found["state"]}, folder / "checkpoint.pt")
    found["fsdp"] = fully_sharded(w)
    return found


def groups_of(model):
    weights = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]


def fully_sharded(w):
    """Losses and whole weights after training with FSDP2, and how many of them this process holds."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = dist.shard_model(share_norms(fresh(), w, 2), w)
    optimizer, n, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), BATCH // w.size, []
    for x, y in batches():
        loss = F.cross_entropy(model(x[w.rank * n :][:n]), y[w.rank * n :][:n])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += dist.mean([loss.item()], w)
    held = sum(p.to_local().numel() for p in model.parameters())
    return losses, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), held


def four(w, folder):
    found = {"grouped": train(dist.parallel(share_norms(fresh(), w, 2), w), w)}
    saved = torch.load(folder / "checkpoint.pt")
    model = fresh()
    model.load_state_dict(saved["model"])
    model = dist.parallel(share_norms(model, w, 4), w)
    optimizer = dist.sharded(torch.optim.AdamW, groups_of(model), w, lr=0.5)  # the rate comes from the checkpoint
    dist.load_full_state(optimizer, saved["optimizer"])
    found["went on"] = train(model, w, optimizer=optimizer, steps=2)
    found["state"] = dist.full_state(optimizer, w)
    return found


def left(w, folder):
    """Seconds until this process is told that process 1 has gone, and what it is told."""
    if w.rank == 1:
        return None
    start, why = time.perf_counter(), ""
    try:
        dist.gathered(torch.zeros(9), w)
    except RuntimeError as error:
        why = str(error)
    return time.perf_counter() - start, why


SCENARIOS = ((two, 2), (four, 4), (left, 3))


def main(folder):
    # What the processes would each import for themselves.
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.optim

    for scenario, size in SCENARIOS:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(size)}
        start, children = time.perf_counter(), []
        for rank in range(size):
            if pid := os.fork():
                children.append(pid)
                continue
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with dist.world("cpu") as w:
                    found = scenario(w, folder)
                torch.save(found, folder / f"{scenario.__name__}-{rank}.pt")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        statuses = [os.waitpid(pid, 0)[1] for pid in children]
        print(scenario.__name__, f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
        if any(statuses):
            return 1
    return 0


# ---- what is asked of it


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process of each scenario found."""
    folder = tmp_path_factory.mktemp("processes")
    start = time.perf_counter()
    run = subprocess.run([sys.executable, __file__, folder], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    print(f"processes: {time.perf_counter() - start:.1f} s\n{run.stderr}")
    assert "Warning" not in run.stderr, run.stderr
    return {f.__name__: [torch.load(folder / f"{f.__name__}-{rank}.pt", weights_only=False) for rank in range(n)] for f, n in SCENARIOS}


@pytest.fixture(scope="module")
def one():
    """One process with the whole batch."""
    return {dtype: train(fresh(dtype), ALONE, dtype) for dtype in (torch.float64, torch.float32)}


def test_what_processes_tell_each_other(processes):
    first, second = processes["two"]
    assert (first["world"], second["world"]) == ((0, 2, 0, "cpu"), (1, 2, 1, "cpu"))
    for found in (first, second):
        assert found["mean"] == [0.5, 2.5, 1e300]
        assert found["any"] == [False, True, True]
        assert found["same"] is None
        assert found["differ"].startswith("process 1 of 2 and process 0 differ; process 0 has ")
        assert '"seed": 5,' in found["differ"].split("process 1 has")[0]
        assert '"seed": 7,' in found["differ"].split("process 1 has")[1]
        assert found["longer"].endswith("process 0 has 'photos', process 1 has 'photos, more'")
        assert found["odd"] == "a batch of 15 images doesn't divide among 2 processes; give a multiple of 2"
        assert found["groups"] == "share_norms: groups of 3 processes don't divide the 2 there are"


def test_what_is_gathered_in_process_0_and_what_it_tells(processes):
    first, second = processes["two"]
    assert second["gathered"] is None
    assert [part["rank"] for part in first["gathered"]] == [0, 1]
    assert [part["of"].tolist() for part in first["gathered"]] == [[], [0.5, 0.5, 0.5]]
    for found in (first, second):
        assert found["told"][0] == 0
        assert found["told"][1].tolist() == [0, 1, 2]


def test_nobody_waits_for_one_that_has_left(processes):
    """Of three, in the gathering that an evaluation ends in: process 1 has left, as an error makes it."""
    (first, why), nothing, (last, _) = processes["left"]
    assert nothing is None
    assert max(first, last) < 10
    assert "closed" in why or "reset" in why


def test_all_start_from_the_weights_of_rank_0(processes):
    expected = fresh(torch.float32).state_dict()
    for found in processes["two"]:
        assert all(torch.equal(a, b) for a, b in zip(found["start"], expected.values(), strict=True))


def test_shared_norms_train_as_one_process_with_the_whole_batch(processes, one):
    """Losses, every gradient of every step, running statistics: equal to rounding, where norms apart are far off."""
    for dtype, limits in ((torch.float64, (1e-12, 1e-10, 1e-12)), (torch.float32, (1e-5, 1e-5, 5e-6))):
        for found in processes["two"]:
            measured = errors(found["shared", dtype], one[dtype])
            print(dtype, measured)
            assert all(m < limit for m, limit in zip(measured, limits, strict=True)), measured
    assert error(processes["two"][0]["apart", torch.float64]["losses"], one[torch.float64]["losses"]) > 1e-3
    assert errors(processes["two"][0]["recompute"], one[torch.float64])[2] < 1e-12


def test_the_shared_norms_gradient(processes):
    assert all(found["gradcheck"] for found in processes["two"])


def test_parts_of_unequal_size_share_exactly(processes):
    norm = BatchNorm(3, replace(NUMERICS, running_variance="unbiased")).double()
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = norm(x)
    (y * y.detach().cos()).sum().backward()
    (y0, dx0, *stats0), (y1, dx1, *stats1) = (found["uneven"] for found in processes["two"])
    assert error([torch.cat([y0, y1]), torch.cat([dx0, dx1])], [y.detach(), x.grad]) < 1e-12
    for stats in (stats0, stats1):
        assert error(stats, [norm.running_mean, norm.running_var]) < 1e-12


def test_half_precision_keeps_the_statistics_in_float32(processes):
    """bfloat16 has 8 bits: output and gradient are rounded once, and the variance, about a mean of 3, not at all."""
    for found in processes["two"]:
        output, gradient, variance = found["half"]
        assert output < 2**-8
        assert gradient < 2**-8
        assert variance < 1e-6


def test_evaluation_is_the_plain_networks(processes):
    for found in processes["two"]:
        shared, copied, plain = found["evaluated"]
        assert torch.equal(shared, copied)
        assert error([shared], [plain]) < 1e-12


def ghosts(dtype=torch.float64, images=BATCH // 2):
    """A network of ghost norms, trained, with the batch statistics of every group of every step."""
    model, seen = ghost_norms(fresh(dtype), images), {}
    names = {m: name for name, m in model.named_modules()}

    def look(module, inputs):
        for part in inputs[0].detach().split(images):
            variance, mean = torch.var_mean(part, (0, 2, 3), correction=0)
            seen.setdefault(names[module] + ".running_mean", []).append(mean)
            seen.setdefault(names[module] + ".running_var", []).append(variance)

    for m in names:
        if isinstance(m, GhostBatchNorm):
            m.register_forward_pre_hook(look)
    return train(model, ALONE, dtype), seen


@pytest.mark.parametrize(("dtype", "limits"), [(torch.float64, (1e-12, 1e-10, 1e-12)), (torch.float32, (1e-5, 1e-5, 5e-6))])
def test_norms_apart_train_as_ghost_norms_in_one_process(processes, dtype, limits):
    """Losses and gradients are equal. Averaged running statistics are the exponential average of the mean of the groups' statistics;
    those of ghost norms decay once for each group, so they differ."""
    expected, seen = ghosts(dtype)
    first = {k: (0.0 if k.endswith("mean") else 1.0) for k in seen}
    averaged, one_by_one = dict(first), dict(first)
    for name, parts in seen.items():
        for a, b in zip(parts[::2], parts[1::2], strict=True):
            averaged[name] = 0.9 * averaged[name] + 0.1 * (a + b) / 2
            one_by_one[name] = 0.9 * (0.9 * one_by_one[name] + 0.1 * a) + 0.1 * b
    for found in processes["two"]:
        found = found["apart", dtype]
        measured = *errors(found, expected)[:2], error([found["buffers"][k] for k in seen], list(averaged.values()))
        print(dtype, measured, "ghost's statistics against averaged ones:", errors(found, expected)[2])
        assert all(m < limit for m, limit in zip(measured, limits, strict=True)), measured
        assert errors(found, expected)[2] > 0.01
    assert error([expected["buffers"][k] for k in seen], list(one_by_one.values())) < limits[2]
    own = [found["apart", dtype]["own"] for found in processes["two"]]
    assert error([own[0]["module.stem.norm.running_mean"]], [own[1]["module.stem.norm.running_mean"]]) > 0.01


def test_groups_are_consecutive_ranks(processes):
    """Four processes in groups of two are one process with ghost norms of half the batch."""
    expected, _ = ghosts()
    grouped = [found["grouped"] for found in processes["four"]]
    for found in grouped:
        assert errors(found, expected)[0] < 1e-12
        assert errors(found, expected)[1] < 1e-10
    means = [found["buffers"]["head.norm.running_mean"] for found in grouped]
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[2], means[3])
    assert not torch.equal(means[0], means[2])


def test_ghost_norms_of_all_images_or_none_are_plain(one):
    assert type(ghost_norms(fresh(), 0).stem.norm) is BatchNorm
    assert max(errors(train(ghost_norms(fresh(), BATCH), ALONE), one[torch.float64])) == 0
    assert set(ghost_norms(fresh(), 4).state_dict()) == set(fresh().state_dict())
    with pytest.raises(ValueError, match="expected 0 or more"):
        ghost_norms(fresh(), -1)


def test_a_sharded_optimiser_steps_as_the_plain_one(processes):
    """AdamW with two groups, in two processes, then from the checkpoint in four and in one: the same weights to rounding."""
    model = ghost_norms(fresh(), BATCH // 2)
    plain = torch.optim.AdamW(groups_of(model), lr=0.01, eps=1e-3)
    expected = train(model, ALONE, optimizer=plain)
    held = [found["held"] for found in processes["two"]]
    assert sum(held) == len(expected["weights"])
    assert min(held) > 0
    for found in processes["two"]:
        assert error(found["sharded"]["losses"], expected["losses"]) < 1e-9
        assert error(found["sharded"]["weights"], expected["weights"]) < 1e-9
    state, there = processes["two"][0]["state"], plain.state_dict()
    assert processes["two"][1]["state"] is None
    assert [g["params"] for g in state["param_groups"]] == [g["params"] for g in there["param_groups"]]
    assert [g["weight_decay"] for g in state["param_groups"]] == [0.1, 0.0]
    keys = [(i, k) for i in there["state"] for k in there["state"][i]]
    assert error([state["state"][i][k] for i, k in keys], [there["state"][i][k] for i, k in keys]) < 1e-9


def test_a_sharded_state_goes_on_in_another_number_of_processes(processes):
    model = ghost_norms(fresh(), BATCH // 2)
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01, eps=1e-3)
    train(model, ALONE, optimizer=optimizer)
    for m in model.modules():
        if isinstance(m, GhostBatchNorm):
            m.images = BATCH
    whole = train(model, ALONE, optimizer=optimizer, steps=2)
    for found in processes["four"]:
        assert error(found["went on"]["losses"], whole["losses"]) < 1e-9
        assert error(found["went on"]["weights"], whole["weights"]) < 1e-8
    alone = fresh()
    optimizer = dist.sharded(torch.optim.AdamW, groups_of(alone), ALONE, lr=0.5)
    state = processes["four"][0]["state"]
    dist.load_full_state(optimizer, state)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert len(optimizer.state) == len(state["state"]) == len(list(alone.parameters()))
    assert dist.full_state(optimizer, ALONE)["state"].keys() == state["state"].keys()


def test_fully_sharded_weights_train_as_whole_ones(processes, one):
    expected = one[torch.float64]
    for found, rank in zip(processes["two"], (0, 1), strict=True):
        losses, state, held = found["fsdp"]
        assert error(losses, expected["losses"]) < 1e-12
        total = sum(w.numel() for w in expected["weights"])
        assert 0.4 * total < held < 0.6 * total
        if rank == 0:
            assert list(state) == list(fresh().state_dict())
            assert error([state[k] for k, _ in fresh().named_parameters()], expected["weights"]) < 1e-11


# ---- one process


def test_how_many_processes_share_norms():
    assert [norm_groups(n) for n in range(1, 9)] == [1] * 8
    assert [norm_groups(n) for n in (16, 64, 128, 512)] == [8, 8, 16, 64]
    with pytest.raises(ValueError, match="expected 1 or more processes"):
        norm_groups(0)


def test_a_single_process_has_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    net = fresh()
    with dist.world("cpu") as w:
        assert w == ALONE
        assert not torch.distributed.is_initialized()
        assert dist.parallel(net, w) is net
        assert dist.shard_model(net, w) is net
        assert share_norms(net, w, 1) is net
        assert not any(isinstance(m, SharedBatchNorm) for m in net.modules())
        assert dist.mean([1, 2.5], w) == [1.0, 2.5]
        assert dist.any_true(True, w)
        assert not dist.any_true(False, w)
        dist.same_everywhere("a", w)
        dist.average_buffers(net, w)
        assert dist.local_batch(7, w) == 7
        assert dist.gathered("a", w) == ["a"]
        assert dist.told(lambda: "a", w) == "a"
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), fresh().state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("variables", "device", "kind", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "cpu", ValueError, "found RANK 2 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "cpu", ValueError, "variable RANK, found 'one'"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "abacus", ValueError, "device abacus: "),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "9999"}, "cuda", ValueError, "local process 9999"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "cpu", ConnectionError, "process 1 of 2 found no others at no MASTER_ADDR"),
    ],
)
def test_a_world_that_cannot_be_is_told_in_one_line(variables, device, kind, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=message) as raised, dist.world(device):
        pass
    assert "\n" not in str(raised.value)


# ---- a process that dies

JOB = """
import os, signal, sys
from pathlib import Path
from triscale.train.dist import mean, world

folder, attempt = Path(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"]
with world("cpu") as w:
    saved = folder / "step"
    step = int(saved.read_text()) if saved.exists() else 0
    while step < 6:
        step += 1
        total = mean([step + w.rank], w)  # needs both
        with open(folder / f"log-{w.rank}", "a") as log:
            print(attempt, step, *total, file=log)
        if (w.rank, step, attempt) == (1, 4, "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        if w.rank == 0:
            (folder / "new").write_text(str(step))
            os.replace(folder / "new", saved)
"""


def test_a_killed_process_restarts_the_job_from_its_checkpoint(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    line = ["--standalone", "--local-addr=127.0.0.1", "--max-restarts=1", "--nproc-per-node=2", str(tmp_path / "job.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", *line], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert f"{-signal.SIGKILL}" in run.stderr  # the agent says what ended the process
    for rank in (0, 1):
        log = [tuple(map(float, row.split())) for row in (tmp_path / f"log-{rank}").read_text().splitlines()]
        before, after = ([step for attempt, step, _ in log if attempt == a] for a in (0, 1))
        assert before[:3] == [1, 2, 3]
        assert before[-1] <= 4
        assert after[0] in (4, 5)  # rank 0 may or may not have saved step 4 before it was stopped
        assert after == list(range(int(after[0]), 7))
        assert all(total == step + 0.5 for _, step, total in log)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
