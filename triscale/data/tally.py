"""What a stream could not read, and when that is too much."""

from __future__ import annotations

import numpy as np

from triscale.data.samples import Samples
from triscale.data.sources import DataError
from triscale.data.work import BROKEN, FAILED, GOOD
from triscale.data.workers import Pool, WorkerError

LOOK = 20  # images of which none can be read before the whole set counts as unreadable


class Tally:
    """What could not be read. expected: images of an epoch, of which broken_share may be broken; reasons: by number, each once.
    patience: images from the first on, of which none can be read before that is an error."""

    def __init__(self, samples: Samples, broken_share: float, expected: int, patience: int = LOOK) -> None:
        if not 0 <= broken_share <= 1:
            raise ValueError(f"broken_share: expected 0 to 1, found {broken_share}")
        self.samples, self.broken_share, self.expected, self.patience = samples, broken_share, expected, min(patience, expected)
        self.reasons: dict[int, str] = {}
        self.seen = self.bad = 0

    def look(self, pool: Pool, slot: int, *, stands_in: bool = False) -> np.ndarray:
        """Which of a finished slot's samples are good, (B,) bool. Raises DataError where too many aren't."""
        n = pool.count[slot]
        status = pool.ring.status[slot, :n]
        good: np.ndarray = status == GOOD
        self.seen += n
        if good.all():
            return good
        for j in np.flatnonzero(~good).tolist():
            why = pool.ring.reasons[slot, j].decode("utf-8", "replace")
            if status[j] == FAILED:
                raise WorkerError(why)
            self.reasons.setdefault(int(pool.ring.numbers[slot, j]), why)
        if len(self.reasons) == self.seen and self.seen >= self.patience:
            raise self.nothing(f"{len(self.reasons)} images")
        if stands_in:  # counted in their own place
            return good
        self.bad += int((status == BROKEN).sum())
        if self.bad > self.broken_share * self.expected:
            share = f"{len(self.reasons)} of {self.expected} images can't be read, more than {100 * self.broken_share:g} %"
            raise DataError(f"{share}; the first: {next(iter(self.reasons.values()))}")
        return good

    def nothing(self, what: str) -> DataError:
        return DataError(f"none of {what} can be read; the first: {next(iter(self.reasons.values()))}")
