"""Equal slots of one tier: a native index over them, and where their bytes lie.

A tier's capacity is divided into extents. A pool holds the extents given to its slot size; its
slots are numbered `ordinal * slots_per_extent + place`, so a slot keeps its number when other
extents come and go. What a block belongs to is kept beside the index, one number a slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from kvx.tier_config import Eviction

SLOT_ALIGNMENT = 4096

_POLICIES = {
    "lru": _core.EvictionPolicy.LRU,
    "lfu": _core.EvictionPolicy.LFU,
    "fifo": _core.EvictionPolicy.FIFO,
    "lfu_with_recency": _core.EvictionPolicy.LFU_WITH_RECENCY,
    "s3fifo": _core.EvictionPolicy.S3FIFO,
}


def slot_bytes_for(block_bytes: int) -> int:
    """Return the size of the slot that a block of `block_bytes` takes."""
    return -(-block_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Found:
    """Where blocks are: arrays over the keys asked for.

    Attributes:
        mask: (n,) bool, whether the block is there; the other arrays hold garbage where not.
        slots: (n,) int64.
        generations: (n,) uint32 counter of each slot; checked again when the slot is let go.
        checksums: (n,) uint64 of the canonical bytes.
    """

    mask: npt.NDArray[np.bool_]
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint32]
    checksums: npt.NDArray[np.uint64]

    def only(self, mask: npt.NDArray[np.bool_]) -> Found:
        """Return the rows where `mask` holds."""
        return Found(
            self.mask[mask], self.slots[mask], self.generations[mask], self.checksums[mask]
        )


class OwnerLimits:
    """Quotas in bytes by owner, for every pool of a tier, those to come included."""

    def __init__(self) -> None:
        """Start without limits."""
        self._limits: dict[int, int] = {}

    def set(self, owner: int, limit_bytes: int | None, pools: Mapping[int, Pool]) -> None:
        """Hold an owner to a quota from now on; None for no limit."""
        if limit_bytes is None:
            self._limits.pop(owner, None)
        else:
            self._limits[owner] = limit_bytes
        for pool in list(pools.values()):
            slots_max = -1 if limit_bytes is None else limit_bytes // pool.slot_bytes
            pool.index.set_owner_limit(owner, slots_max)

    def apply(self, pool: Pool) -> None:
        """Make a new pool keep the limits."""
        for owner, limit_bytes in self._limits.items():
            pool.index.set_owner_limit(owner, limit_bytes // pool.slot_bytes)


class Pool:
    """The slots of one size in one tier."""

    def __init__(
        self,
        slot_bytes: int,
        slots_per_extent: int,
        num_extents_max: int,
        eviction: Eviction,
        history: _core.MissHistory,
    ) -> None:
        """Make a pool without slots; its tier adds extents, `num_extents_max` at most."""
        self.slot_bytes = slot_bytes
        self.slots_per_extent = slots_per_extent
        self.index = _core.BlockIndex(_POLICIES[eviction.value], history)
        # At their full size from the start: nobody may write into an array that was just replaced.
        self.namespace_ids = np.zeros(num_extents_max * slots_per_extent, np.int32)
        self.expiries_s = np.zeros(num_extents_max * slots_per_extent, np.int64)
        self.num_extents = 0

    def add_slots(self, first_slot: int, num_slots: int) -> None:
        """Take a new extent's slots into use."""
        self.index.add_slots(first_slot, num_slots)
        self.num_extents += 1

    def retire_slots(self, first_slot: int, num_slots: int) -> bool:
        """Forget the blocks of an extent and its slots; False when one of them is in use."""
        if not self.index.retire_slots(first_slot, num_slots):
            return False
        self.num_extents -= 1
        return True

    @property
    def num_dirty(self) -> int:
        """Blocks that the tier below does not hold yet."""
        return int(self.index.stats()["dirty"])

    def find(
        self, keys: npt.NDArray[np.uint8], now_ms: int, *, touch: bool = False, pin: bool = False
    ) -> Found:
        """Look every key up; pinned blocks must be let go with `index.unpin`."""
        return Found(*self.index.lookup(keys, now_ms, touch, pin))

    def still_holds(
        self, keys: npt.NDArray[np.uint8], found: Found, now_ms: int
    ) -> npt.NDArray[np.bool_]:
        """Return, (n,) bool, where blocks found earlier have been neither dropped nor replaced."""
        now = self.find(keys, now_ms)
        held: npt.NDArray[np.bool_] = now.mask & (now.generations == found.generations)
        return held

    def unpin(self, found: Found) -> None:
        """Let go of the blocks found with `pin`; those not found are passed over."""
        self.index.unpin(found.slots[found.mask], found.generations[found.mask])
