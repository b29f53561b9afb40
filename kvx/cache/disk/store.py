"""A directory of extents under a quota: the on-disk side of the NVMe tier.

The store decides where slots lie, keeps their records and finds them again after a restart. It
moves no payload: the tier's engine does, with the places from `pool(...).locate` and the writes
from `record_writes`. Order is everything: payload, then
`set_records`, then the record's page.
"""

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk import directory
from kvx.cache.disk.extent import Extent
from kvx.cache.disk.files import (
    create_extent_file,
    extent_name,
    open_extent_file,
    read_header,
    remove_file,
    rewrite_header,
)
from kvx.cache.disk.format import (
    BLOCK_ALIGNMENT,
    EXTENT_NUMBER_MAX,
    ExtentHeader,
    ExtentState,
    Superblock,
    check_slot_bytes,
    extent_file_bytes,
    slots_that_fit,
)
from kvx.cache.disk.pool import DiskPool, SequenceCounter
from kvx.cache.disk.recovery import Progress, Recovered, recover_extents
from kvx.cache.disk.writes import RecordWrites, take_record_writes
from kvx.errors import CapacityError, StorageError, UsageError

_CAPACITY_MIN: Final = directory.OVERHEAD_BYTES + extent_file_bytes(BLOCK_ALIGNMENT, 1)
# 4 GiB of records: whoever commits what it hands out must not find some of it left out.
_PAGES_PER_CALL: Final = 1 << 20


class DiskStore:
    """A store that this process has to itself. Open it with `open`; not thread-safe.

    Attributes:
        path: The directory.
    """

    def __init__(
        self, path: Path, superblock: Superblock, *, lock_fd: int, clock: Callable[[], float]
    ) -> None:
        """Take over the lock; use `DiskStore.open` instead."""
        self.path = path
        self._superblock = superblock
        self._lock_fd = lock_fd
        self._clock = clock
        self._pools: dict[int, DiskPool] = {}
        self._extents: dict[int, Extent] = {}
        self._sequences = SequenceCounter()
        self._is_recovered = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        capacity_bytes: int,
        extent_bytes: int | None = None,
        recreate: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open or create the store in a directory and lock it. Call `recover` next.

        A capacity smaller than what the store uses releases extents, highest numbers first.

        Args:
            path: The directory; created if its parent exists.
            capacity_bytes: Limit on the sum of all file sizes, headers included.
            extent_bytes: Nominal size of an extent, fixed at creation; None takes what the store
                has, for a new one a 64th of the capacity between 64 MiB and 16 GiB.
            recreate: Rebuild as empty, whatever is there: removes kvx's own files, only those.
            clock: Unix time in seconds.

        Raises:
            UsageError: An argument is wrong, or the directory holds other things and no store.
            UnavailableError: Another process has the store open; names it.
            IncompatibleError: Other format version, or other extent_bytes.
            StorageError: The superblock or a header is damaged (names the file), or I/O failed.
        """
        if capacity_bytes < _CAPACITY_MIN:
            raise UsageError(f"capacity_bytes is {capacity_bytes}; {_CAPACITY_MIN} is the least")
        if extent_bytes is not None and extent_bytes < BLOCK_ALIGNMENT:
            raise UsageError(f"extent_bytes is {extent_bytes}; {BLOCK_ALIGNMENT} is the least")
        where = Path(path)
        directory.prepare(where)
        lock_fd = directory.acquire_lock(where)
        try:
            superblock = directory.open_superblock(
                where,
                capacity_bytes=capacity_bytes,
                extent_bytes=extent_bytes,
                recreate=recreate,
                clock=clock,
            )
            store = cls(where, superblock, lock_fd=lock_fd, clock=clock)
        except BaseException:
            os.close(lock_fd)
            raise
        try:
            store._open_extents()
            store._set_capacity(capacity_bytes)
        except BaseException:
            store.close()
            raise
        return store

    @property
    def uuid(self) -> bytes:
        """Identity of the store, 16 bytes."""
        return self._superblock.uuid

    @property
    def capacity_bytes(self) -> int:
        """Limit on the sum of all file sizes."""
        return self._superblock.capacity_bytes

    @property
    def extent_bytes(self) -> int:
        """Nominal size of an extent file."""
        return self._superblock.extent_bytes

    @property
    def used_bytes(self) -> int:
        """What the store takes of its capacity: extents, superblock, lock."""
        extents = sum(extent.header.file_bytes for extent in self._extents.values())
        return directory.OVERHEAD_BYTES + extents

    @property
    def extents(self) -> Mapping[int, Extent]:
        """Extent number -> extent."""
        return MappingProxyType(self._extents)

    def pool(self, slot_bytes: int) -> DiskPool:
        """Return the slots of one size: where they lie, and their records.

        Raises:
            UsageError: There never was an extent of this size, or `recover` was not called.
        """
        self._check_recovered()
        if slot_bytes not in self._pools:
            raise UsageError(f"{self.path} has no extent of slot size {slot_bytes}")
        return self._pools[slot_bytes]

    def allocate_extent(self, slot_bytes: int) -> Extent:
        """Create an extent for slots of one size; shorter than nominal if the quota ends. Blocks.

        Raises:
            UsageError: `slot_bytes` is no multiple of 4096 between 4 KiB and 64 MiB.
            CapacityError: Not even one slot fits into what is left of the quota.
            StorageError: The file could not be created, errno ENOSPC if the device is full.
        """
        check_slot_bytes(slot_bytes)
        self._check_recovered()
        pool = self._pool_for(slot_bytes)
        available = self.capacity_bytes - self.used_bytes
        num_slots = min(pool.slots_per_extent, slots_that_fit(slot_bytes, available))
        number = next((n for n in range(EXTENT_NUMBER_MAX + 1) if n not in self._extents), -1)
        if num_slots < 1 or number < 0:
            needed = extent_file_bytes(slot_bytes, 1)
            raise CapacityError(
                f"{self.path} has {available} of {self.capacity_bytes} bytes left, one slot "
                f"of {slot_bytes} bytes takes an extent of {needed}; release an extent or raise "
                "the capacity",
                needed_bytes=needed,
                available_bytes=available,
            )
        header = ExtentHeader(
            uuid=self.uuid,
            number=number,
            ordinal=pool.free_ordinal(),
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            created_s=int(self._clock()),
        )
        path = create_extent_file(self.path, header)
        try:
            fd, is_direct = open_extent_file(path)
        except StorageError:
            remove_file(path)
            raise
        return self._add(header, path, fd=fd, is_direct=is_direct)

    def release_extent(self, extent: Extent) -> None:
        """Give an extent's space back for other slot sizes. Durable on return; blocks.

        REQUIRES: the caller has retired its slot range and no I/O on the file is under way, because
        the file is closed and its descriptor, number, ordinal and slot ids are used again.

        Raises:
            UsageError: It is not this store's, or record writes of it are under way.
            StorageError: I/O failed; the extent is still there, and may be released again.
        """
        if self._extents.get(extent.number) is not extent:
            raise UsageError(f"{extent.path} is not an extent of this store")
        if extent.is_writing:
            raise UsageError(f"{extent.path.name} has record writes under way; finish them first")
        # The header first: if the removal is lost in a crash, the file must not count again.
        retired = replace(extent.header, state=ExtentState.RETIRED)
        rewrite_header(extent.fd, extent.path, retired)
        remove_file(extent.path)
        self._pools[extent.slot_bytes].remove(extent)
        del self._extents[extent.number]
        extent.close()

    def recover(self, progress: Progress | None = None) -> Recovered:
        """Read all records and return the blocks that survived. Once per `open`; blocks.

        What must not come back later (superseded, expired) is dead in the mirror now: write the
        pages from `record_writes` soon.

        Args:
            progress: Called with (records read, records in all).

        Raises:
            UsageError: Was called before.
            StorageError: Reading failed.
        """
        if self._is_recovered:
            raise UsageError(f"{self.path} is recovered already; that is done once per open")
        recovered, newest = recover_extents(
            list(self._extents.values()), int(self._clock()), progress
        )
        self._sequences.start_after(newest)
        self._is_recovered = True
        return recovered

    def record_writes(self, *, pages_max: int = _PAGES_PER_CALL) -> RecordWrites:
        """Take dirty record pages for writing; no writes if there are none.

        Hand the result to `record_writes_done` when its writes have ended. Until then its pages
        are not handed out again, however often they change; they are afterwards.

        Args:
            pages_max: Pages of 4096 bytes to take at most.
        """
        return take_record_writes(list(self._extents.values()), pages_max)

    def record_writes_done(
        self, writes: RecordWrites, is_failed: NDArray[np.bool_] | None = None
    ) -> None:
        """Note that record writes have ended; the pages of failed ones are dirty again.

        Args:
            writes: From `record_writes` or `flush_heat`, each handed in exactly once.
            is_failed: (n,) bool, which ones failed; None if none did.
        """
        writes.end(np.zeros(len(writes), dtype=np.bool_) if is_failed is None else is_failed)

    def heat_to_dirty(self) -> None:
        """Make what `update_heat` changed due for writing."""
        for extent in self._extents.values():
            extent.heat_to_dirty()

    def flush_heat(self, *, pages_max: int = _PAGES_PER_CALL) -> RecordWrites:
        """Make what `update_heat` changed due for writing, and take it as `record_writes` does."""
        self.heat_to_dirty()
        return self.record_writes(pages_max=pages_max)

    def close(self) -> None:
        """Close the files and give up the lock. REQUIRES: no I/O on them is under way.

        Record pages that were not written are lost, and with them the blocks they describe.
        """
        for extent in self._extents.values():
            extent.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the store."""
        self.close()

    def __del__(self) -> None:
        """Warn of a store that was never closed."""
        if getattr(self, "_lock_fd", -1) >= 0:
            warnings.warn(f"{self.path} was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def _pool_for(self, slot_bytes: int) -> DiskPool:
        """Return the pool of a slot size, a new one that is not yet the store's if it has none."""
        pool = self._pools.get(slot_bytes)
        return pool or DiskPool(slot_bytes, self.extent_bytes, self._sequences)

    def _check_recovered(self) -> None:
        if not self._is_recovered:
            raise UsageError(f"{self.path} is not recovered; call recover() after open()")

    def _open_extents(self) -> None:
        directory.remove_store_files(self.path, only_partial=True)
        for number in directory.extent_numbers(self.path):
            path = self.path / extent_name(number)
            fd, is_direct = open_extent_file(path)
            try:
                header = read_header(fd, path)
                pool = self._pool_for(header.slot_bytes)
                pool.check(header, path, self.uuid)
            except BaseException:
                os.close(fd)
                raise
            if header.state == ExtentState.RETIRED:
                os.close(fd)
                remove_file(path)
            else:
                self._add(header, path, fd=fd, is_direct=is_direct)

    def _add(self, header: ExtentHeader, path: Path, *, fd: int, is_direct: bool) -> Extent:
        pool = self._pools.setdefault(header.slot_bytes, self._pool_for(header.slot_bytes))
        first_slot = header.ordinal * pool.slots_per_extent
        extent = Extent(header, path, fd=fd, is_direct=is_direct, first_slot=first_slot)
        pool.add(extent)
        self._extents[extent.number] = extent
        return extent

    def _set_capacity(self, capacity_bytes: int) -> None:
        if capacity_bytes == self.capacity_bytes:
            return
        while self.used_bytes > capacity_bytes:
            self.release_extent(self._extents[max(self._extents)])
        superblock = replace(self._superblock, capacity_bytes=capacity_bytes)
        directory.write_superblock(self.path, superblock)
        self._superblock = superblock
