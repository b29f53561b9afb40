"""Blocks toward the engine: from DRAM by a verified copy, from NVMe through a DRAM slot.

A block read from NVMe warms DRAM and streams on to its target as soon as its own bytes are there.
A damaged copy in one tier is dropped there and the block is looked for in the next.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.operation import REASON_OF_CODE, Operation
from kvx.cache.reactor import Step
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.dram import Reservation
    from kvx.cache.nvme import NvmePool
    from kvx.cache.pool import Found
    from kvx.cache.shared import Shared
    from kvx.cache.space import CacheSpace
    from kvx.layout import BlockSelection

_WINDOW_BYTES = 64 << 20
_WINDOW_SHARE = 4
_SLOW_READ_S = 1.0
_WINDOWS_IN_FLIGHT = 3
_RESERVED = int(_core.ReserveOutcome.RESERVED)
_IN_FLIGHT = int(_core.ReserveOutcome.IN_FLIGHT)


@dataclass(frozen=True, slots=True)
class _ReadBatch:
    """Rows on their way from NVMe: where they come from and the DRAM slots they go to.

    `is_shared` is False where the slot is private to this operation and is let go afterwards.
    """

    rows: npt.NDArray[np.int64]
    found: Found
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint32]
    is_shared: npt.NDArray[np.bool_]


class Onboard(Operation):
    """Moves blocks to `target`, or only into DRAM when there is none (a prefetch)."""

    def __init__(
        self,
        shared: Shared,
        space: CacheSpace,
        keys: npt.NDArray[np.uint8],
        hashes: npt.NDArray[np.uint8],
        *,
        target: BlockSelection | None,
        deadline_s: float,
    ) -> None:
        """Make the operation over (n, 16) uint8 keys, their (n, k) hashes and target blocks."""
        super().__init__(
            shared, "onboard" if target is not None else "prefetch", len(keys), deadline_s
        )
        self._space = space
        self._keys = keys
        self._hashes = hashes
        self._target = target
        self._pool = space.dram_pool
        self._nvme = shared.nvme.pool_if_any(space.block_bytes) if shared.nvme else None
        self._was_corrupt = np.zeros(len(keys), np.bool_)

    def _launch(self) -> None:
        window = max(1, _WINDOW_BYTES // self._space.block_bytes)
        window = min(window, max(1, self._pool.index.num_slots // _WINDOW_SHARE))
        while len(self.waiting) and len(self._steps) < _WINDOWS_IN_FLIGHT:
            before = len(self.waiting)
            rows, self.waiting = self.waiting[:window], self.waiting[window:]
            found = self._pool.find(self._keys[rows], self.shared.now_ms(), touch=True, pin=True)
            if found.mask.any():
                self._copy_out(rows[found.mask], found.only(found.mask))
            if not found.mask.all():
                self._read(rows[~found.mask])
            if len(self.waiting) >= before:
                return

    def _copy_out(self, rows: npt.NDArray[np.int64], found: Found) -> None:
        self.tiers[rows] = TierKind.DRAM
        if self._target is None:
            self._pool.unpin(found)
            self._settle_reason(rows, np.zeros(len(rows), np.uint8))
            return
        target = self._target
        addresses = self._pool.addresses(found.slots)
        self._add(
            self.shared.reactor.submit(
                lambda: Step(
                    self.shared.engine.copy_out(
                        addresses,
                        self._keys[rows],
                        found.checksums,
                        target.planes,
                        target.ids[rows],
                        self._remaining_s(),
                    ),
                    settle=lambda job: self._settle_copies(job, rows, found),
                    give_up=self._give_up,
                    keep=(target, self.shared.dram),
                )
            )
        )

    def _settle_copies(self, job: _core.Job, rows: npt.NDArray[np.int64], found: Found) -> None:
        codes = job.codes()
        corrupt = codes == Code.CORRUPT
        if corrupt.any():
            self.shared.drop_corrupt(self._pool, TierKind.DRAM, self._keys[rows[corrupt]])
        self._pool.unpin(found)
        self.bytes_done += int((codes == Code.OK).sum()) * self._space.block_bytes
        self._settle_reason(rows[~corrupt], REASON_OF_CODE[codes[~corrupt]])
        self._look_again(rows[corrupt])
        self._step_over(job)

    def _look_again(self, rows: npt.NDArray[np.int64]) -> None:
        """Let rows whose copy proved damaged be served by a lower tier."""
        with self._lock:
            if self._ended_by is None and len(rows):
                self._was_corrupt[rows] = True
                self.tiers[rows] = TierKind.NONE
                self.waiting = np.concatenate([self.waiting, rows])

    def _read(self, rows: npt.NDArray[np.int64]) -> None:
        """Read rows that NVMe has into DRAM slots and on to the target; the rest are misses."""
        pool = self._nvme
        if pool is None or not self._is_nvme_up():
            self._miss(rows)
            return
        found = pool.find(self._keys[rows], self.shared.now_ms(), touch=True, pin=True)
        self._miss(rows[~found.mask])
        rows, found = rows[found.mask], found.only(found.mask)
        if not len(rows):
            return
        reservation = self._reserve(rows, pool.expiries_s[found.slots])
        has_slot = reservation.slots >= 0
        # Without a slot for now: no room, or the block has just arrived in DRAM. Looked at again.
        self.waiting = np.concatenate([rows[~has_slot], self.waiting])
        pool.unpin(found.only(~has_slot))
        if has_slot.any():
            self._submit_read(
                pool,
                _ReadBatch(
                    rows[has_slot],
                    found.only(has_slot),
                    reservation.slots[has_slot],
                    reservation.generations[has_slot],
                    reservation.outcomes[has_slot] == _RESERVED,
                ),
            )

    def _reserve(
        self, rows: npt.NDArray[np.int64], expiries_s: npt.NDArray[np.int64]
    ) -> Reservation:
        """Reserve DRAM slots; for a block that is just being brought in, a private one.

        Two requests that share a prefix must not wait for each other: the second reads its own
        copy under a key that nobody knows, and lets the slot go afterwards.
        """
        reservation = self._space.reserve_until(self._keys[rows], expiries_s)
        busy = reservation.outcomes == _IN_FLIGHT
        if busy.any():
            private_keys = np.frombuffer(os.urandom(16 * int(busy.sum())), np.uint8)
            private = self._space.reserve(private_keys.reshape(-1, 16), is_dirty=False)
            reservation.slots[busy] = private.slots
            reservation.generations[busy] = private.generations
        return reservation

    def _submit_read(self, pool: NvmePool, batch: _ReadBatch) -> None:
        self.tiers[batch.rows] = TierKind.NVME
        fds, offsets = pool.locate(batch.found.slots)
        addresses = self._pool.addresses(batch.slots)
        target = self._target
        self._add(
            self.shared.reactor.submit(
                lambda: Step(
                    self.shared.engine.read(
                        fds,
                        offsets,
                        addresses,
                        self._space.block_bytes,
                        pool.slot_bytes,
                        self._keys[batch.rows],
                        batch.found.checksums,
                        None if target is None else target.planes,
                        None if target is None else target.ids[batch.rows],
                        self._remaining_s(),
                    ),
                    settle=lambda job: self._settle_reads(job, pool, batch),
                    give_up=self._give_up,
                    keep=(target, self.shared.dram),
                )
            )
        )

    def _settle_reads(self, job: _core.Job, pool: NvmePool, batch: _ReadBatch) -> None:
        codes = job.codes()
        keys = self._keys[batch.rows]
        arrived = codes == Code.OK
        kept = arrived & batch.is_shared
        with self.shared.events.changing():
            stands = self._pool.index.commit(
                batch.slots[kept], batch.generations[kept], batch.found.checksums[kept]
            )
            stored = keys[kept][stands]  # the others were dropped meanwhile
            self.shared.note_stored(self._space.namespace_id, TierKind.DRAM, stored)
        self._pool.index.abort(batch.slots[~kept], batch.generations[~kept])
        damaged = (codes == Code.CORRUPT) | (codes == Code.SHORT)
        if damaged.any():
            self.shared.drop_corrupt(pool, TierKind.NVME, keys[damaged])
        pool.unpin(batch.found)
        if self.shared.nvme is not None:
            # A caller in a hurry says nothing about the device.
            telling = codes != Code.TIMEOUT if self._deadline_s < _SLOW_READ_S else codes >= Code.OK
            self.shared.nvme.note_outcome(codes[telling], job.errnos()[telling])
        self.bytes_done += int(arrived.sum()) * self._space.block_bytes
        reasons = REASON_OF_CODE[codes]
        reasons[damaged] = MissReason.CORRUPT
        self._settle_reason(batch.rows, reasons)
        self._step_over(job)

    def _miss(self, rows: npt.NDArray[np.int64]) -> None:
        if not len(rows):
            return
        reasons = self._space.explain(self._keys[rows], self._hashes[rows])
        reasons[self._was_corrupt[rows]] = MissReason.CORRUPT
        self._settle_reason(rows, reasons)

    def _is_nvme_up(self) -> bool:
        return self.shared.nvme is not None and self.shared.nvme.is_up()
