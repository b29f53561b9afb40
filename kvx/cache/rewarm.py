"""After a restart: the blocks that were used most come back from NVMe into DRAM, hottest first.

Runs in the background in windows, gives way to everything else (it only takes free slots), and
stops when DRAM is full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.reactor import Step
from kvx.cache.result import TierKind
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.nvme import NvmePool, NvmeTier
    from kvx.cache.shared import Shared

_WINDOW_BYTES = 32 << 20
_DEADLINE_S = 30.0
_RESERVED = int(_core.ReserveOutcome.RESERVED)


class Rewarm:
    """One pass over what NVMe held when the cache was opened.

    Attributes:
        blocks_total: Blocks that will be looked at: at most what fits into DRAM.
        blocks_done: Blocks looked at so far.
        blocks_warmed: Blocks that are in DRAM because of it.
    """

    def __init__(self, shared: Shared, nvme: NvmeTier) -> None:
        """Make the list, hottest first; `start` begins."""
        self._shared = shared
        self._nvme = nvme
        self._todo: list[tuple[NvmePool, npt.NDArray[np.uint8], int]] = []
        self.blocks_total = 0
        self.blocks_done = 0
        self.blocks_warmed = 0
        self.is_done = False
        budget_bytes = shared.dram.config.capacity_bytes
        for pool in nvme.pools.values():
            blocks = pool.index.snapshot()
            hottest_first = slice(None, None, -1)
            keys = blocks["keys"][hottest_first][: budget_bytes // pool.slot_bytes]
            slots = blocks["slots"][hottest_first][: len(keys)]
            budget_bytes -= len(keys) * pool.slot_bytes
            self.blocks_total += len(keys)
            self._todo += list(_windows(pool, keys, pool.namespace_ids[slots]))
        self._todo.reverse()

    def start(self) -> None:
        """Begin on the reactor's thread."""
        self._shared.reactor.call_later(0.0, self._next)

    def stop(self) -> None:
        """Start no further window."""
        self._todo.clear()

    def _next(self) -> None:
        while self._todo:
            pool, keys, namespace_id = self._todo.pop()
            self.blocks_done += len(keys)
            if self._nvme.is_up() and self._start_window(pool, keys, namespace_id):
                return
        self.is_done = True

    def _start_window(self, pool: NvmePool, keys: npt.NDArray[np.uint8], namespace_id: int) -> bool:
        """Submit the reads of one window; False when there is nothing to read or no room."""
        block_bytes = int(self._shared.names.describe(np.array([namespace_id])).block_bytes[0])
        dram_pool = self._shared.dram.pool_for(block_bytes)
        now_ms = self._shared.now_ms()
        keys = keys[~dram_pool.find(keys, now_ms).mask]
        found = pool.find(keys, now_ms, pin=True)
        num_free = self._shared.dram.num_free(dram_pool, len(keys))
        # Blocks that expire are not worth warming, and would need their own time to live in DRAM.
        wanted = found.mask & (pool.expiries_s[found.slots] == 0)
        fits = wanted & (np.cumsum(wanted) <= num_free)
        pool.unpin(found.only(found.mask & ~fits))
        keys, found = keys[fits], found.only(fits)
        if not len(keys):
            return False
        reservation = self._shared.dram.reserve(
            dram_pool,
            keys,
            owner=int(self._shared.names.owners_of(np.array([namespace_id]))[0]),
            namespace_id=namespace_id,
            is_dirty=False,
            ttl_s=0,
            now_ms=now_ms,
        )
        got = reservation.outcomes == _RESERVED
        pool.unpin(found.only(~got))
        found, keys = found.only(got), keys[got]
        slots, generations = reservation.slots[got], reservation.generations[got]
        if not len(keys):
            return False
        fds, offsets = pool.locate(found.slots)
        addresses = dram_pool.addresses(slots)

        def settle(job: _core.Job) -> None:
            codes = job.codes()
            ok = codes == Code.OK
            with self._shared.events.changing():
                stands = dram_pool.index.commit(slots[ok], generations[ok], found.checksums[ok])
                self._shared.note_stored(namespace_id, TierKind.DRAM, keys[ok][stands])
            dram_pool.index.abort(slots[~ok], generations[~ok])
            self._nvme.note_outcome(codes, job.errnos())
            pool.unpin(found)
            damaged = codes == Code.CORRUPT
            if damaged.any():
                self._shared.drop_corrupt(pool, TierKind.NVME, keys[damaged])
            self.blocks_warmed += int(ok.sum())
            self._next()

        self._shared.reactor.submit(
            lambda: Step(
                self._shared.engine.read(
                    fds, offsets, addresses, block_bytes, pool.slot_bytes, keys,
                    found.checksums, None, None, _DEADLINE_S,
                ),
                settle=settle,
                give_up=lambda job: self._nvme.note_outcome(job.codes(), job.errnos()),
                keep=self._shared.dram,
            )
        )  # fmt: skip
        return True


def _windows(
    pool: NvmePool, keys: npt.NDArray[np.uint8], namespace_ids: npt.NDArray[np.int32]
) -> list[tuple[NvmePool, npt.NDArray[np.uint8], int]]:
    """Cut keys into windows of one namespace each, in order within every namespace."""
    size = max(1, _WINDOW_BYTES // pool.slot_bytes)
    windows = []
    for start in range(0, len(keys), size):
        part, ids = keys[start : start + size], namespace_ids[start : start + size]
        windows += [(pool, part[ids == one], int(one)) for one in np.unique(ids)]
    return windows
