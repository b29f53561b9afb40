"""Which blocks are worth a write to NVMe: those offered often enough, within a daily budget.

The budget holds in every 24 hours, not only on average: flash wears by what is written. A bucket
that refills would let twice as much through on the first day.

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

    from kvx.tier_config import AdmissionConfig

_ROWS = 4
_COLUMNS = 1 << 16
_COUNT_MAX = 15
_HALVE_AFTER = 8 * _COLUMNS
# What was written is remembered by the quarter of an hour; the one just left stays in the sum, so
# that 24 hours are always covered.
_SLICE_S = 900.0
_SLICES = int(86_400 / _SLICE_S) + 1


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
        self._written_bytes = np.zeros(_SLICES, np.int64)
        self._slice = int(clock() / _SLICE_S)

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
            # A key that stands in the batch twice counts once; so no counter can wrap.
            raised = np.minimum(self._counts[row, places] + 1, _COUNT_MAX).astype(np.uint8)
            least = np.minimum(least, raised)
            self._counts[row, places] = raised
        self._num_counted += len(keys)
        if self._num_counted >= _HALVE_AFTER:
            self._counts >>= 1
            self._num_counted = 0
        return least

    def _within_budget(
        self, wanted: npt.NDArray[np.bool_], block_bytes: int
    ) -> npt.NDArray[np.bool_]:
        """Take as many blocks as the last 24 hours have left over."""
        assert self._bytes_per_day is not None, "only called with a budget"
        now = int(self._clock() / _SLICE_S)
        over = np.arange(self._slice + 1, min(now, self._slice + _SLICES) + 1) % _SLICES
        self._written_bytes[over] = 0
        self._slice = max(now, self._slice)
        left_bytes = self._bytes_per_day - int(self._written_bytes.sum())
        paid = wanted & (np.cumsum(wanted) * block_bytes <= left_bytes)
        self._written_bytes[self._slice % _SLICES] += int(paid.sum()) * block_bytes
        return paid
