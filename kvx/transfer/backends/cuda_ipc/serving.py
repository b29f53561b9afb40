"""What peers ask of this agent: to copy out of its device memory, and to be copied into it.

A read is allowed and then done by the peer; nobody here touches it again. A write is done here, by
our own device, so that nobody but the owner ever writes its memory.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import KvxError, StaleReference, UsageError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.lease_token import Rights
from kvx.transfer.backends.cuda_ipc import messages
from kvx.transfer.backends.cuda_ipc.active import Active
from kvx.transfer.backends.cuda_ipc.job import DeviceJob, code_of
from kvx.transfer.backends.cuda_ipc.messages import Done, Open, Opened, Write, lease_of, text_of
from kvx.transfer.backends.cuda_ipc.pull import PullPlan
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.backend import LeaseUse
    from kvx.transfer.backends.cuda_ipc.endpoint import CudaIpcEndpoint

# Of one peer at a time; each may hold a lease and a list of blocks.
_SERVED_MAX = 4096


@dataclass(frozen=True, slots=True, eq=False)
class _Served:
    """A write of a peer that is under way here."""

    job: DeviceJob
    use: LeaseUse


class Serving:
    """Answers for the memory of one agent; everything on the endpoint's clerk but `held_back`."""

    def __init__(self, endpoint: CudaIpcEndpoint) -> None:
        """Serve nobody yet."""
        self._endpoint = endpoint
        self._host = endpoint.host
        self._served: dict[tuple[str, int], _Served] = {}
        self._lock = threading.Lock()
        self._marks: dict[int, _core.StreamMark] = {}

    def hold_back(self, lease: int, mark: _core.StreamMark) -> None:
        """Answer nobody under a lease before a mark was reached. Thread-safe."""
        with self._lock:
            over = [number for number, known in self._marks.items() if _is_over(known)]
            for number in over:
                del self._marks[number]
            self._marks[lease] = mark

    def open(self, peer: str, word: Open) -> None:
        """Say whether a peer may copy under a lease, and where from."""
        try:
            region = self._check_lease(peer, word)
        except KvxError as error:
            self._refuse(peer, word, error)
            return
        mark = self._mark_of(word.lease[0])
        export = self._endpoint.exports.get(region)
        if mark is None or export is None:
            self._allow(peer, word)
            return

        def reached(code: Code) -> None:
            # By the clerk, so that what is said of a region stays in order.
            self._endpoint.clerk.do(functools.partial(self._reached, peer, word, code))

        export.desk.do(lambda: export.desk.when(mark, reached))

    def write(self, peer: str, word: Write) -> None:
        """Copy out of a peer's memory into ours, under a lease of ours."""
        key = (peer, word.number)
        try:
            if key in self._served or len(self._served) >= _SERVED_MAX:
                raise UsageError("the number is taken, or too many writes have not ended")
            use = self._host.use_lease(peer, lease_of(word.lease), int(Rights.WRITE))
        except KvxError as error:
            self._answer(peer, Done(word.number, code_of(error), text_of(error), b"", b""))
            return
        try:
            plan = self._planned(peer, word, use)
        except KvxError as error:
            use.end()
            self._answer(peer, Done(word.number, code_of(error), text_of(error), b"", b""))
            return
        job = DeviceJob(word.number, descriptors.totals(plan.local), word.deadline_ms / 1e3)
        self._served[key] = _Served(job, use)
        job.when_quiet = lambda: self._endpoint.clerk.do(functools.partial(self._over, key))
        active = Active(job, plan.target, peer, word.life, is_ours=False)
        try:
            self._endpoint.pull(active, plan, region=word.source_region, must_ask=False)
        except KvxError as error:
            job.end(code_of(error), text_of(error))
            job.settle()

    def cancel(self, peer: str, number: int) -> None:
        """End a write of a peer; it is told when nothing moves any more."""
        served = self._served.get((peer, number))
        if served is not None:
            served.job.end(Code.CANCELLED)
        else:
            self._answer(peer, Done(number, Code.CANCELLED, "it is over", b"", b""))

    def jobs(self) -> list[DeviceJob]:
        """Return the writes that are under way."""
        return [served.job for served in self._served.values()]

    def _mark_of(self, lease: int) -> _core.StreamMark | None:
        with self._lock:
            mark = self._marks.get(lease)
            if mark is not None and _is_over(mark):
                del self._marks[lease]
                return None
            return mark

    def _check_lease(self, peer: str, word: Open) -> int:
        use = self._host.use_lease(peer, lease_of(word.lease), int(Rights.READ))
        try:
            if use.region != word.region:
                raise UsageError(f"the lease is on region {use.region}, not on {word.region}")
            return use.region
        finally:
            use.end()

    def _reached(self, peer: str, word: Open, code: Code) -> None:
        if code is not Code.OK:
            self._refuse(
                peer, word, StaleReference("the device failed before the blocks were made")
            )
            return
        try:
            self._check_lease(peer, word)
        except KvxError as error:
            self._refuse(peer, word, error)
            return
        self._allow(peer, word)

    def _allow(self, peer: str, word: Open) -> None:
        handle = None
        try:
            if word.wants_handle:
                handle = self._endpoint.exports.hand_out(word.region, peer, word.door)
        except KvxError as error:
            self._refuse(peer, word, error)
            return
        self._answer(peer, Opened(word.number, Code.OK, "", handle))

    def _refuse(self, peer: str, word: Open, error: KvxError) -> None:
        self._answer(peer, Opened(word.number, code_of(error), text_of(error), None))

    def _planned(self, peer: str, word: Write, use: LeaseUse) -> PullPlan:
        """Return what a write comes to; UsageError for what no honest peer asks for."""
        memory = self._endpoint.memory(use.region)
        if memory is None:
            raise StaleReference("the leased memory is not registered any more")
        source = messages.rows_of(word.source_rows)
        local = _leased_rows(word, use)
        descriptors.check(local, memory.size_bytes)
        if (
            len(local) != len(source)
            or (descriptors.totals(local) != descriptors.totals(source)).any()
        ):
            raise UsageError("the blocks of both sides are of other sizes")
        if _core.find_overlap(local) >= 0:
            raise UsageError("two blocks that are to be written overlap")
        keys = messages.column(word.keys, "u1", len(local) * 16, "keys")
        return PullPlan(
            memory, local, source, None,
            None if keys is None else keys.astype(np.uint8).reshape(-1, 16),
            lease_of(word.source_lease), self._host.sight(peer), may_write=use.is_live,
        )  # fmt: skip

    def _over(self, key: tuple[str, int]) -> None:
        served = self._served.pop(key, None)
        if served is None:
            return
        served.use.end()
        job = served.job
        self._answer(
            key[0],
            Done(
                key[1], Code.OK, text_of(job.reason()), job.codes().astype("<i4").tobytes(),
                job.checksums().astype("<u8").tobytes(),
            ),
        )  # fmt: skip

    def _answer(self, peer: str, word: messages.Message) -> None:
        # Who left before its answer asks again when it is back, with Cancel or Open.
        self._endpoint.try_send(peer, word)


def _leased_rows(word: Write, use: LeaseUse) -> npt.NDArray[np.int64]:
    """Return the rows that are to be written, which the lease covers; UsageError if it does not."""
    named = messages.rows_of(word.rows)
    blocks = use.blocks
    indices = messages.column(word.indices, "<u4", len(named), "indices")
    if indices is not None:
        if int(indices.max()) >= len(blocks):
            raise UsageError(f"the lease has {len(blocks)} blocks only")
        return np.ascontiguousarray(blocks[indices.astype(np.int64)])
    if len(blocks) != 1 or int(blocks[0, descriptors.COUNT]) != 1:
        raise UsageError("the lease is none on a range: its blocks are named by number")
    begin, size = int(blocks[0, descriptors.OFFSET]), int(blocks[0, descriptors.BYTES])
    moved = named.copy()
    moved[:, descriptors.OFFSET] -= begin
    descriptors.check(moved, size)
    return named


def _is_over(mark: _core.StreamMark) -> bool:
    try:
        return mark.is_reached()
    except KvxError:
        return False
