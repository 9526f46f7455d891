"""Scores for the tests of searches, in a module of their own so that other processes find them."""

import json
import os
import signal
import time
from dataclasses import dataclass

from triscale import cost
from triscale.cost_model import cost as counted  # noqa: F401 - the processes then have it before the clock runs


def key(arch):
    """A network in one line."""
    return json.dumps([[s.block, s.kernel, s.expand, s.squeeze, s.skip, s.channels, s.layers] for s in arch.stages])


@dataclass(frozen=True)
class Logged:
    """Sleeps, writes a line when it begins and one when it ends, and gives a number that depends on the network alone."""

    path: str
    seconds: float = 0.0

    def __call__(self, arch):
        self.write("began", arch)
        time.sleep(self.seconds)
        self.write("ended", arch)
        return cost(arch).macs / 1e9

    def write(self, what, arch):
        with open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps({"what": what, "key": key(arch), "pid": os.getpid(), "time": time.time()}).encode() + b"\n")


def lines(path):
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def learning(arch):
    """Five epochs; how well it goes depends on the parameters."""
    for epoch in range(1, 6):
        yield epoch / 5 * (1 - cost(arch).params / 1e8)


def faulty(arch):
    """Raises, gives nothing, no number, or a good value, by the network's parameters."""
    case = cost(arch).params // 8 % 5
    if case == 0:
        raise RuntimeError("no luck\nwith this one")
    return (float("nan"), "much", iter(()), 0.5)[case - 1]


def hanging(arch):
    """Hangs for ever for about a third of the networks."""
    if cost(arch).params // 8 % 3 == 0:
        time.sleep(1e6)
    return 0.5


def deadly(arch):
    """Kills its process for about a third of the networks."""
    if cost(arch).params // 8 % 3 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.5


def killed_once(arch):
    """Kills its process the first time."""
    mark = os.environ["TRISCALE_TEST_MARK"]
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.5
