"""Blocks from NVMe into DRAM for nobody in particular: after a restart, or for a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.reactor import Step
from kvx.cache.result import TierKind
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.memory_tier import MemoryPool
    from kvx.cache.nvme import NvmePool, NvmeTier
    from kvx.cache.pool import Found
    from kvx.cache.reactor import MovingJob
    from kvx.cache.shared import Shared

_RESERVED = int(_core.ReserveOutcome.RESERVED)


@dataclass(frozen=True, slots=True)
class ColdBlocks:
    """Blocks of one namespace that NVMe holds, pinned there.

    Attributes:
        pool: Their pool.
        keys: (n, 16) uint8.
        found: Where they are in it.
        namespace_id: Their namespace.
    """

    pool: NvmePool
    keys: npt.NDArray[np.uint8]
    found: Found
    namespace_id: int

    def only(self, mask: npt.NDArray[np.bool_]) -> ColdBlocks:
        """Return the rows where `mask` holds."""
        return ColdBlocks(self.pool, self.keys[mask], self.found.only(mask), self.namespace_id)


@dataclass(frozen=True, slots=True)
class _Warming:
    """Blocks on their way into DRAM slots that are reserved for them."""

    blocks: ColdBlocks
    pool: MemoryPool
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint32]


def warm(
    shared: Shared,
    nvme: NvmeTier,
    blocks: ColdBlocks,
    deadline_s: float,
    when_over: Callable[[int], None],
) -> bool:
    """Begin to read blocks into DRAM; what DRAM has, or has no room for, is let go.

    Args:
        shared: The cache.
        nvme: Its NVMe tier.
        blocks: What to read; not pinned any more in the end.
        deadline_s: Seconds until the reads are given up.
        when_over: Called with the number of blocks that are in DRAM now.

    Returns:
        False when there is nothing to read: `when_over` is not called.
    """
    block_bytes = int(shared.names.describe(np.array([blocks.namespace_id])).block_bytes[0])
    pool = shared.dram.pool_for(block_bytes)
    reservation = shared.dram.reserve_until(
        pool,
        blocks.keys,
        blocks.pool.expiries_s[blocks.found.slots],
        owner=int(shared.names.owners_of(np.array([blocks.namespace_id]))[0]),
        namespace_id=blocks.namespace_id,
        now_ms=shared.now_ms(),
    )
    shared.note_evicted(TierKind.DRAM, reservation.evicted_keys)
    got = reservation.outcomes == _RESERVED
    blocks.pool.unpin(blocks.found.only(~got))
    if not got.any():
        return False
    warming = _Warming(blocks.only(got), pool, reservation.slots[got], reservation.generations[got])
    _submit(shared, nvme, warming, deadline_s, when_over)
    return True


def _submit(
    shared: Shared,
    nvme: NvmeTier,
    warming: _Warming,
    deadline_s: float,
    when_over: Callable[[int], None],
) -> None:
    blocks = warming.blocks
    fds, offsets = blocks.pool.locate(blocks.found.slots)
    block_bytes = int(shared.names.describe(np.array([blocks.namespace_id])).block_bytes[0])
    shared.reactor.submit(
        lambda: Step(
            shared.engine.read(
                fds,
                offsets,
                warming.pool.addresses(warming.slots),
                block_bytes,
                blocks.pool.slot_bytes,
                blocks.keys,
                blocks.found.checksums,
                None,
                None,
                deadline_s,
            ),
            settle=lambda job: when_over(_settle(shared, nvme, warming, job)),
            give_up=lambda job: nvme.note_outcome(job.codes(), job.errnos()),
            keep=shared.dram,
        )
    )


def _settle(shared: Shared, nvme: NvmeTier, warming: _Warming, job: MovingJob) -> int:
    blocks, slots, generations = warming.blocks, warming.slots, warming.generations
    codes = job.codes()
    # A block dropped since it was found must not come back.
    still = blocks.pool.still_holds(blocks.keys, blocks.found, shared.now_ms())
    kept = (codes == Code.OK) & still
    with shared.events.changing():
        stands = warming.pool.index.commit(
            slots[kept], generations[kept], blocks.found.checksums[kept]
        )
        shared.note_stored(blocks.namespace_id, TierKind.DRAM, blocks.keys[kept][stands])
    warming.pool.index.abort(slots[~kept], generations[~kept])
    nvme.note_outcome(codes, job.errnos())
    blocks.pool.unpin(blocks.found)
    damaged = codes == Code.CORRUPT
    if damaged.any():
        shared.drop_corrupt(blocks.pool, TierKind.NVME, blocks.keys[damaged])
    return int(stands.sum())
