"""Peak of the bytes in storages that operators make and nobody has released yet."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveStorages(TorchDispatchMode):
    """Counts each storage once, from the operator that returned it until it is freed. `ignore`: tensors that exist already.

    Without a dispatch mode the autograd engine sums two gradients in place where nobody else holds one of them; under any
    mode it makes a third tensor. So a sum made by the engine counts only if both of its terms outlive it.
    """

    def __init__(self, ignore=()):
        super().__init__()
        self.alive = {t.untyped_storage()._cdata for t in ignore}
        self.ignored = set(self.alive)
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.peak = max(self.peak, self.live)
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self._track(t.untyped_storage())
        engine_sum = func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1
        if not engine_sum:
            self.peak = max(self.peak, self.live)
        return out

    def _track(self, storage):
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.alive.add(key)
        self.live += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key, size):
        self.alive.discard(key)
        self.live -= size
