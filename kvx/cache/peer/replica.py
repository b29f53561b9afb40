"""What one peer told us it holds: an index a tier, kept up by numbered changes.

It may be wrong at any time, since what it says was true a moment ago: the peer is asked for every
block, and says so when it is gone. It is bounded: of a peer that holds more than is remembered, the
longest untouched are forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.cache.key_table import KeyTable
from kvx.cache.peer.messages import ChangeKind, as_keys
from kvx.cache.result import TierKind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx.cache.peer.messages import Delta, SnapshotPart

TIERS = (TierKind.DRAM, TierKind.NVME)


class Replica:
    """The keys of one peer's tiers. Written by one thread, read by any.

    Attributes:
        log: Which sequence of changes it follows; 0 before the first snapshot.
        sequence: Number of the last change in it.
    """

    def __init__(self, keys_max: int) -> None:
        """Start empty."""
        self._keys_max = keys_max
        self._tiers = {tier: KeyTable(keys_max) for tier in TIERS}
        self._loading: dict[TierKind, KeyTable] | None = None
        # Log, sequence and number of the part that comes next.
        self._expected = (0, 0, 0)
        self.log = 0
        self.sequence = 0

    def __len__(self) -> int:
        """Return the number of keys, those of two tiers counted twice."""
        return sum(len(keys) for keys in self._tiers.values())

    def holds(self, tier: TierKind, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return which of (n, 16) uint8 keys a tier of the peer holds, (n,) bool."""
        return self._tiers[tier].has(keys)

    def expect(self, keys: npt.NDArray[np.uint8]) -> None:
        """Add keys that the peer is said to have in DRAM; its own next word on them counts."""
        self._tiers[TierKind.DRAM].add(keys)

    def forget(self, keys: npt.NDArray[np.uint8]) -> None:
        """Remove keys that the peer turned out not to have."""
        for tier in self._tiers.values():
            tier.remove(keys)

    def take_part(self, part: SnapshotPart) -> bool:
        """Take a part of a snapshot; False when one is missing, so that it is of no use."""
        if part.number == 0:
            self._loading = {tier: KeyTable(self._keys_max) for tier in TIERS}
            self._expected = (part.log, part.sequence, 0)
        if self._loading is None or (part.log, part.sequence, part.number) != self._expected:
            self._loading = None
            return False
        self._expected = (part.log, part.sequence, part.number + 1)
        tier = self._loading.get(TierKind(part.tier)) if part.tier in TIERS else None
        if tier is not None:
            tier.add(as_keys(part.keys))
        if part.is_last:
            self._tiers, self._loading = self._loading, None
            self.log, self.sequence = part.log, part.sequence
        return True

    def take_delta(self, delta: Delta) -> bool:
        """Take changes; False when some before them are missing, so that all are needed anew."""
        if delta.log != self.log or delta.first > self.sequence + 1:
            return False
        if delta.first <= self.sequence and delta.last <= self.sequence:
            return True  # known already
        for change in delta.changes:
            if change.kind == ChangeKind.CLEARED:
                self._tiers = {tier: KeyTable(self._keys_max) for tier in TIERS}
            elif change.tier in TIERS:
                tier = self._tiers[TierKind(change.tier)]
                keys = as_keys(change.keys)
                (tier.add if change.kind == ChangeKind.STORED else tier.remove)(keys)
        self.sequence = delta.last
        return True
