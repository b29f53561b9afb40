"""One extent file: slots of one size, and the in-memory mirror of the records that describe them.

The mirror is the truth of this process; the file follows it one 4096-byte page at a time. A page is
clean, dirty, or being written; never is more than one write of a page under way, because two could
complete in the wrong order and leave the older content. Payloads are none of this file's business
beyond their offsets.
"""

import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk.format import (
    BLOCK_ALIGNMENT,
    RECORD_BYTES,
    RECORDS_PER_PAGE,
    ExtentHeader,
)
from kvx.cache.disk.record import (
    RECORD_DTYPE,
    RECORD_MAGIC,
    BlockRecords,
    RecordState,
    kill_records,
    pack_records,
    seal_records,
)
from kvx.errors import UsageError

_NO_PAGES: Final = np.empty(0, dtype=np.int64)


class Extent:
    """An open extent. Created by `DiskStore`; not thread-safe.

    Attributes:
        header: What the file's first 4096 bytes say.
        path: The file.
        fd: Open for reading and writing, owned by the extent.
        is_direct: Whether `fd` is O_DIRECT: offsets, bytes and addresses aligned to 4096.
        first_slot: Slot id of index 0 among the slots of this size.
    """

    def __init__(
        self, header: ExtentHeader, path: Path, *, fd: int, is_direct: bool, first_slot: int
    ) -> None:
        """Take over `fd`; the mirror starts as zeros, which is what a new file holds."""
        self.header = header
        self.path = path
        self.fd = fd
        self.is_direct = is_direct
        self.first_slot = first_slot
        # Anonymous memory is page-aligned, zero, and costs nothing until it is touched.
        self._memory = mmap.mmap(-1, header.records_bytes)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        num_pages = header.records_bytes // BLOCK_ALIGNMENT
        self._is_dirty = np.zeros(num_pages, dtype=np.bool_)
        self._is_heat_dirty = np.zeros(num_pages, dtype=np.bool_)
        self._is_writing = np.zeros(num_pages, dtype=np.bool_)

    @property
    def number(self) -> int:
        """The number in the file name."""
        return self.header.number

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.header.slot_bytes

    @property
    def num_slots(self) -> int:
        """Slots of this extent: ids `first_slot` to `first_slot + num_slots - 1`."""
        return self.header.num_slots

    @property
    def records(self) -> NDArray[np.void]:
        """The mirror: (num_slots,) of RECORD_DTYPE. Change it only through the methods."""
        return self._bytes[: self.num_slots * RECORD_BYTES].view(RECORD_DTYPE)

    @property
    def mirror(self) -> NDArray[np.uint8]:
        """The mirror with its padding: (records_bytes,) uint8, page-aligned."""
        return self._bytes

    def set_records(
        self, indices: NDArray[np.int64], records: BlockRecords, *, sequences: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """Say what slots hold. REQUIRES: their payloads are completely written.

        Args:
            indices: (n,) int64, slots' indices in this extent.
            records: What they hold.
            sequences: (n,) uint64, from the store's counter.

        Returns:
            The record pages made dirty, ascending, int64.

        Raises:
            UsageError: An index or an array does not fit; nothing was changed.
        """
        self._check_indices(indices)
        records.check(len(indices), self.slot_bytes)
        self.records[indices] = pack_records(
            records, indices, extent_number=self.number, sequences=sequences
        )
        return self._mark(self._is_dirty, indices)

    def kill_records(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Make the live records of slots dead, so that recovery does not bring them back.

        Slots without a live record are left alone.

        Args:
            indices: (n,) int64, slots' indices in this extent.

        Returns:
            The record pages made dirty, ascending, int64.

        Raises:
            UsageError: An index is out of range; nothing was changed.
        """
        indices = indices[self._is_live(indices)]
        killed = self.records[indices]
        kill_records(killed)
        self.records[indices] = killed
        return self._mark(self._is_dirty, indices)

    def update_heat(
        self,
        indices: NDArray[np.int64],
        heat: NDArray[np.uint8],
        last_used_s: NDArray[np.uint64],
    ) -> NDArray[np.int64]:
        """Note how often and when slots were used; written at leisure, see `heat_to_dirty`.

        Slots without a live record are left alone.

        Args:
            indices: (n,) int64, slots' indices in this extent.
            heat: (n,) uint8.
            last_used_s: (n,) uint64, Unix time.

        Returns:
            The record pages that differ from the file now, ascending, int64.

        Raises:
            UsageError: An index is out of range; nothing was changed.
        """
        live = self._is_live(indices)
        indices = indices[live]
        changed = self.records[indices]
        changed["heat"] = heat[live]
        changed["last_used_s"] = last_used_s[live]
        seal_records(changed)
        self.records[indices] = changed
        return self._mark(self._is_heat_dirty, indices)

    def heat_to_dirty(self) -> None:
        """Make the pages that only `update_heat` touched due for writing."""
        self._is_dirty |= self._is_heat_dirty

    def is_pending(self, indices: NDArray[np.int64]) -> bool:
        """Return whether the page of any of these records is dirty or being written."""
        pages = indices // RECORDS_PER_PAGE
        return bool((self._is_dirty[pages] | self._is_writing[pages]).any())

    @property
    def is_writing(self) -> bool:
        """Whether a record page of this extent is being written."""
        return bool(self._is_writing.any())

    def begin_write(self, pages_max: int) -> NDArray[np.int64]:
        """Take up to `pages_max` dirty pages that no write is under way for.

        Returns:
            Their indices, ascending, int64; each is being written until `end_write`.
        """
        pages = np.flatnonzero(self._is_dirty & ~self._is_writing)[:pages_max]
        if len(pages) == 0:
            return _NO_PAGES
        self._is_writing[pages] = True
        self._is_dirty[pages] = False
        self._is_heat_dirty[pages] = False
        return pages

    def end_write(self, pages: NDArray[np.int64], *, is_failed: bool) -> None:
        """Note that the write of `pages` is over; failed ones are dirty again."""
        assert self._is_writing[pages].all()
        self._is_writing[pages] = False
        if is_failed:
            self._is_dirty[pages] = True

    def page_bytes(self, pages: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a copy of mirror pages: (n, 4096) uint8."""
        return self._bytes.reshape(-1, BLOCK_ALIGNMENT)[pages]

    def close(self) -> None:
        """Close the file. The mirror's memory goes with its last user."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _is_live(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        self._check_indices(indices)
        magic = self.records["magic"][indices] == RECORD_MAGIC
        live: NDArray[np.bool_] = magic & (self.records["state"][indices] == RecordState.LIVE)
        return live

    def _check_indices(self, indices: NDArray[np.int64]) -> None:
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num_slots:
            raise UsageError(
                f"slot indices go from {indices.min()} to {indices.max()}; {self.path.name} has "
                f"0 to {self.num_slots - 1}"
            )

    def _mark(self, marks: NDArray[np.bool_], indices: NDArray[np.int64]) -> NDArray[np.int64]:
        pages = np.unique(indices // RECORDS_PER_PAGE)
        marks[pages] = True
        return pages
