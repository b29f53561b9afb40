"""Why NVMe did not take a block: to tell "rejected" or "tier down" from a plain eviction.

A block that NVMe refused lives in DRAM only, and the eviction that ends it there is not what the
operator has to know. This table is a hint for explanations: bounded, lossy, never used for data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.reasons import MissReason

if TYPE_CHECKING:
    import numpy.typing as npt

_ROWS = 1 << 16


class Refusals:
    """A direct-mapped table from key to the reason of its last refusal. Takes 576 KiB."""

    def __init__(self) -> None:
        """Start empty."""
        self._tags = np.zeros(_ROWS, np.uint64)
        self._reasons = np.full(_ROWS, MissReason.HIT, np.uint8)
        self._is_empty = True

    def note(self, keys: npt.NDArray[np.uint8], reason: MissReason) -> None:
        """Remember why (n, 16) uint8 keys were not taken; HIT when they were after all."""
        if reason is MissReason.HIT and self._is_empty:
            return
        self._is_empty = False
        tags = _tags(keys)
        rows = (tags % np.uint64(_ROWS)).astype(np.int64)
        self._tags[rows] = tags
        self._reasons[rows] = reason

    def explain(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return (n,) uint8: why each of (n, 16) uint8 keys was not taken, HIT if unknown."""
        tags = _tags(keys)
        rows = (tags % np.uint64(_ROWS)).astype(np.int64)
        hit = np.uint8(MissReason.HIT)
        return np.where(self._tags[rows] == tags, self._reasons[rows], hit)


def _tags(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return the first 64 bits of each key; keys are digests."""
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)[:, 0]
