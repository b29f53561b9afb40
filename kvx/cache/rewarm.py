"""After a restart: the blocks that were used most come back from NVMe into DRAM, hottest first.

Runs in the background in windows, gives way to everything else (it only takes free slots), and
stops when DRAM is full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.warming import ColdBlocks, warm

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.nvme import NvmePool, NvmeTier
    from kvx.cache.shared import Shared

_WINDOW_BYTES = 32 << 20
_DEADLINE_S = 30.0


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
        # Blocks that expire are not worth warming.
        wanted = found.mask & (pool.expiries_s[found.slots] == 0)
        fits = wanted & (np.cumsum(wanted) <= num_free)
        pool.unpin(found.only(found.mask & ~fits))
        if not fits.any():
            return False
        blocks = ColdBlocks(pool, keys[fits], found.only(fits), namespace_id)
        return warm(self._shared, self._nvme, blocks, _DEADLINE_S, self._over)

    def _over(self, num_warmed: int) -> None:
        self.blocks_warmed += num_warmed
        self._next()


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
