"""Blocks that have just passed between the engine and DRAM are kept in HBM, too.

A copy inside the device from the engine's planes, at the end of the transfer that brought them:
while the transfer is pending nobody else may write there. It is no part of the outcome: what does
not come about in time is let go, and the transfer is as good without.
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

    from kvx.cache.operation import Operation
    from kvx.cache.shared import Shared
    from kvx.cache.space import CacheSpace
    from kvx.layout import BlockSelection

_RESERVED = int(_core.ReserveOutcome.RESERVED)


def promote(
    operation: Operation,
    shared: Shared,
    space: CacheSpace,
    blocks: BlockSelection,
    keys: npt.NDArray[np.uint8],
    checksums: npt.NDArray[np.uint64],
    expiries_s: npt.NDArray[np.int64],
) -> None:
    """Start to copy blocks into HBM slots, for an operation that waits for it.

    Args:
        operation: The transfer that brought them, pending.
        shared: The cache.
        space: Its namespace.
        blocks: Where they lie in the engine's memory.
        keys: (n, 16) uint8.
        checksums: (n,) uint64 that their bytes were verified against.
        expiries_s: (n,) int64 Unix time that they expire at; 0 for never.
    """
    pool = space.hbm_pool
    if pool is None or not len(keys):
        return
    reservation = space.reserve_until(keys, expiries_s, TierKind.HBM)
    got = reservation.outcomes == _RESERVED
    keys, checksums = keys[got], checksums[got]
    slots, generations = reservation.slots[got], reservation.generations[got]
    if not len(keys):
        return

    def settle(job: _core.Job) -> None:
        arrived = job.codes() == Code.OK
        with shared.events.changing():
            stands = pool.index.commit(slots[arrived], generations[arrived], checksums[arrived])
            stored = keys[arrived][stands]  # the others were dropped meanwhile
            shared.note_stored(space.namespace_id, TierKind.HBM, stored)
        pool.index.abort(slots[~arrived], generations[~arrived])
        operation.extra_over(job)

    operation.add_extra(
        shared.reactor.submit(
            lambda: Step(
                shared.engine.device_in(
                    blocks.planes,
                    np.ascontiguousarray(blocks.ids[got]),
                    pool.addresses(slots),
                    operation.remaining_s(),
                ),
                settle=settle,
                give_up=operation.extra_over,
                keep=(blocks, shared.hbm),
            )
        )
    )
