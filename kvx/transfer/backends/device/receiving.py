"""Writes of peers: done here, so that nobody but the owner ever writes its memory.

A write comes to a pull out of memory of the peer, under a lease of the peer's on it, into memory
that a lease of ours lets it write. Both are held until nothing moves any more.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvx.buffers import MemoryKind
from kvx.errors import KvxError, StaleReference, UsageError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.lease_token import Rights
from kvx.transfer.backends.device import messages
from kvx.transfer.backends.device.active import Active
from kvx.transfer.backends.device.job import DeviceJob, code_of
from kvx.transfer.backends.device.messages import Done, Write
from kvx.transfer.backends.device.plan import PullPlan
from kvx.transfer.backends.fields import lease_of, text_of
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.backend import BackendHost, LeaseUse, Memory, PeerSight
    from kvx.transfer.backends.device.clerk import Clerk
    from kvx.transfer.backends.device.marks import Marks

# Each may hold a lease and a list of blocks.
_SERVED_MAX = 4096


class Receiver(Protocol):
    """The endpoint that pulls."""

    host: BackendHost
    clerk: Clerk

    def memory(self, region: int) -> Memory | None:
        """Return registered memory by its region."""

    def sight_of(self, peer: str) -> PeerSight | None:
        """Return what can be seen of a peer; None where that is not needed."""

    def pull_for(self, active: Active, plan: PullPlan, region: int, first: int) -> None:
        """Copy blocks of a lease of a peer, from `first` on; the job is told of all."""

    def try_send(self, peer: str, word: messages.Message) -> None:
        """Send to a peer that may have left."""


@dataclass(frozen=True, slots=True, eq=False)
class _Served:
    """A write of a peer that is under way here."""

    job: DeviceJob
    use: LeaseUse


class Receiving:
    """Does what peers want written; on the endpoint's clerk."""

    def __init__(self, receiver: Receiver, marks: Marks) -> None:
        """Serve nobody yet."""
        self._receiver = receiver
        self._host = receiver.host
        self._marks = marks
        self._served: dict[tuple[str, int], _Served] = {}

    def write(self, peer: str, word: Write) -> None:
        """Copy out of a peer's memory into ours, under a lease of ours."""
        key = (peer, word.number)
        try:
            if key in self._served or len(self._served) >= _SERVED_MAX:
                raise UsageError("the number is taken, or too many writes have not ended")
            use = self._host.use_lease(peer, lease_of(word.lease), int(Rights.WRITE))
        except KvxError as error:
            self._refuse(peer, word, error)
            return
        try:
            plan = self._planned(peer, word, use)
        except KvxError as error:
            use.end()
            self._refuse(peer, word, error)
            return
        job = DeviceJob(word.number, descriptors.totals(plan.local), word.deadline_ms / 1e3)
        self._served[key] = _Served(job, use)
        job.when_quiet = lambda: self._receiver.clerk.do(functools.partial(self._over, key))
        active = Active(job, plan.target, peer, word.life, is_ours=False)
        try:
            self._receiver.pull_for(active, plan, word.source_region, word.source_first)
        except KvxError as error:
            job.end(code_of(error), text_of(error))
            job.settle()

    def cancel(self, peer: str, number: int) -> None:
        """End a write of a peer; it is told when nothing moves any more."""
        served = self._served.get((peer, number))
        if served is not None:
            served.job.end(Code.CANCELLED)
        else:
            word = Done(number, Code.CANCELLED, "it is over", b"", b"")
            self._receiver.try_send(peer, word)

    def _planned(self, peer: str, word: Write, use: LeaseUse) -> PullPlan:
        """Return what a write comes to; UsageError for what no honest peer asks for."""
        memory = self._receiver.memory(use.region)
        if memory is None:
            raise StaleReference("the leased memory is not registered any more")
        source = messages.rows_of(word.source_rows)
        local = _leased_rows(word, use)
        descriptors.check(local, memory.size_bytes)
        has_other_sizes = len(local) != len(source) or (
            descriptors.totals(local) != descriptors.totals(source)
        ).any()  # fmt: skip
        if has_other_sizes:
            raise UsageError("the blocks of both sides are of other sizes")
        if _core.find_overlap(local) >= 0:
            raise UsageError("two blocks that are to be written overlap")
        keys = messages.column(word.keys, "u1", len(local) * 16, "keys")
        is_device = memory.kind is MemoryKind.DEVICE
        return PullPlan(
            memory, local, source, None,
            None if keys is None else keys.astype(np.uint8).reshape(-1, 16),
            lease_of(word.source_lease), self._receiver.sight_of(peer),
            self._marks.of(word.lease[0]) if is_device else None, may_write=use.is_live,
        )  # fmt: skip

    def _over(self, key: tuple[str, int]) -> None:
        served = self._served.pop(key, None)
        if served is None:
            return
        served.use.end()
        job = served.job
        codes = job.codes().astype("<i4").tobytes()
        sums = job.checksums().astype("<u8").tobytes()
        # Who left before its answer asks again when it is back, with Cancel.
        self._receiver.try_send(key[0], Done(key[1], Code.OK, text_of(job.reason()), codes, sums))

    def _refuse(self, peer: str, word: Write, error: KvxError) -> None:
        told = Done(word.number, code_of(error), text_of(error), b"", b"")
        self._receiver.try_send(peer, told)


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
