"""The NVMe tier: pools of slots in files, with the records that let them survive the process.

Bytes move through the engine; where they lie and what their records say is `kvx.cache.disk`'s
affair. A failing device opens the tier's breaker: then nothing is read or written here until a
probe succeeds, and the cache goes on without it.
"""

from __future__ import annotations

import errno
import logging
import threading
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.disk.format import slots_per_extent
from kvx.cache.disk.store import DiskStore
from kvx.cache.pool import OwnerLimits, Pool, slot_bytes_for
from kvx.errors import CapacityError, StorageError
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.breaker import Breaker
    from kvx.cache.disk.extent import Extent
    from kvx.cache.disk.record import BlockRecords
    from kvx.cache.disk.recovery import Recovered
    from kvx.cache.disk.writes import RecordWrites
    from kvx.tier_config import NvmeTierConfig
    from kvx_ext import _core

_log = logging.getLogger(__name__)
_DEVICE_FAILURES = (int(Code.STORAGE), int(Code.TIMEOUT))


class NvmePool(Pool):
    """Slots of one size in files."""

    def __init__(self, slot_bytes: int, slots_per_extent: int, tier: NvmeTier) -> None:
        """Make a pool without slots."""
        # Extents may be shorter at the end of the quota, hence one more than it divides into.
        num_extents_max = tier.store.capacity_bytes // tier.store.extent_bytes + 2
        super().__init__(
            slot_bytes, slots_per_extent, num_extents_max, tier.config.eviction, tier.history
        )
        self._tier = tier

    def locate(
        self, slots: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the (n,) int32 file descriptors and (n,) int64 offsets of slots."""
        return self._tier.locate(self.slot_bytes, slots)


class NvmeTier:
    """Files under one capacity in one directory, for blocks of any size. Thread-safe."""

    name = "nvme"

    def __init__(
        self,
        config: NvmeTierConfig,
        history: _core.MissHistory,
        breaker: Breaker,
        clock: Callable[[], float],
    ) -> None:
        """Open or create the directory; `recover` must follow.

        Raises:
            UsageError: The directory holds something else.
            UnavailableError: Another process has it open.
            IncompatibleError: It was made by another format version or with another extent size.
            StorageError: It is damaged, or cannot be read.
        """
        self.config = config
        self.history = history
        self.breaker = breaker
        self.store = DiskStore.open(
            config.path,
            capacity_bytes=config.capacity_bytes,
            extent_bytes=config.extent_bytes,
            recreate=config.recreate,
            clock=clock,
        )
        self._clock = clock
        self.pools: dict[int, NvmePool] = {}
        self.limits = OwnerLimits()
        self._lock = threading.RLock()
        self._fds: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._is_full = False

    def recover(self, progress: Callable[[int, int], None] | None) -> Recovered:
        """Read the records back and make slots of all extents; blocks are restored by the caller.

        Args:
            progress: Called with (records read, records in all).

        Raises:
            StorageError: The records cannot be read.
        """
        with self._lock:
            recovered = self.store.recover(progress)
            for extent in self.store.extents.values():
                self._add_extent(extent)
        return recovered

    def is_up(self) -> bool:
        """Return whether the tier may be used now (a half-open breaker lets probes through)."""
        return self.breaker.allow()

    def pool_if_any(self, block_bytes: int) -> NvmePool | None:
        """Return the pool that blocks of this size live in; None before the first one is kept."""
        return self.pools.get(slot_bytes_for(block_bytes))

    def pool_for(self, slot_bytes: int) -> NvmePool:
        """Return the pool of a slot size, made on first use."""
        with self._lock:
            pool = self.pools.get(slot_bytes)
            if pool is None:
                per_extent = slots_per_extent(slot_bytes, self.store.extent_bytes)
                pool = self.pools[slot_bytes] = NvmePool(slot_bytes, per_extent, self)
                self.limits.apply(pool)
            return pool

    def make_room(self, pool: NvmePool, num_slots: int) -> None:
        """Give a pool unused capacity; one that has none gets an extent of the largest pool."""
        with self._lock:
            while pool.index.num_free < num_slots and self._grow(pool):
                pass
            if pool.num_extents == 0 and self._take_from_others(pool):
                self._grow(pool)

    def locate(
        self, slot_bytes: int, slots: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the (n,) int32 file descriptors and (n,) int64 offsets of slots."""
        with self._lock:
            numbers, offsets = self.store.pool(slot_bytes).locate(slots)
            return self._fds[numbers], offsets

    def set_records(
        self, pool: NvmePool, slots: npt.NDArray[np.int64], records: BlockRecords
    ) -> None:
        """Say what slots hold; their payloads must have been written."""
        with self._lock:
            self.store.pool(pool.slot_bytes).set_records(slots, records)

    def kill_records(self, pool: NvmePool, slots: npt.NDArray[np.int64]) -> None:
        """Keep the blocks of slots from coming back after a restart."""
        if len(slots):
            with self._lock:
                self.store.pool(pool.slot_bytes).kill_records(slots)

    def take_record_writes(self) -> RecordWrites:
        """Take the record pages that changed, for writing."""
        with self._lock:
            return self.store.record_writes()

    def end_record_writes(self, writes: RecordWrites, is_failed: npt.NDArray[np.bool_]) -> None:
        """Hand back what `take_record_writes` gave."""
        with self._lock:
            self.store.record_writes_done(writes, is_failed)

    def save_heat(self) -> None:
        """Carry use counts from the indexes to the records; written with the next record pages."""
        now_s = self._clock()
        with self._lock:
            for pool in self.pools.values():
                if pool.num_extents == 0:
                    continue
                blocks = pool.index.snapshot()
                self.store.pool(pool.slot_bytes).update_heat(
                    blocks["slots"],
                    blocks["freqs"],
                    # Coldest first in the snapshot: its order is the recency that must survive.
                    np.linspace(now_s - 1, now_s, len(blocks["slots"])).astype(np.uint64),
                )
            self.store.heat_to_dirty()

    def note_outcome(self, codes: npt.NDArray[np.int32], errnos: npt.NDArray[np.int32]) -> None:
        """Tell the breaker how the device did."""
        failed = np.isin(codes, _DEVICE_FAILURES)
        if not failed.any():
            self.breaker.success()
            return
        was_up = self.breaker.allow()
        self.breaker.failure()
        if was_up and not self.breaker.allow():
            number = int(errnos[failed][0])
            _log.error(
                "%s: %d of %d operations failed (%s); going on without it, probing again in %s s",
                self.config.path,
                int(failed.sum()),
                len(codes),
                errno.errorcode.get(number, f"errno {number}"),
                self.breaker.reset_s,
            )

    def close(self) -> None:
        """Close the files and give up the lock; no I/O may be under way."""
        with self._lock:
            self.store.close()

    def _grow(self, pool: NvmePool) -> bool:
        if self._is_full:
            return False
        try:
            self._add_extent(self.store.allocate_extent(pool.slot_bytes))
        except CapacityError:
            return False
        except StorageError as error:
            # A full disk is no failing disk: what is already ours stays in use.
            self._is_full = error.errno == errno.ENOSPC
            self.breaker.failure()
            _log.warning("the NVMe tier cannot grow beyond %d bytes: %s", self.used_bytes, error)
            return False
        return True

    @property
    def used_bytes(self) -> int:
        """What the files take."""
        return self.store.used_bytes

    def _add_extent(self, extent: Extent) -> None:
        if extent.number >= len(self._fds):
            grown = np.full(extent.number + 1, -1, np.int32)
            grown[: len(self._fds)] = self._fds
            self._fds = grown
        self._fds[extent.number] = extent.fd
        self.pool_for(extent.slot_bytes).add_slots(extent.first_slot, extent.num_slots)

    def _take_from_others(self, pool: NvmePool) -> bool:
        donors = sorted(self.pools.values(), key=lambda other: -other.num_extents)
        for donor in donors:
            if donor is pool or donor.num_extents == 0:
                continue
            for extent in self.store.pool(donor.slot_bytes).extents:
                if not extent.is_writing and donor.retire_slots(
                    extent.first_slot, extent.num_slots
                ):
                    self.store.release_extent(extent)
                    return True
        return False
