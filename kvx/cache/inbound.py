"""Blocks that come from outside of this process: the DRAM slots they land in, and on from there.

Bytes only ever land in slots that are reserved for them, and count once they were verified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.pool import Found
from kvx.cache.result import TierKind
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.onboard import Onboard

    Rows = npt.NDArray[np.int64]
    Mask = npt.NDArray[np.bool_]

_RESERVED = int(_core.ReserveOutcome.RESERVED)


@dataclass(frozen=True, slots=True)
class Inbound:
    """Rows of an operation on their way, and the DRAM slots they go to; arrays over them.

    Attributes:
        rows: (n,) int64.
        slots: (n,) int64.
        generations: (n,) uint32.
        is_shared: (n,) bool, False where the slot is private to the operation and is let go
            afterwards.
    """

    rows: Rows
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint32]
    is_shared: Mask

    @classmethod
    def reserve(
        cls, operation: Onboard, rows: Rows, expiries_s: npt.NDArray[np.int64]
    ) -> tuple[Inbound, Mask]:
        """Reserve slots for rows that expire at (n,) int64 Unix times, 0 for never.

        Returns:
            The rows that got one, and which of all those are, (n,) bool. The others have just
            arrived in DRAM, or there is no room.
        """
        found = operation.reserve(rows, expiries_s)
        has_slot = found.slots >= 0
        is_shared = found.outcomes == _RESERVED
        return cls(rows, found.slots, found.generations, is_shared).only(has_slot), has_slot

    def only(self, mask: Mask) -> Inbound:
        """Return the rows where `mask` holds."""
        return Inbound(
            self.rows[mask], self.slots[mask], self.generations[mask], self.is_shared[mask]
        )

    def give_back(self, operation: Onboard) -> None:
        """Let go of slots that nothing has arrived in."""
        operation.pool.index.abort(self.slots, self.generations)

    def hand_on(
        self, operation: Onboard, checksums: npt.NDArray[np.uint64], tier: TierKind
    ) -> None:
        """Commit what has arrived, and copy it to where the operation wants it.

        Args:
            operation: Whose rows they are.
            checksums: (n,) of the bytes in the slots.
            tier: What they are said to come from.
        """
        shared, pool = operation.shared, operation.pool
        is_ours = ~self.is_shared
        known = self.only(self.is_shared)
        keys = operation.keys[known.rows]
        with shared.events.changing():
            stands = pool.index.commit(known.slots, known.generations, checksums[self.is_shared])
            shared.note_stored(operation.namespace_id, TierKind.DRAM, keys[stands])
        # Dropped or evicted already, these are: what is in their slots may be another block.
        is_ours[self.is_shared] = pool.index.pin(known.slots, known.generations)
        operation.look_again(self.rows[~is_ours], np.zeros(int((~is_ours).sum()), np.uint8))
        ours, checksums = self.only(is_ours), checksums[is_ours]
        found = Found(np.ones(len(ours.rows), np.bool_), ours.slots, ours.generations, checksums)
        private = ours.only(~ours.is_shared)
        with operation.held_open() as is_open:
            if is_open and len(ours.rows):
                operation.copy_out(
                    ours.rows, found, tier,
                    lambda: pool.index.abort(private.slots, private.generations),
                )  # fmt: skip
                return
        pool.unpin(found)
        pool.index.abort(private.slots, private.generations)
