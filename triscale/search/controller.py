"""The controller of MnasNet (arXiv 1807.11626, section 4.3; Zoph & Le, arXiv 1611.01578): an LSTM that writes a network down.

It makes one decision after the other by a softmax and reads each choice before the next. Proximal policy optimisation (PPO, arXiv
1707.06347) makes points of a high value more likely. Nothing here knows Optuna.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from triscale.search.evolution import Outcome
from triscale.search.space import Point

MOST = 10.0  # of an advantage, in spreads


@dataclass(frozen=True)
class PPO:
    """hidden: width of the LSTM and its embeddings. batch: outcomes an update. epochs: steps an update. rate: of Adam. clip: of the ratio
    of a whole point's probabilities. entropy: weight of the mean entropy of a decision, in nats, beside advantages of spread 1. decay: of
    the moving averages, an update.

    The defaults are the best of some 25 settings on the score of tests/test_samplers.py, 500 trials, 4 to 8 seeds.
    """

    hidden: int = 32
    batch: int = 10
    epochs: int = 2
    rate: float = 0.01
    clip: float = 0.2
    entropy: float = 0.1
    decay: float = 0.8

    def __post_init__(self) -> None:
        if min(self.hidden, self.batch, self.epochs) < 1 or not (self.rate > 0 and self.clip > 0 and self.entropy >= 0 and 0 <= self.decay < 1):
            raise ValueError(f"PPO: expected hidden, batch, epochs, rate and clip above 0, entropy from 0 and decay in [0, 1), found {self}")


def clipped(logp: Tensor, before: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's objective, to be maximised: the mean of min(r A, clamp(r, 1 - clip, 1 + clip) A), with r = exp(logp - before). All (N,)."""
    ratio = torch.exp(logp - before)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


@dataclass
class Baseline:
    """Moving averages of the mean and spread of values. Advantages don't depend on the scale of the score."""

    decay: float
    mean: float = 0.0
    spread: float = 0.0
    updates: int = 0

    def advantages(self, values: Sequence[float]) -> list[float]:
        """(value - mean) / spread by what was known before these values, the first time by themselves; within +-MOST.

        The spread is at least that of these values: after a batch of nearly equal ones, known spreads would blow the next up.
        """
        mean = sum(values) / len(values)
        if not self.updates:
            self.mean = mean
        spread = math.sqrt(sum((v - self.mean) ** 2 for v in values) / len(values))
        if not self.updates:
            self.spread = spread
        by = max(self.spread, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)))
        flat = by <= 1e-9 * max(abs(self.mean), abs(mean))  # rounding
        out = [0.0 if flat else min(max((v - self.mean) / by, -MOST), MOST) for v in values]
        self.mean = self.decay * self.mean + (1 - self.decay) * mean
        self.spread = self.decay * self.spread + (1 - self.decay) * spread
        self.updates += 1
        return out


class Policy(nn.Module):
    """Probabilities of points. Starts even: the heads are 0. The same weights each time, whatever torch's generator holds."""

    allowed: Tensor
    offsets: Tensor
    embed: nn.Embedding
    lstm: nn.LSTM

    def __init__(self, sizes: Sequence[int], hidden: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(1 + sum(sizes), hidden)  # 0 starts; then each decision's choices
            self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.heads = nn.Parameter(torch.zeros(len(sizes), max(sizes), hidden))
        self.bias = nn.Parameter(torch.zeros(len(sizes), max(sizes)))
        self.register_buffer("allowed", torch.arange(max(sizes)) < torch.tensor(sizes)[:, None])
        self.register_buffer("offsets", torch.tensor([1, *accumulate(sizes, initial=1)][1:-1]))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """points: (N, D) int64. Returns log-probability (N,) and the mean entropy of a decision (N,), both in nats."""
        tokens = torch.cat([torch.zeros_like(points[:, :1]), (points + self.offsets)[:, :-1]], 1)
        states_NDH, _ = self.lstm(self.embed(tokens))
        logits = torch.einsum("ndh,dch->ndc", states_NDH, self.heads) + self.bias
        logp_NDC = logits.masked_fill(~self.allowed, -1e9).log_softmax(2)
        chosen = logp_NDC.gather(2, points[:, :, None])[:, :, 0]
        return chosen.sum(1), -(logp_NDC.exp() * logp_NDC).sum(2).mean(1)


class Sampling:
    """The policy's weights as arrays. One point at a time, small matrices: NumPy takes a fraction of torch's time."""

    def __init__(self, policy: Policy, sizes: Sequence[int]) -> None:
        hidden = policy.lstm.hidden_size
        of_input, of_state, *biases = policy.lstm.parameters()
        with torch.no_grad():
            inputs = policy.embed.weight @ of_input.T + sum(biases)
            gates, heads, bias = (t.numpy().astype(np.float64) for t in (of_state, policy.heads, policy.bias))
        # sigmoid(x) = (1 + tanh(x / 2)) / 2, so that one tanh serves all four gates: input, forget, cell, output.
        half = np.repeat([0.5, 0.5, 1.0, 0.5], hidden)
        self.inputs, self.gates = inputs.detach().numpy() * half, gates * half[:, None]
        self.heads = [(heads[i, :n].copy(), bias[i, :n].copy()) for i, n in enumerate(sizes)]
        self.hidden = hidden

    def draw(self, rng: random.Random) -> tuple[Point, float]:
        """A point and its log-probability."""
        n, row, logp, point = self.hidden, 0, 0.0, []
        h, c, token = np.zeros(n), np.zeros(n), 0
        for head, bias in self.heads:
            t = np.tanh(self.inputs[token] + self.gates @ h)
            gate = 0.5 * t + 0.5
            c = gate[n : 2 * n] * c + gate[:n] * t[2 * n : 3 * n]
            h = gate[3 * n :] * np.tanh(c)
            choice, share = _draw((head @ h + bias).tolist(), rng)
            logp += math.log(share)
            point.append(choice)
            token = 1 + row + choice
            row += len(bias)
        return tuple(point), logp


def _draw(logits: list[float], rng: random.Random) -> tuple[int, float]:
    """A choice by softmax and its probability."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    edges = list(accumulate(weights))
    choice = min(bisect(edges, rng.random() * edges[-1]), len(edges) - 1)
    return choice, weights[choice] / edges[-1]


class Controller:
    """Proposes points and learns from outcomes, `settings.batch` at a time. Its weights depend on the outcomes and their order alone."""

    def __init__(self, sizes: Sequence[int], settings: PPO | None = None) -> None:
        self.settings, self.sizes = settings or PPO(), tuple(sizes)
        self.policy = Policy(self.sizes, self.settings.hidden)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.settings.rate)
        self.baseline = Baseline(self.settings.decay)
        self._waiting: list[tuple[Point, float, float]] = []
        self._sampling: Sampling | None = None

    def propose(self, rng: random.Random) -> tuple[Point, float]:
        """A point and its log-probability in nats."""
        if self._sampling is None:
            self._sampling = Sampling(self.policy, self.sizes)
        return self._sampling.draw(rng)

    def learn(self, outcomes: Iterable[Outcome]) -> None:
        """Outcomes without a log-probability are passed over: nobody knows how likely they were."""
        batch = self.settings.batch
        self._waiting += [(o.point, o.value, o.logp) for o in outcomes if o.logp is not None]
        while len(self._waiting) >= batch:
            self._update(self._waiting[:batch])
            del self._waiting[:batch]

    @torch.enable_grad()
    def _update(self, batch: Sequence[tuple[Point, float, float]]) -> None:
        points, values, before = zip(*batch, strict=True)
        advantage = torch.tensor(self.baseline.advantages(values))
        points_ND, before_N = torch.tensor(points), torch.tensor(before)
        for _ in range(self.settings.epochs):
            logp, entropy = self.policy(points_ND)
            gain = clipped(logp, before_N, advantage, self.settings.clip) + self.settings.entropy * entropy.mean()
            self.optimizer.zero_grad()
            (-gain).backward()
            self.optimizer.step()
        self._sampling = None
