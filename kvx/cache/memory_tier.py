"""A tier in memory: pools of slots of several sizes that share one arena, on the host or a device.

Nothing in such a tier outlives the process.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.pool import OwnerLimits, Pool, slot_bytes_for
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.arena import Arena, MemoryExtent
    from kvx.tier_config import Eviction


_RESERVED = int(_core.ReserveOutcome.RESERVED)

# Arenas that stuck copies may still write into; freeing them would hand that memory to others.
_ABANDONED: list[Arena] = []


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots that a batch may now be written into.

    Attributes:
        outcomes: (n,) uint8, `kvx_ext._core.ReserveOutcome` of each key.
        slots: (n,) int64, -1 where none was given.
        generations: (n,) uint32 of the slots given.
        evicted_keys: (m, 16) uint8 keys that had to go.
    """

    outcomes: npt.NDArray[np.uint8]
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint32]
    evicted_keys: npt.NDArray[np.uint8]


class MemoryPool(Pool):
    """Slots of one size in memory."""

    def __init__(self, slot_bytes: int, tier: MemoryTier) -> None:
        """Make a pool without memory."""
        super().__init__(
            slot_bytes,
            tier.arena.extent_bytes // slot_bytes,
            tier.arena.num_extents,
            tier.eviction,
            tier.history,
        )
        self._extents: dict[int, MemoryExtent] = {}
        self._bases = np.zeros(tier.arena.num_extents, np.int64)

    def add_memory(self, extent: MemoryExtent) -> None:
        """Take an extent into use under the lowest free ordinal."""
        ordinal = next(i for i in range(len(self._extents) + 1) if i not in self._extents)
        self._extents[ordinal] = extent
        self._bases[ordinal] = extent.address
        self.add_slots(ordinal * self.slots_per_extent, extent.size_bytes // self.slot_bytes)

    def remove_memory(self) -> MemoryExtent | None:
        """Forget the blocks of one extent and return it; None when all are in use."""
        for ordinal, extent in self._extents.items():
            first = ordinal * self.slots_per_extent
            if self.retire_slots(first, extent.size_bytes // self.slot_bytes):
                return self._extents.pop(ordinal)
        return None

    def addresses(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where the slots' bytes begin, (n,) int64."""
        ordinals, places = np.divmod(slots, self.slots_per_extent)
        addresses: npt.NDArray[np.int64] = self._bases[ordinals] + places * self.slot_bytes
        return addresses


class MemoryTier:
    """Memory under one capacity, for blocks of any size."""

    def __init__(self, arena: Arena, eviction: Eviction, history: _core.MissHistory) -> None:
        """Make a tier over an arena of its own."""
        self.arena = arena
        self.eviction = eviction
        self.history = history
        self.pools: dict[int, MemoryPool] = {}
        self.limits = OwnerLimits()
        self._lock = threading.Lock()

    def pool_for(self, block_bytes: int) -> MemoryPool:
        """Return the pool that blocks of this size live in, made on first use.

        Raises:
            CapacityError: No extent can hold such a block.
        """
        slot_bytes = slot_bytes_for(block_bytes)
        with self._lock:
            pool = self.pools.get(slot_bytes)
            if pool is None:
                extent = self._take_extent(slot_bytes)
                pool = self.pools[slot_bytes] = MemoryPool(slot_bytes, self)
                self.limits.apply(pool)
                if extent is not None:
                    pool.add_memory(extent)
            return pool

    def reserve(
        self,
        pool: MemoryPool,
        keys: npt.NDArray[np.uint8],
        *,
        owner: int,
        namespace_id: int,
        is_dirty: bool,
        ttl_s: int,
        now_ms: int,
    ) -> Reservation:
        """Find slots for new blocks: free ones, then unused memory, then by eviction."""
        self._grow(pool, len(keys))
        reservation = Reservation(*pool.index.reserve(keys, owner, is_dirty, ttl_s, now_ms))
        taken = reservation.slots[reservation.outcomes == _RESERVED]
        pool.namespace_ids[taken] = namespace_id
        pool.expiries_s[taken] = now_ms // 1000 + ttl_s if ttl_s else 0
        return reservation

    def reserve_until(
        self,
        pool: MemoryPool,
        keys: npt.NDArray[np.uint8],
        expiries_s: npt.NDArray[np.int64],
        *,
        owner: int,
        namespace_id: int,
        now_ms: int,
    ) -> Reservation:
        """Reserve slots for clean blocks that keep their expiry; 0 for none."""
        reservations = []
        distinct = np.unique(expiries_s)
        for expiry_s in distinct.tolist():
            ttl_s = max(1, expiry_s - now_ms // 1000) if expiry_s else 0
            reservations.append(
                self.reserve(
                    pool, keys[expiries_s == expiry_s], owner=owner, namespace_id=namespace_id,
                    is_dirty=False, ttl_s=ttl_s, now_ms=now_ms,
                )
            )  # fmt: skip
        if len(distinct) == 1:
            return reservations[0]
        order = np.argsort(np.argsort(expiries_s, kind="stable"), kind="stable")
        return Reservation(
            np.concatenate([one.outcomes for one in reservations])[order],
            np.concatenate([one.slots for one in reservations])[order],
            np.concatenate([one.generations for one in reservations])[order],
            np.concatenate([one.evicted_keys for one in reservations]),
        )

    def num_free(self, pool: MemoryPool, num_wanted: int) -> int:
        """Return how many of the slots wanted there are without evicting anything."""
        self._grow(pool, num_wanted)
        return min(num_wanted, pool.index.num_free)

    def close(self, *, is_abandoned: bool) -> None:
        """Let go of the memory.

        Args:
            is_abandoned: Whether the hardware still holds some of the memory: then it must outlive
                everything, and is kept for good.
        """
        if is_abandoned:
            _ABANDONED.append(self.arena)
        self.arena.close(is_abandoned=is_abandoned)

    def _grow(self, pool: MemoryPool, num_slots: int) -> None:
        if pool.index.num_free >= num_slots:
            return
        with self._lock:
            while pool.index.num_free < num_slots:
                extent = self._take_extent(pool.slot_bytes, is_first=pool.num_extents == 0)
                if extent is None:
                    return
                pool.add_memory(extent)

    def _take_extent(self, slot_bytes: int, *, is_first: bool = True) -> MemoryExtent | None:
        """Return unused memory; for a pool that has none, memory of the pool that has most."""
        extent = self.arena.take(slot_bytes)
        if extent is not None or not is_first:
            return extent
        donors = sorted(self.pools.values(), key=lambda pool: -pool.num_extents)
        for donor in donors:
            freed = donor.remove_memory() if donor.num_extents > 0 else None
            if freed is not None:
                self.arena.give_back(freed)
                return self.arena.take(slot_bytes)
        return None
