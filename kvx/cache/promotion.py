"""Blocks that have just passed between the engine and DRAM are kept in HBM, too.

A copy inside the device from the engine's planes, at the end of the transfer that brought them:
while the transfer is pending nobody else may write there. It is no part of the outcome: what does
not come about in time is let go, and the transfer is as good without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.reactor import Step
from kvx.cache.result import TierKind
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.memory_tier import MemoryPool
    from kvx.cache.operation import Operation
    from kvx.cache.pool import Found, Pool
    from kvx.cache.reactor import MovingJob
    from kvx.cache.shared import Shared
    from kvx.cache.space import CacheSpace
    from kvx.layout import BlockSelection

_RESERVED = int(_core.ReserveOutcome.RESERVED)
_HBM = TierKind.HBM


@dataclass(frozen=True, slots=True)
class Brought:
    """Blocks that a transfer has verified, and what they came from or went to.

    Attributes:
        blocks: Where they lie in the engine's memory.
        keys: (n, 16) uint8.
        origin: The pool in host memory or on disk that holds them, too.
        found: Their slots, generations and checksums there.
    """

    blocks: BlockSelection
    keys: npt.NDArray[np.uint8]
    origin: Pool
    found: Found


def promote(
    operation: Operation,
    shared: Shared,
    space: CacheSpace,
    brought: Brought,
) -> None:
    """Start to copy blocks into HBM slots, for an operation that waits for it.

    Nothing is done for one that has ended: the engine may be writing there again.

    Args:
        operation: The transfer that brought them, pending.
        shared: The cache.
        space: Its namespace.
        brought: The blocks.
    """
    if space.hbm_pool is None or not len(brought.keys):
        return
    with operation.held_open() as is_open:
        if is_open:
            _start(operation, shared, space, brought, space.hbm_pool)


def _start(
    operation: Operation, shared: Shared, space: CacheSpace, brought: Brought, pool: MemoryPool
) -> None:
    keys, blocks = brought.keys, brought.blocks
    reservation = space.reserve_until(keys, brought.origin.expiries_s[brought.found.slots], _HBM)
    got = reservation.outcomes == _RESERVED
    # Looked at after they were reserved: a block dropped since it was found must not come back.
    stays = got & brought.origin.still_holds(keys, brought.found, shared.now_ms())
    pool.index.abort(reservation.slots[got & ~stays], reservation.generations[got & ~stays])
    keys, checksums = keys[stays], brought.found.checksums[stays]
    slots, generations = reservation.slots[stays], reservation.generations[stays]
    if not len(keys):
        return

    def settle(job: MovingJob) -> None:
        with operation.held_open() as is_open:
            arrived = (job.codes() == Code.OK) & is_open
        with shared.events.changing():
            stands = pool.index.commit(slots[arrived], generations[arrived], checksums[arrived])
            stored = keys[arrived][stands]  # the others were dropped meanwhile
            shared.note_stored(space.namespace_id, _HBM, stored)
        pool.index.abort(slots[~arrived], generations[~arrived])
        operation.extra_over(job)

    operation.add_extra(
        shared.reactor.submit(
            lambda: Step(
                shared.engine.device_in(
                    blocks.planes,
                    np.ascontiguousarray(blocks.ids[stays]),
                    pool.addresses(slots),
                    operation.remaining_s(),
                ),
                settle=settle,
                give_up=operation.extra_over,
                keep=(blocks, shared.hbm),
            )
        )
    )
