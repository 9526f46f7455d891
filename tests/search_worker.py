"""One worker of a search as a process: python search_worker.py STORAGE LOG TRIALS SECONDS [START] [ALIVE_AFTER]."""

import sys
import time

from search_scores import Logged

from triscale import arch
from triscale.search.events import Running, Told
from triscale.search.find import Place, network_search
from triscale.search.space import mnasnet_space

if __name__ == "__main__":
    storage, log, trials, seconds, start, alive_after = sys.argv[1:7]
    running = Running(int(trials), alive_after=float(alive_after))
    space = mnasnet_space(arch("efficientnet_b0"))
    said = lambda text: print(text, flush=True)  # noqa: E731
    search = network_search(Logged(log, float(seconds)), space, sampler="random", seed=None, running=running, place=Place(storage, "test", tell=said))
    print("ready", flush=True)
    while time.time() < float(start):
        time.sleep(0.005)
    for event in search.events():
        if isinstance(event, Told):
            said(event.text)
    print("done", flush=True)
