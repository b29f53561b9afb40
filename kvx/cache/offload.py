"""Blocks away from the engine: copied and checksummed into DRAM slots, then left to the flusher.

The transfer is done when the blocks are committed in DRAM (with `durability: each`, when they are
durable on NVMe). A block that is already there is not copied again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.arrival import Arrival
from kvx.cache.device import HOST_WAY
from kvx.cache.operation import REASON_OF_CODE, Operation
from kvx.cache.pool import Found
from kvx.cache.promotion import Brought, promote
from kvx.cache.reactor import Step
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.device import DeviceWay
    from kvx.cache.shared import Shared
    from kvx.cache.space import CacheSpace
    from kvx.layout import BlockSelection

_WINDOW_BYTES = 64 << 20
_WINDOWS_IN_FLIGHT = 3
_OUTCOME = _core.ReserveOutcome
_REASON_OF_OUTCOME = {
    int(_OUTCOME.EXISTS): MissReason.HIT,
    int(_OUTCOME.IN_FLIGHT): MissReason.IN_FLIGHT,
    int(_OUTCOME.QUOTA): MissReason.QUOTA,
}


class Offload(Operation):
    """Copies blocks from `source` into DRAM."""

    def __init__(
        self,
        shared: Shared,
        space: CacheSpace,
        keys: npt.NDArray[np.uint8],
        source: BlockSelection,
        *,
        ttl_s: int,
        deadline_s: float,
        way: DeviceWay | None = None,
    ) -> None:
        """Make the operation over (n, 16) uint8 keys and as many source blocks."""
        super().__init__(shared, "offload", len(keys), deadline_s)
        self._space = space
        self._keys = keys
        self._source = source
        self._ttl_s = ttl_s
        self._pool = space.dram_pool
        self._way = way or HOST_WAY
        if self._way.is_down:
            self._refuse_all(MissReason.TIER_DOWN)
        elif self._way.link is not None:
            self.arrival = Arrival(self._way.link, 1, is_watched=False)
        flusher = shared.flusher
        self._flusher = flusher if flusher is not None and flusher.confirms_each else None
        self._unconfirmed: dict[bytes, int] = {}
        if self._flusher is not None:
            self._flusher.on_flushed(self._confirm)
            shared.reactor.call_later(deadline_s, self.pump)

    def _launch(self) -> None:
        window = max(1, _WINDOW_BYTES // self._space.block_bytes)
        while len(self.waiting) and len(self._steps) < _WINDOWS_IN_FLIGHT:
            rows, rest = self.waiting[:window], self.waiting[window:]
            reservation = self._space.reserve(
                self._keys[rows], is_dirty=self.shared.nvme is not None, ttl_s=self._ttl_s
            )
            no_room = reservation.outcomes == int(_OUTCOME.NO_SPACE)
            self.waiting = np.concatenate([rows[no_room], rest])
            for outcome, reason in _REASON_OF_OUTCOME.items():
                self._resolve(rows[reservation.outcomes == outcome], reason)
            reserved = reservation.outcomes == int(_OUTCOME.RESERVED)
            if reserved.any():
                self._copy_in(
                    rows[reserved], reservation.slots[reserved], reservation.generations[reserved]
                )
            if no_room.any():
                self._wait_for_room()
                return

    def _wait_for_room(self) -> None:
        """Let the flusher make room; without one, blocks beyond the capacity are not kept.

        Evicting the head of a prefix to make room for its own tail would help nobody.
        """
        if self.shared.flusher is not None:
            self.shared.flusher.make_room()
        elif not self._steps:
            self._resolve(self.waiting, MissReason.NO_ROOM)
            self.waiting = self.waiting[:0]

    def _resolve(self, rows: npt.NDArray[np.int64], reason: MissReason) -> None:
        if reason is MissReason.HIT:
            self.tiers[rows] = TierKind.DRAM
            self._await_flush(rows)
        self._settle_reason(rows, np.full(len(rows), reason, np.uint8))

    def _copy_in(
        self,
        rows: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        generations: npt.NDArray[np.uint32],
    ) -> None:
        addresses = self._pool.addresses(slots)

        def begin() -> Step:
            job = self.shared.engine.copy_in(
                self._source.planes,
                self._source.ids[rows],
                addresses,
                self._keys[rows],
                self.remaining_s(),
                self._way.link is not None,
                self._way.mark,
            )
            return Step(
                job,
                settle=lambda _: self._settle_copies(job, rows, slots, generations),
                give_up=self.give_up,
                keep=(self._source, self.shared.dram),
            )

        self._add(self.shared.reactor.submit(begin), rows)

    def _settle_copies(
        self,
        job: _core.Job,
        rows: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        generations: npt.NDArray[np.uint32],
    ) -> None:
        codes = job.codes()
        arrived = codes == Code.OK
        index = self._pool.index
        self._await_flush(rows[arrived])
        with self.shared.events.changing():
            stands = index.commit(slots[arrived], generations[arrived], job.checksums()[arrived])
            stored = self._keys[rows[arrived]][stands]  # the others were dropped meanwhile
            self.shared.note_stored(self._space.namespace_id, TierKind.DRAM, stored)
        if not arrived.all():
            index.abort(slots[~arrived], generations[~arrived])
        self.tiers[rows[arrived]] = TierKind.DRAM
        self.bytes_done += int(arrived.sum()) * self._space.block_bytes
        self._settle_reason(rows, REASON_OF_CODE[codes])
        if self._way.reaches_hbm:
            kept = rows[arrived]
            checksums = job.checksums()[arrived]
            found = Found(arrived[arrived], slots[arrived], generations[arrived], checksums)
            brought = Brought(self._source.only(kept), self._keys[kept], self._pool, found)
            promote(self, self.shared, self._space, brought)
        if self.shared.flusher is not None:
            self.shared.flusher.kick()
        self.step_over(job)

    def _await_flush(self, rows: npt.NDArray[np.int64]) -> None:
        """With `durability: each`, let the transfer go on until these blocks are on NVMe."""
        if self._flusher is None:
            return
        with self._lock:
            for row in rows[~self._flusher.holds(self._keys[rows], self._space.block_bytes)]:
                self._unconfirmed[self._keys[row].tobytes()] = int(row)

    def _confirm(self, keys: npt.NDArray[np.uint8], is_durable: bool) -> None:  # noqa: FBT001
        """Take note of what the flusher is done with."""
        with self._lock:
            for key in map(bytes, keys):
                row = self._unconfirmed.pop(key, None)
                if row is not None and not is_durable and self._ended_by is None:
                    self.reasons[row] = MissReason.TIER_DOWN
        self.pump()

    def _is_unconfirmed(self) -> bool:
        return bool(self._unconfirmed)

    def _finish(self) -> None:
        if self._flusher is not None:
            self._flusher.forget(self._confirm)
        super()._finish()
