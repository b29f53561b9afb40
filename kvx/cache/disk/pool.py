"""Slots of one size: which extent and which byte a slot id means.

A slot id is ``ordinal * slots_per_extent + index``. The ordinal of an extent is fixed in its header
and slots_per_extent by the store's extent_bytes, so an id means the same place whatever other
extents come and go, and after a restart too. A shorter extent leaves the rest of its range unused.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk.extent import Extent
from kvx.cache.disk.format import ExtentHeader, ExtentState, damaged, slots_per_extent, uuid_text
from kvx.cache.disk.record import BlockRecords
from kvx.errors import UsageError


class SequenceCounter:
    """Numbers the records of a store in the order in which they were set."""

    def __init__(self) -> None:
        """Start at 1; 0 is what an unwritten record has."""
        self._next = 1

    def start_after(self, newest: int) -> None:
        """Go on after the highest number that was found on disk."""
        self._next = newest + 1

    def take(self, count: int) -> NDArray[np.uint64]:
        """Return the next `count` numbers."""
        first = self._next
        self._next += count
        return np.arange(first, self._next, dtype=np.uint64)


class DiskPool:
    """The extents of one slot size: places and records of their slots. Not thread-safe.

    Attributes:
        slot_bytes: Bytes of one slot.
        slots_per_extent: Slot ids from one ordinal to the next.
    """

    def __init__(self, slot_bytes: int, extent_bytes: int, sequences: SequenceCounter) -> None:
        """Start without extents."""
        self._sequences = sequences
        self.slot_bytes = slot_bytes
        self.slots_per_extent = slots_per_extent(slot_bytes, extent_bytes)
        self._extents: dict[int, Extent] = {}
        self._rebuild()

    @property
    def extents(self) -> list[Extent]:
        """The extents by ascending ordinal, so by ascending slot ids."""
        return [self._extents[ordinal] for ordinal in sorted(self._extents)]

    @property
    def num_slots(self) -> int:
        """Slots of all extents together."""
        return int(self._num_slots.sum())

    def free_ordinal(self) -> int:
        """Return the smallest ordinal without an extent."""
        return next(n for n in range(len(self._extents) + 1) if n not in self._extents)

    def check(self, header: ExtentHeader, path: Path, uuid: bytes) -> None:
        """Raise StorageError unless an extent found on disk fits into this pool of a store."""
        if header.uuid != uuid:
            raise damaged(
                str(path),
                f"it belongs to store {uuid_text(header.uuid)}, this is {uuid_text(uuid)}",
            )
        if header.num_slots > self.slots_per_extent:
            raise damaged(str(path), f"it has {header.num_slots} of {self.slots_per_extent} slots")
        if header.state == ExtentState.LIVE and header.ordinal in self._extents:
            raise damaged(str(path), f"another extent has its ordinal {header.ordinal} too")

    def add(self, extent: Extent) -> None:
        """Add an extent. REQUIRES: its slot size is the pool's and its ordinal is free."""
        assert extent.slot_bytes == self.slot_bytes
        assert extent.header.ordinal not in self._extents
        self._extents[extent.header.ordinal] = extent
        self._rebuild()

    def remove(self, extent: Extent) -> None:
        """Take an extent out; its slot ids mean nothing until its ordinal is used again."""
        assert self._extents[extent.header.ordinal] is extent
        del self._extents[extent.header.ordinal]
        self._rebuild()

    def locate(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Say where slots lie.

        Args:
            slots: (n,) int64.

        Returns:
            ((n,) int32 extent numbers, (n,) int64 byte offsets in their files)

        Raises:
            UsageError: A slot is in no extent.
        """
        ordinals, indices = self._split(slots)
        return self._numbers[ordinals], self._offsets[ordinals] + indices * self.slot_bytes

    def set_records(self, slots: NDArray[np.int64], records: BlockRecords) -> None:
        """Say what slots hold. REQUIRES: their payloads are completely written.

        Of several records of one key the one set last counts after a restart.

        Args:
            slots: (n,) int64 slot ids.
            records: What they hold.

        Raises:
            UsageError: A slot is in no extent, or an array does not fit; nothing was changed.
        """
        parts = self._by_extent(slots)
        records.check(len(slots), self.slot_bytes)
        sequences = self._sequences.take(len(slots))
        for extent, indices, rows in parts:
            extent.set_records(indices, records.take(rows), sequences=sequences[rows])

    def kill_records(self, slots: NDArray[np.int64]) -> None:
        """Make the records of slots dead, so that recovery does not bring the blocks back.

        That holds once the pages from `DiskStore.record_writes` are written, and after a power cut
        once the extents are synced too.

        Args:
            slots: (n,) int64 slot ids; those without a live record are left alone.

        Raises:
            UsageError: A slot is in no extent; nothing was changed.
        """
        for extent, indices, _ in self._by_extent(slots):
            extent.kill_records(indices)

    def update_heat(
        self,
        slots: NDArray[np.int64],
        heat: NDArray[np.uint8],
        last_used_s: NDArray[np.uint64],
    ) -> None:
        """Note how often and when slots were used; goes to disk with `DiskStore.flush_heat`.

        Args:
            slots: (n,) int64 slot ids; those without a live record are left alone.
            heat: (n,) uint8, use frequency.
            last_used_s: (n,) uint64, Unix time.

        Raises:
            UsageError: A slot is in no extent; nothing was changed.
        """
        for extent, indices, rows in self._by_extent(slots):
            extent.update_heat(indices, heat[rows], last_used_s[rows])

    def is_pending(self, slots: NDArray[np.int64]) -> bool:
        """Return whether the record page of any of these slots is dirty or being written.

        False means that everything set and killed so far for them is written.
        """
        return any(extent.is_pending(indices) for extent, indices, _ in self._by_extent(slots))

    def _by_extent(
        self, slots: NDArray[np.int64]
    ) -> list[tuple[Extent, NDArray[np.int64], NDArray[np.int64]]]:
        """Return (extent, indices in the extent, rows of `slots`) for each extent touched."""
        ordinals, indices = self._split(slots)
        parts = []
        for ordinal in np.unique(ordinals):
            rows = np.flatnonzero(ordinals == ordinal)
            parts.append((self._extents[int(ordinal)], indices[rows], rows))
        return parts

    def _split(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ordinals, indices = np.divmod(slots, self.slots_per_extent)
        # The last row of the tables stands for every ordinal without an extent: it has no slots.
        none = len(self._num_slots) - 1
        ordinals = np.where((ordinals < 0) | (ordinals > none), none, ordinals)
        outside = indices >= self._num_slots[ordinals]
        if outside.any():
            raise UsageError(
                f"slot {int(slots[outside][0])} is in no extent of slot size {self.slot_bytes}"
            )
        return ordinals, indices

    def _rebuild(self) -> None:
        rows = max(self._extents, default=-1) + 2
        self._numbers = np.full(rows, -1, dtype=np.int32)
        self._offsets = np.zeros(rows, dtype=np.int64)
        self._num_slots = np.zeros(rows, dtype=np.int64)
        for ordinal, extent in self._extents.items():
            self._numbers[ordinal] = extent.number
            self._offsets[ordinal] = extent.header.payload_offset
            self._num_slots[ordinal] = extent.num_slots
