"""Groups of blocks from DRAM to objects, behind everybody's back.

What is offered waits by its keys alone: nothing is pinned until its turn comes, and what has left
DRAM by then is read back from NVMe or let go. So nothing here ever holds up serving; beyond
`max_pending_bytes` groups are not taken at all, and are offered again with the next use.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.admission import Admission
from kvx.cache.result import TierKind
from kvx.cache.s3.format import GroupFacts, encode
from kvx.cache.s3.store import ObjectError, ObjectFault
from kvx.cache.warming import ColdBlocks, warm
from kvx.errors import CorruptBlock
from kvx.tier_config import AdmissionConfig

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.memory_tier import MemoryPool
    from kvx.cache.pool import Found
    from kvx.cache.s3.tier import S3Tier
    from kvx.cache.shared import Shared

    Keys = npt.NDArray[np.uint8]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks that make an object.

    Attributes:
        namespace_id: Their namespace.
        first_block: Place of the first in its prompt.
        keys: (blocks_per_object, 16) uint8.
    """

    namespace_id: int
    first_block: int
    keys: Keys


class Writing:
    """What waits to be stored, and what is being stored. Thread-safe.

    Attributes:
        pending_bytes: Bytes of blocks that wait or are on their way.
    """

    def __init__(self, shared: Shared, tier: S3Tier) -> None:
        """Have nothing."""
        self.pending_bytes = 0
        self._shared = shared
        self._tier = tier
        self._admission = Admission(AdmissionConfig(tier.config.admission.min_frequency))
        # Reads come first: at most half of what may be under way.
        self._turns = asyncio.Semaphore(max(1, tier.config.max_in_flight // 2))
        self._idle = threading.Condition()
        self._pending: dict[bytes, int] = {}
        self._is_closed = tier.config.is_read_only
        # Bodies of objects that were stored, to be filled again: new memory costs more than copies.
        self._spare: list[npt.NDArray[np.uint8]] = []

    def offer(self, namespace_id: int, places: npt.NDArray[np.int64], keys: Keys) -> None:
        """Take groups to be stored, those that are worth it.

        Args:
            namespace_id: Their namespace.
            places: (g,) int64 places of their first blocks in the prompt, multiples of
                blocks_per_object.
            keys: (g, blocks_per_object, 16) uint8.
        """
        if self._is_closed or not len(keys):
            return
        tier = self._tier
        width = tier.config.blocks_per_object
        is_known = tier.known.has(keys[:, -1])
        tier.instruments.note_groups("exists", int(is_known.sum()))
        worth = ~is_known & (places + width >= tier.config.admission.min_prefix_blocks)
        worth[worth] = self._admission.accept(np.ascontiguousarray(keys[worth, -1]), 0)
        tier.instruments.note_groups("rejected", int((~worth & ~is_known).sum()))
        if not tier.is_up():
            tier.instruments.note_groups("tier_down", int(worth.sum()))
            return
        for row in np.flatnonzero(worth):
            self._take(Group(namespace_id, int(places[row]), keys[row].copy()))

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; False when time was up first."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._pending, timeout_s)

    def close(self, timeout_s: float) -> int:
        """Take no more and wait; returns how many blocks were not stored by then."""
        self._is_closed = True
        self.wait_idle(timeout_s)
        with self._idle:
            return len(self._pending) * self._tier.config.blocks_per_object

    def _take(self, group: Group) -> None:
        tier = self._tier
        name = group.keys[-1].tobytes()
        shape = tier.shape_of(group.namespace_id)
        size_bytes = shape.num_blocks * shape.block_bytes
        with self._idle:
            if name in self._pending:
                tier.instruments.note_groups("pending", 1)
                return
            is_full = self.pending_bytes + size_bytes > tier.config.max_pending_bytes
            if is_full and self._pending:
                tier.instruments.note_groups("pending_full", 1)
                return
            self._pending[name] = size_bytes
            self.pending_bytes += size_bytes
        tier.loop.spawn(self._store(group, name))

    async def _store(self, group: Group, name: bytes) -> None:
        outcome = "failed"
        try:
            async with self._turns:
                outcome = await self._try_store(group)
        finally:
            self._tier.instruments.note_groups(outcome, 1)
            with self._idle:
                self.pending_bytes -= self._pending.pop(name)
                if not self._pending:
                    self._spare.clear()
                self._idle.notify_all()

    async def _try_store(self, group: Group) -> str:
        tier = self._tier
        if not tier.is_up():
            return "tier_down"
        body = await self._body(group)
        if body is None:
            return "incomplete"
        name = tier.name_of(group.namespace_id, group.keys[-1].tobytes())
        outcome = "stored"
        try:
            await tier.effort.call(
                "put",
                lambda: tier.store.put(name, body.data, only_if_absent=True),
                ends_at=tier.ends_at(),
                size_bytes=len(body),
            )
        except ObjectError as error:
            if error.fault is not ObjectFault.CONFLICT:
                _log.debug("a group of blocks is not stored: %s", error)
                return "failed"
            # Another machine was first, or an attempt of ours whose answer was lost.
            outcome = "exists"
        else:
            # One whose call was given up may still be read by somebody: it is not used again.
            self._spare.append(body)
            tier.instruments.note_stored(len(body))
            tier.ledger.stored(name, len(body), time.time())
        tier.known.add(group.keys[None])
        with self._shared.events.changing():
            self._shared.note_stored(group.namespace_id, TierKind.S3, group.keys)
        return outcome

    async def _body(self, group: Group) -> npt.NDArray[np.uint8] | None:
        """Return the body of the object; None when not all blocks are at hand any more."""
        shape = self._tier.shape_of(group.namespace_id)
        pool = self._shared.dram.pool_for(shape.block_bytes)
        is_held = pool.find(group.keys, self._shared.now_ms()).mask
        if not is_held.all() and not await self._warm(group, ~is_held):
            return None
        found = pool.find(group.keys, self._shared.now_ms(), pin=True)
        try:
            return self._encode(group, pool, found) if found.mask.all() else None
        finally:
            pool.unpin(found)

    def _encode(self, group: Group, pool: MemoryPool, found: Found) -> npt.NDArray[np.uint8] | None:
        tier = self._tier
        expiries_s = pool.expiries_s[found.slots]
        now_s = self._shared.now_ms() // 1000
        ends = [int(one) for one in expiries_s if one > 0]
        ends += [now_s + tier.config.ttl_s] if tier.config.ttl_s else []
        facts = GroupFacts(
            public_id=self._shared.names.public_id(group.namespace_id),
            first_block=group.first_block,
            stored_at_s=now_s,
            expiry_s=min(ends, default=0),
        )
        shape = tier.shape_of(group.namespace_id)
        target = self._spare.pop() if self._spare else None
        if target is not None and len(target) != shape.object_bytes:
            target = None
        try:
            return encode(
                shape, facts, group.keys, found.checksums, pool.addresses(found.slots),
                sealer=tier.sealer_of(group.namespace_id), target=target,
            )  # fmt: skip
        except CorruptBlock as error:
            _log.warning("a group of blocks is not stored: %s", error)
            damaged = group.keys[error.offset : error.offset + 1]
            self._shared.drop_corrupt(pool, TierKind.DRAM, damaged)
            return None

    async def _warm(self, group: Group, is_missing: npt.NDArray[np.bool_]) -> bool:
        """Bring blocks that have left DRAM back from NVMe; False when they are not there either."""
        nvme = self._shared.nvme
        block_bytes = self._tier.shape_of(group.namespace_id).block_bytes
        pool = None if nvme is None else nvme.pool_if_any(block_bytes)
        if nvme is None or pool is None or not nvme.is_up():
            return False
        keys = group.keys[is_missing]
        found = pool.find(keys, self._shared.now_ms(), pin=True)
        if not found.mask.all():
            pool.unpin(found)
            return False
        loop = asyncio.get_running_loop()
        over: asyncio.Future[int] = loop.create_future()

        def tell(count: int) -> None:
            self._tier.loop.call(lambda: None if over.done() else over.set_result(count))

        deadline_s = self._tier.config.deadline_s
        blocks = ColdBlocks(pool, keys, found, group.namespace_id)
        if not warm(self._shared, nvme, blocks, deadline_s, tell):
            return False
        try:
            return await asyncio.wait_for(over, 2 * deadline_s) == len(keys)
        except TimeoutError:
            return False
