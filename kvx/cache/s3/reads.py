"""The ranged reads of one S3 tier that are under way."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.cache.s3.format import decode_frames
from kvx.cache.s3.reading import ObjectRead
from kvx.cache.s3.store import ObjectError, ObjectFault
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx.cache.s3.fetching import Part
    from kvx.cache.s3.tier import S3Tier
    from kvx.cache.shared import Shared

_log = logging.getLogger(__name__)
_SUSPECTS_MAX = 4096
# What is not there has nothing to say.
_CODE_OF_FAULT = {
    ObjectFault.MISSING: Code.SKIPPED,
    ObjectFault.TIMEOUT: Code.TIMEOUT,
    ObjectFault.RANGE: Code.CORRUPT,
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a read asks for.

    Attributes:
        namespace_id: Of the blocks.
        part: Which.
        addresses: (n,) int64 of the slots they go to.
        ends_at: When it ends at the latest, of the monotonic clock.
    """

    namespace_id: int
    part: Part
    addresses: npt.NDArray[np.int64]
    ends_at: float


class Reads:
    """Makes and runs them. Thread-safe."""

    def __init__(self, shared: Shared, tier: S3Tier) -> None:
        """Have none."""
        self._shared = shared
        self._tier = tier
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._reads: weakref.WeakSet[ObjectRead] = weakref.WeakSet()
        self._is_closed = False
        # Objects that a block of was damaged once, and may be another time; the newest of them.
        self._suspects: OrderedDict[bytes, None] = OrderedDict()

    def make(self, num_blocks: int) -> ObjectRead:
        """Return a read of so many blocks that `begin` begins."""
        read = ObjectRead(num_blocks, self._stop, self._shared.reactor.ended)
        self._reads.add(read)
        return read

    def begin(self, read: ObjectRead, request: Request) -> None:
        """Begin a read; its step is known by now, so its end cannot be missed."""

        def start() -> None:
            task = asyncio.get_running_loop().create_task(self._run(read, request))
            self._tasks[read.id] = task
            task.add_done_callback(lambda _: self._tasks.pop(read.id, None))

        if self._is_closed or not self._tier.loop.call(start):
            read.cancel()

    def close(self) -> None:
        """End what is under way as cancelled, and begin no more."""
        self._is_closed = True
        for read in list(self._reads):
            read.cancel()

    def _stop(self, number: int) -> None:
        def cancel() -> None:
            task = self._tasks.get(number)
            if task is not None:
                task.cancel()

        self._tier.loop.call(cancel)

    async def _run(self, read: ObjectRead, request: Request) -> None:
        tier, part = self._tier, request.part
        shape = tier.shape_of(request.namespace_id)
        name = tier.name_of(request.namespace_id, part.last_key)
        start, size_bytes = shape.span(part.first, len(part.rows))
        try:
            body = await tier.effort.call(
                "get",
                lambda: tier.store.get(name, start, size_bytes),
                ends_at=request.ends_at,
                may_hedge=True,
                size_bytes=size_bytes,
            )
        except ObjectError as error:
            self._note_failure(error, part)
            read.fail(_CODE_OF_FAULT.get(error.fault, Code.UNAVAILABLE))
            return
        except BaseException:
            read.fail(Code.CANCELLED)
            raise
        if not read.begin_landing():
            return
        codes, checksums = decode_frames(
            shape, body, first=part.first, keys=part.keys, addresses=request.addresses,
            sealer=tier.sealer_of(request.namespace_id), name=name, now_s=int(time.time()),
        )  # fmt: skip
        num_arrived = int((codes == Code.OK).sum())
        tier.instruments.note_read(num_arrived * shape.block_bytes)
        tier.ledger.used(name)
        if num_arrived < len(codes):
            self._note_damage(name, part, codes)
        read.finish(codes, checksums)

    def _note_failure(self, error: ObjectError, part: Part) -> None:
        if error.fault is ObjectFault.MISSING:
            self._tier.forget(part.keys[:1], MissReason.EVICTED)
            self._tier.known.note_absent(part.last_key)
        elif error.fault is ObjectFault.RANGE:
            self._tier.forget(part.keys[:1], MissReason.CORRUPT)
        _log.debug("blocks of an object have not come: %s", error)

    def _note_damage(self, name: str, part: Part, codes: npt.NDArray[np.int32]) -> None:
        """Forget an object that has expired or is damaged; damaged twice, it is deleted."""
        self._tier.forget(part.keys[:1], MissReason.CORRUPT)
        self._tier.known.note_absent(part.last_key)
        count = int(((codes == Code.CORRUPT) | (codes == Code.SHORT)).sum())
        if not count:
            return
        self._shared.instruments.note_corrupt(TierKind.S3, count)
        _log.warning("%s: %d of %d blocks are damaged and not served", name, count, len(codes))
        if part.last_key in self._suspects:
            del self._suspects[part.last_key]
            self._tier.delete([name], "corrupt")
            return
        self._suspects[part.last_key] = None
        if len(self._suspects) > _SUSPECTS_MAX:
            self._suspects.popitem(last=False)
