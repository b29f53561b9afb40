"""Blocks toward the engine: from HBM inside the device, from DRAM, and through DRAM from elsewhere.

A block read from NVMe warms DRAM and streams on to its target as soon as its own bytes are there.
Blocks for device memory are verified in host memory before they are sent. A damaged copy in one
tier is dropped there and the block is looked for in the next.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.arrival import Arrival
from kvx.cache.device import HOST_WAY
from kvx.cache.operation import REASON_OF_CODE, Operation
from kvx.cache.peer.fetching import PeerFetches
from kvx.cache.promotion import Brought, promote
from kvx.cache.reactor import Step
from kvx.cache.read_batch import Landing, ReadBatch, Verdict, fetch_device, read_files
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.cache.s3.fetching import S3Fetches
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.device import DeviceWay
    from kvx.cache.memory_tier import Reservation
    from kvx.cache.pool import Found, Pool
    from kvx.cache.reactor import MovingJob
    from kvx.cache.shared import Shared
    from kvx.cache.space import CacheSpace
    from kvx.layout import BlockSelection

_WINDOW_BYTES = 64 << 20
_WINDOW_SHARE = 4
_WINDOWS_IN_FLIGHT = 3
_RESERVED = int(_core.ReserveOutcome.RESERVED)
_EXISTS = int(_core.ReserveOutcome.EXISTS)
_IN_FLIGHT = int(_core.ReserveOutcome.IN_FLIGHT)


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
        way: DeviceWay | None = None,
    ) -> None:
        """Make the operation over (n, 16) uint8 keys, their (n, k) hashes and target blocks."""
        super().__init__(
            shared, "onboard" if target is not None else "prefetch", len(keys), deadline_s
        )
        self._space = space
        self.keys = keys
        self._hashes = hashes
        self._target = target
        self.pool = space.dram_pool
        self.block_bytes = space.block_bytes
        self.namespace_id = space.namespace_id
        self._nvme = shared.nvme.pool_if_any(space.block_bytes) if shared.nvme else None
        # What became of a copy that failed, where the block was then looked for elsewhere.
        self._failed_as = np.zeros(len(keys), np.uint8)
        self._way = way or HOST_WAY
        self._hbm = space.hbm_pool
        self._others: list[PeerFetches | S3Fetches] = []
        if shared.peers is not None:
            self._others.append(PeerFetches(self, shared.peers))
        self._from_objects = None if space.s3 is None else S3Fetches(self, space.s3)
        if self._from_objects is not None:
            self._others.append(self._from_objects)
        # Rows that somebody else did not bring in time, though this operation had time left.
        self._is_late = np.zeros(len(keys), np.bool_)
        self._is_hbm_down = False
        self.is_prefetch = target is None
        if self._way.is_down:
            self._refuse_all(MissReason.TIER_DOWN)
        elif self._way.link is not None:
            self.arrival = Arrival(
                self._way.link, self._way.layers, is_watched=self._way.layers > 1
            )

    def _launch(self) -> None:
        window = max(1, _WINDOW_BYTES // self.block_bytes)
        window = min(window, max(1, self.pool.index.num_slots // _WINDOW_SHARE))
        if self._way.layers > 1:
            window = len(self.waiting)  # every block's first layer before anybody's second
        while len(self.waiting) and self._may_begin():
            before = len(self.waiting)
            rows, self.waiting = self.waiting[:window], self.waiting[window:]
            rows = self._copy_within(rows)
            found = self.pool.find(self.keys[rows], self.shared.now_ms(), touch=True, pin=True)
            if found.mask.any():
                self.copy_out(rows[found.mask], found.only(found.mask), TierKind.DRAM)
            if not found.mask.all():
                self._read(rows[~found.mask])
            if len(self.waiting) >= before:
                return

    def _may_begin(self) -> bool:
        """Return whether another window may begin; what objects bring is limited where it begins.

        A line to them is long: waiting for nearly all of a window to begin the next empties it.
        """
        if self._from_objects is not None and self._from_objects.is_full():
            return False
        return sum(step.is_window for step in self._steps) < _WINDOWS_IN_FLIGHT

    def _copy_within(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Serve what HBM has, inside the device; returns the rows that are left."""
        pool, target = self._hbm, self._target
        if pool is None or (target is not None and not self._way.reaches_hbm):
            return rows
        found = pool.find(self.keys[rows], self.shared.now_ms(), touch=True, pin=target is not None)
        rest, rows, found = rows[~found.mask], rows[found.mask], found.only(found.mask)
        self.tiers[rows] = TierKind.HBM
        if target is None:
            self._settle_reason(rows, np.zeros(len(rows), np.uint8))
        elif len(rows):
            self._add(
                self.shared.reactor.submit(
                    lambda: Step(
                        self.shared.engine.device_out(
                            pool.addresses(found.slots),
                            target.planes,
                            target.ids[rows],
                            self.remaining_s(),
                            self._way.mark,
                            self._progress,
                        ),
                        settle=lambda job: self._settle_within(job, rows, found),
                        give_up=self.give_up,
                        keep=(target, self.shared.hbm),
                    )
                ),
                rows,
            )
        return rest

    def _settle_within(self, job: MovingJob, rows: npt.NDArray[np.int64], found: Found) -> None:
        assert self._hbm is not None, "it served the rows"
        codes = job.codes()
        self._hbm.unpin(found)
        self.bytes_done += int((codes == Code.OK).sum()) * self.block_bytes
        self._settle_reason(rows, REASON_OF_CODE[codes])
        self.step_over(job)

    @property
    def _landing(self) -> Landing:
        return Landing(self.pool, self.block_bytes, self._target, self._way, self._progress)

    @property
    def _progress(self) -> _core.LayerProgress | None:
        return None if self.arrival is None else self.arrival.progress

    def _promote(self, rows: npt.NDArray[np.int64], origin: Pool, found: Found) -> None:
        hbm = self.shared.hbm
        if self._target is None or hbm is None or not hbm.config.promote:
            return
        if self._way.reaches_hbm:
            brought = Brought(self._target.only(rows), self.keys[rows], origin, found)
            promote(self, self.shared, self._space, brought)

    def copy_out(
        self,
        rows: npt.NDArray[np.int64],
        found: Found,
        tier: TierKind,
        when_over: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy blocks that are pinned in DRAM slots to the target, and unpin them.

        Args:
            rows: Of this operation.
            found: Their slots.
            tier: What they are said to come from.
            when_over: Called once the slots are not read any more.
        """
        self.tiers[rows] = tier
        if self._target is None:
            self.pool.unpin(found)
            if tier is not TierKind.DRAM:
                self.bytes_done += len(rows) * self.block_bytes
            self._settle_reason(rows, np.zeros(len(rows), np.uint8))
            when_over()
            return
        target = self._target
        addresses = self.pool.addresses(found.slots)

        def settle(job: MovingJob) -> None:
            when_over()
            self._settle_copies(job, rows, found)

        self._add(
            self.shared.reactor.submit(
                lambda: Step(
                    self.shared.engine.copy_out(
                        addresses,
                        self.keys[rows],
                        found.checksums,
                        target.planes,
                        target.ids[rows],
                        self.remaining_s(),
                        self._way.link is not None,
                        self._way.mark,
                        self._progress,
                        self._way.layer_planes,
                    ),
                    settle=settle,
                    give_up=self.give_up,
                    keep=(target, self.shared.dram),
                    is_window=tier is not TierKind.S3,
                )
            ),
            rows,
        )

    def _settle_copies(self, job: MovingJob, rows: npt.NDArray[np.int64], found: Found) -> None:
        codes = job.codes()
        corrupt = codes == Code.CORRUPT
        if corrupt.any():
            self.shared.drop_corrupt(self.pool, TierKind.DRAM, self.keys[rows[corrupt]])
        arrived = codes == Code.OK
        self._promote(rows[arrived], self.pool, found.only(arrived))
        self.pool.unpin(found)
        self.bytes_done += int(arrived.sum()) * self.block_bytes
        self._settle_reason(rows[~corrupt], REASON_OF_CODE[codes[~corrupt]])
        self.look_again(rows[corrupt], REASON_OF_CODE[codes[corrupt]])
        self.step_over(job)

    def look_again(self, rows: npt.NDArray[np.int64], reasons: npt.NDArray[np.uint8]) -> None:
        """Let rows whose copy failed be served by another tier; reason 0 is none in particular."""
        with self._lock:
            if self._ended_by is not None or not len(rows):
                return
            self._failed_as[rows] = np.where(reasons, reasons, self._failed_as[rows])
            self.tiers[rows] = TierKind.NONE
            if self.arrival is None or self.arrival.reopen():
                self.waiting = np.concatenate([self.waiting, rows])
            else:
                self._settle_reason(rows, reasons)

    def look_elsewhere(self, rows: npt.NDArray[np.int64], reasons: npt.NDArray[np.uint8]) -> None:
        """As `look_again`, for rows that a peer or S3 did not bring, for whatever reason."""
        self._is_late[rows] = reasons == MissReason.DEADLINE
        self.look_again(rows, reasons)

    def _read(self, rows: npt.NDArray[np.int64]) -> None:
        """Bring rows that another tier has into DRAM slots and on; the rest are misses."""
        rows = self._read_from_hbm(rows)
        if not len(rows):
            return
        pool = self._nvme
        if pool is not None and self._is_nvme_up():
            found = pool.find(self.keys[rows], self.shared.now_ms(), touch=True, pin=True)
            brought, rows = rows[found.mask], rows[~found.mask]
            if len(brought):
                self._bring(TierKind.NVME, pool, brought, found.only(found.mask))
        for other in self._others:
            rows = other.launch(rows)
        self._miss(rows)

    def _has_run_out(self) -> bool:
        # Peers and S3 have deadlines of their own: that they were late is a miss like any other.
        return bool(((self.reasons == MissReason.DEADLINE) & ~self._is_late).any())

    def _read_from_hbm(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Fetch rows that only HBM has for a target in host memory; returns those that are left."""
        pool = self._hbm
        if pool is None or self._target is None or self._way.reaches_hbm:
            return rows
        now_ms = self.shared.now_ms()
        found = pool.find(self.keys[rows], now_ms, touch=True, pin=not self._is_hbm_down)
        if self._is_hbm_down:  # the device fails: what NVMe has is read from there
            self._failed_as[rows[found.mask]] = MissReason.TIER_DOWN
            return rows
        if found.mask.any():
            self._bring(TierKind.HBM, pool, rows[found.mask], found.only(found.mask))
        return rows[~found.mask]

    def _bring(self, tier: TierKind, pool: Pool, rows: npt.NDArray[np.int64], found: Found) -> None:
        reservation = self.reserve(rows, pool.expiries_s[found.slots])
        has_slot = reservation.slots >= 0
        # Without a slot for now: no room, or the block has just arrived in DRAM. Looked at again.
        self.postpone(rows[~has_slot])
        pool.unpin(found.only(~has_slot))
        if has_slot.any():
            self._submit_read(
                ReadBatch(
                    tier,
                    pool,
                    rows[has_slot],
                    found.only(has_slot),
                    reservation.slots[has_slot],
                    reservation.generations[has_slot],
                    reservation.outcomes[has_slot] == _RESERVED,
                ),
            )

    def postpone(self, rows: npt.NDArray[np.int64]) -> None:
        """Look at rows again, before those that wait; what launches them holds the lock."""
        self.waiting = np.concatenate([rows, self.waiting])

    def reserve(
        self, rows: npt.NDArray[np.int64], expiries_s: npt.NDArray[np.int64]
    ) -> Reservation:
        """Reserve DRAM slots; for a block that is just being brought in, a private one.

        Two requests that share a prefix must not wait for each other: the second reads its own
        copy under a key that nobody knows, and lets the slot go afterwards.
        """
        reservation = self._space.reserve_until(self.keys[rows], expiries_s)
        # What is there by now is somebody's live block: its slot is not ours to read into.
        reservation.slots[reservation.outcomes == _EXISTS] = -1
        busy = reservation.outcomes == _IN_FLIGHT
        if busy.any():
            private_keys = np.frombuffer(os.urandom(16 * int(busy.sum())), np.uint8)
            private = self._space.reserve(private_keys.reshape(-1, 16), is_dirty=False)
            reservation.slots[busy] = private.slots
            reservation.generations[busy] = private.generations
        return reservation

    def _submit_read(self, batch: ReadBatch) -> None:
        self.tiers[batch.rows] = batch.tier
        begin = read_files if batch.tier is TierKind.NVME else fetch_device
        keys, landing = self.keys[batch.rows], self._landing
        nvme = self.shared.nvme if batch.tier is TierKind.NVME else None
        verdict = Verdict(nvme, self._deadline_s)

        def give_up(job: MovingJob) -> None:
            verdict.note(job)
            self.give_up(job)

        self._add(
            self.shared.reactor.submit(
                lambda: Step(
                    begin(self.shared.engine, batch, keys, landing, self.remaining_s()),
                    settle=lambda job: self._settle_reads(job, batch, verdict),
                    give_up=give_up,
                    keep=(self._target, self.shared.dram, self.shared.hbm),
                )
            ),
            batch.rows,
        )

    def _settle_reads(self, job: MovingJob, batch: ReadBatch, verdict: Verdict) -> None:
        verdict.note(job)
        codes = job.codes()
        pool = batch.pool
        keys = self.keys[batch.rows]
        arrived = codes == Code.OK
        still = pool.still_holds(keys, batch.found, self.shared.now_ms())
        kept = arrived & batch.is_shared & still
        with self.shared.events.changing():
            stands = self.pool.index.commit(
                batch.slots[kept], batch.generations[kept], batch.found.checksums[kept]
            )
            stored = keys[kept][stands]  # the others were dropped meanwhile
            self.shared.note_stored(self.namespace_id, TierKind.DRAM, stored)
        self.pool.index.abort(batch.slots[~kept], batch.generations[~kept])
        damaged = (codes == Code.CORRUPT) | (codes == Code.SHORT)
        if damaged.any():
            self.shared.drop_corrupt(pool, batch.tier, keys[damaged])
        self._promote(batch.rows[arrived], pool, batch.found.only(arrived))
        pool.unpin(batch.found)
        self.bytes_done += int(arrived.sum()) * self.block_bytes
        reasons = REASON_OF_CODE[codes]
        reasons[damaged] = MissReason.CORRUPT
        is_elsewhere = np.zeros(len(codes), np.bool_)
        if batch.tier is TierKind.HBM:
            is_elsewhere = damaged | (reasons == MissReason.TIER_DOWN)
            if (reasons == MissReason.TIER_DOWN).any():
                self._is_hbm_down = True
        self._settle_reason(batch.rows[~is_elsewhere], reasons[~is_elsewhere])
        self.look_again(batch.rows[is_elsewhere], reasons[is_elsewhere])
        self.step_over(job)

    def _miss(self, rows: npt.NDArray[np.int64]) -> None:
        if not len(rows):
            return
        reasons = self._space.explain(self.keys[rows], self._hashes[rows])
        failed_as = self._failed_as[rows]
        self._settle_reason(rows, np.where(failed_as == MissReason.HIT, reasons, failed_as))

    def _is_nvme_up(self) -> bool:
        return self.shared.nvme is not None and self.shared.nvme.is_up()
