"""Why a block was not served: the closed list."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


class MissReason(enum.IntEnum):
    """Why a block is not where it was wanted; HIT when it is. Append, never renumber."""

    HIT = 0
    NEVER_STORED = 1
    EVICTED = 2
    EXPIRED = 3
    DROPPED = 4
    ADMISSION_REJECTED = 5
    NAMESPACE_MISMATCH = 6
    SALT = 7
    CORRUPT = 8
    STALE = 9
    DEADLINE = 10
    CANCELLED = 11
    TIER_DOWN = 12
    QUOTA = 13
    NO_ROOM = 14
    IN_FLIGHT = 15

    @property
    def explanation(self) -> str:
        """What happened, and what to do about it."""
        return _EXPLANATIONS[self]

    @property
    def history_code(self) -> int:
        """The code under which the native history remembers it."""
        return _HISTORY_CODES[self]

    @classmethod
    def of_history(cls, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the reasons, (n,) uint8, of native history codes."""
        reasons: npt.NDArray[np.uint8] = _OF_HISTORY[codes]
        return reasons

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the reason of a name in metrics and responses, such as ``never_stored``."""
        return cls[name.upper()]


_EXPLANATIONS = {
    MissReason.HIT: "it was served",
    MissReason.NEVER_STORED: "nobody stored it here, or so long ago that it is forgotten",
    MissReason.EVICTED: "it had to make room; raise a tier's capacity or add a tier",
    MissReason.EXPIRED: "its time to live was over",
    MissReason.DROPPED: "somebody dropped it or cleared the cache",
    MissReason.ADMISSION_REJECTED: "NVMe did not take it and DRAM let it go; see admission",
    MissReason.NAMESPACE_MISMATCH: "it is stored for another model, dtype, layout or hash scheme; "
    "compare the namespaces",
    MissReason.SALT: "it is stored under another salt of the same tenant",
    MissReason.CORRUPT: "its bytes did not match their checksum and were not served; if this "
    "repeats, verify the disk with kvx inspect --verify",
    MissReason.STALE: "its slot was reused while it was being read",
    MissReason.DEADLINE: "it did not arrive in time; raise deadline_s or see which tier is slow",
    MissReason.CANCELLED: "the transfer was cancelled, or the cache closed",
    MissReason.TIER_DOWN: "the tier that holds it fails and is left alone for now; see the log",
    MissReason.QUOTA: "the tenant's quota is used up by blocks in use",
    MissReason.NO_ROOM: "every slot was in use; raise the capacity or release pins and leases",
    MissReason.IN_FLIGHT: "another transfer is just storing it",
}

# kvx_ext/include/kvx/miss_history.h numbers them.
_HISTORY_CODES = {
    MissReason.NEVER_STORED: 0,
    MissReason.EVICTED: 1,
    MissReason.EXPIRED: 2,
    MissReason.DROPPED: 3,
    MissReason.CORRUPT: 4,
}
# 5 retired with its memory, 6 cleared, 7 failed on its way down, 8 replaced by another copy.
_OF_HISTORY = np.full(256, MissReason.EVICTED, np.uint8)
_OF_HISTORY[6] = MissReason.DROPPED
_OF_HISTORY[7] = MissReason.TIER_DOWN
for _reason, _code in _HISTORY_CODES.items():
    _OF_HISTORY[_code] = _reason
