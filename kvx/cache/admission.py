"""Which blocks are worth a write to NVMe: those offered often enough, within a daily budget.

Frequency is kept in a small count-min sketch that halves now and then, so that it follows the load.
Source: G. Einziger, R. Friedman and B. Manes, "TinyLFU", 2017 (frequency sketch and its ageing).
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.config import AdmissionConfig

_ROWS = 4
_COLUMNS = 1 << 16
_COUNT_MAX = 15
_HALVE_AFTER = 8 * _COLUMNS
_DAY_S = 86_400.0


class Admission:
    """Decides batch by batch. Thread-safe."""

    def __init__(
        self, config: AdmissionConfig | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start with a full budget; without a configuration everything is accepted."""
        self._min_frequency = config.min_frequency if config else 1
        self._bytes_per_day = config.bytes_per_day if config else None
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = np.zeros((_ROWS, _COLUMNS), np.uint8)
        self._num_counted = 0
        self._budget_bytes = float(self._bytes_per_day or 0)
        self._filled_at_s = clock()

    def accept(self, keys: npt.NDArray[np.uint8], block_bytes: int) -> npt.NDArray[np.bool_]:
        """Return (n,) bool: which of (n, 16) uint8 keys to write; earlier keys go first."""
        accepted = np.ones(len(keys), np.bool_)
        with self._lock:
            if self._min_frequency > 1:
                accepted &= self._count(keys) >= self._min_frequency
            if self._bytes_per_day is not None:
                accepted &= self._within_budget(accepted, block_bytes)
        return accepted

    def _count(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Count every key once more and return its frequency so far."""
        columns = np.ascontiguousarray(keys).view(np.uint32).astype(np.int64) % _COLUMNS
        least = np.full(len(keys), 255, np.uint8)
        for row in range(_ROWS):
            places = columns[:, row]
            least = np.minimum(least, self._counts[row, places] + 1)
            np.add.at(self._counts[row], places, 1)
        np.minimum(self._counts, _COUNT_MAX, out=self._counts)
        self._num_counted += len(keys)
        if self._num_counted >= _HALVE_AFTER:
            self._counts >>= 1
            self._num_counted = 0
        return least

    def _within_budget(
        self, wanted: npt.NDArray[np.bool_], block_bytes: int
    ) -> npt.NDArray[np.bool_]:
        """Take as many blocks as the bucket pays for; it refills over the day."""
        assert self._bytes_per_day is not None, "only called with a budget"
        now_s = self._clock()
        refill = (now_s - self._filled_at_s) * self._bytes_per_day / _DAY_S
        self._budget_bytes = min(float(self._bytes_per_day), self._budget_bytes + refill)
        self._filled_at_s = now_s
        paid = wanted & (np.cumsum(wanted) * block_bytes <= self._budget_bytes)
        self._budget_bytes -= float(paid.sum()) * block_bytes
        return paid
