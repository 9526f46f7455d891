"""What a data set is to the loader: numbered encoded images with labels, read in any order, by any process."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Samples(Protocol):
    """Small when pickled: it goes to worker processes with paths and offsets in it, never with pixels.

    labels: (N,) int64.
    """

    labels: np.ndarray

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What messages and reports call the image: a path within the data set, or shard and key."""
        ...

    def read(self, number: int) -> bytes | np.ndarray:
        """The image file's bytes, or decoded pixels (H, W, 3) uint8. Raises OSError where it can't be read."""
        ...
