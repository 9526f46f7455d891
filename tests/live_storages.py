"""Peak of the bytes in storages that operators make and nobody has released yet."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveStorages(TorchDispatchMode):
    """Counts each storage once, from the operator that returned it until it is freed. `ignore`: tensors that exist already."""

    def __init__(self, ignore=()):
        super().__init__()
        self.alive = {t.untyped_storage()._cdata for t in ignore}
        self.ignored = set(self.alive)
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self._track(t.untyped_storage())
        return out

    def _track(self, storage):
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key, size):
        self.alive.discard(key)
        self.live -= size
