"""TensorBoard's event file of a training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Board:
    """Scalars by step. The file is made at the first value, when it is known from which step on an older one is void."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the tensorboard package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("TensorBoard's files need its package: pip install 'triscale[logging]'") from None
        self.make, self.folder = SummaryWriter, folder
        self.purge: int | None = None
        self.writer: Any = None

    def add(self, step: int, scalars: dict[str, float | None]) -> None:
        """None is no value."""
        if self.writer is None:
            self.writer = self.make(os.fspath(self.folder), purge_step=self.purge)
        for name, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()  # so that a board that is being watched follows

    def close(self) -> None:
        """Writes what is left."""
        if self.writer is not None:
            self.writer.close()
