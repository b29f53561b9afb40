"""This agent's end of cuda-staged."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.buffers import MemoryKind
from kvx.errors import PeerLost, UsageError
from kvx.transfer.agents.native import NativeMaker
from kvx.transfer.backends.cuda_staged.buffers import Buffers
from kvx.transfer.backends.cuda_staged.carry import Carry, CarryPlan
from kvx.transfer.backends.cuda_staged.channel import CudaStagedChannel
from kvx.transfer.backends.device import messages
from kvx.transfer.backends.device.active import ActiveJobs
from kvx.transfer.backends.device.alarm import Alarm
from kvx.transfer.backends.device.clerk import Clerk
from kvx.transfer.backends.device.desk import Desks
from kvx.transfer.backends.device.job import DeviceJob
from kvx.transfer.backends.device.marks import Marks
from kvx.transfer.backends.device.receiving import Receiving
from kvx.transfer.backends.device.staging import stage
from kvx.transfer.backends.device.writes import Writes
from kvx.transfer.codes import Code
from kvx.transfer.core import Way

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.backend import BackendHost, Memory, PeerCard
    from kvx.transfer.backends.device.active import Active
    from kvx.transfer.backends.device.plan import PullPlan
    from kvx.transfer.core import LeaseRef, LinkJob
    from kvx.transfer.memory import MemoryRegion
    from kvx_ext import _core

_log = logging.getLogger(__name__)
# One transfer each; a peer that is frozen, or a device that hangs, keeps one busy.
_THREADS_MAX = 32
# What a device was still at when its agent was closed: it must outlive that.
_ABANDONED: list[object] = []


class CudaStagedEndpoint:
    """See `kvx.transfer.backend.Endpoint` and `DeviceEndpoint`. Thread-safe.

    Attributes:
        host: The agent.
        clerk: Takes messages in order.
        jobs: What is under way.
        writes: Of that, what receivers do.
    """

    def __init__(self, host: BackendHost) -> None:
        """Open it; no device is touched yet."""
        name = f"kvx-staged-{host.agent}"
        self.host = host
        self.clerk = Clerk(name)
        self._alarm = Alarm(f"{name}-alarm")
        self.jobs = ActiveJobs(self._alarm)
        self._desks = Desks(name)
        self._buffers = Buffers(host.core)
        self._carriers = Clerk(f"{name}-carrier", threads_max=_THREADS_MAX)
        self._marks = Marks()
        self._receiving = Receiving(self, self._marks)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._memories: dict[int, Memory] = {}
        self.writes = Writes(
            host, self.jobs, self._alarm, numbers=self._numbers, send=self.send,
            try_send=self.try_send,
        )  # fmt: skip
        host.on_message(self._received)
        host.on_lost(self._lost)

    def register(self, memory: Memory) -> None:
        """Get ready to move this memory; raises KvxError when it is none of a device here."""
        if memory.kind is MemoryKind.DEVICE:
            self._desks.at(memory.device_ordinal).device.check_address(memory.address)
        with self._lock:
            self._memories[memory.region] = memory

    def unregister(self, memory: Memory, timeout_s: float) -> bool:
        """Forget it; False while a transfer is at it."""
        if not self.jobs.wait_quiet(memory.region, timeout_s):
            return False
        with self._lock:
            self._memories.pop(memory.region, None)
        return True

    def card(self) -> bytes:
        """Return that we are here."""
        return messages.encode(messages.Card(messages.VERSION, [], []))

    def assess(self, peer: PeerCard) -> str:
        """Return why a peer cannot be reached: one that has this must speak of it as we do."""
        if peer.card is None:
            return ""
        try:
            version = messages.decode_card(peer.card).version
        except UsageError as error:
            return str(error)
        if version != messages.VERSION:
            return f"{peer.name} speaks version {version} of this, not {messages.VERSION}"
        return ""

    def connect(self, peer: PeerCard, timeout_s: float) -> CudaStagedChannel:  # noqa: ARG002 - no waiting
        """Return the way to a peer."""
        return CudaStagedChannel(self, peer)

    def close(self, timeout_s: float) -> None:
        """End everything; what a device is not through with is kept alive."""
        end = time.monotonic() + timeout_s
        active = self.jobs.close()
        for one in active:
            one.job.end(Code.CANCELLED)
            if one.write is not None:
                one.write.lose(is_dead=True)  # without a connection nobody will say more
        is_quiet = True
        for one in active:
            is_quiet &= one.job.wait_quiesced(max(0.0, end - time.monotonic()))
        self.clerk.close(max(0.1, end - time.monotonic()))
        self._carriers.close(max(0.1, end - time.monotonic()))
        self._alarm.close()
        self._buffers.close()
        if not self._desks.close(max(0.1, end - time.monotonic())) or not is_quiet:
            _ABANDONED.append((self, active))

    def quarantine(self) -> list[tuple[int, str, bool, int, float]]:
        """Return what has ended and not quiesced; see `Quarantining`."""
        return self.jobs.quarantine()

    def mark(self, memory: Memory, stream: int) -> _core.StreamMark:
        """Return a point behind what is in a stream now."""
        return self._desks.at(memory.device_ordinal).device.mark(stream)

    def hold_back(self, lease: LeaseRef, mark: _core.StreamMark) -> None:
        """Let nobody write under a lease of ours before a mark was reached."""
        self._marks.hold_back(lease.id, mark)

    def stage(
        self, memory: Memory, rows: npt.NDArray[np.int64], mark: _core.StreamMark | None,
        timeout_s: float,
    ) -> MemoryRegion:  # fmt: skip
        """Return a shared host region with the bytes of the blocks, one behind the other."""
        return stage(self._desks.at(memory.device_ordinal), memory, rows, mark, timeout_s)

    # What follows is for the parts of the endpoint.

    def memory(self, region: int) -> Memory | None:
        """Return registered memory by its region."""
        with self._lock:
            return self._memories.get(region)

    def new_job(self, block_bytes: npt.NDArray[np.int64], deadline_s: float) -> DeviceJob:
        """Return a job with a number of its own."""
        return DeviceJob(next(self._numbers), block_bytes, deadline_s, ended=self.host.ended)

    def carry(self, active: Active, plan: CarryPlan, *, note: bytes = b"") -> None:
        """Carry blocks between a device and a peer; the job is told of all that happens."""
        desk = self._desks.at(plan.memory.device_ordinal)
        carry = Carry(active.job, plan, desk, self._buffers)
        self.jobs.enter(active)
        self._carriers.do(functools.partial(self._run, carry, active, note))

    def sight_of(self, peer: str) -> None:
        """Return nothing."""

    def pull_for(self, active: Active, plan: PullPlan, region: int, first: int) -> None:
        """Do a write of a peer: read its memory, verified as always, and send it to the device."""
        if plan.target.kind is not MemoryKind.DEVICE:
            raise UsageError("what is staged goes into device memory")
        core, number = self.host.core, self.host.number_of(active.peer)
        way = Way.STREAM if core.can_pull(number, region) else Way.PULL

        def submit(
            own: int, places: npt.NDArray[np.int64], start: int, stop: int, left_s: float
        ) -> LinkJob:
            native = NativeMaker().plan(
                core, region=own, local=places, remote_region=region,
                remote=plan.remote[start:stop],
                indices=np.arange(first + start, first + stop, dtype=np.uint32),
                checksums=None, keys=None if plan.keys is None else plan.keys[start:stop],
            )  # fmt: skip
            return core.submit(
                is_write=False, way=int(way), peer=number, lease=plan.lease, plan=native,
                deadline_s=left_s, note=b"",
            )  # fmt: skip

        self.carry(
            active,
            CarryPlan(plan.target, plan.local, False, submit, plan.after, plan.may_write),  # noqa: FBT003 - a record
        )

    def send(self, peer: str, word: messages.Message) -> None:
        """Send to the endpoint of a peer; PeerLost when there is no connection."""
        self.host.send(peer, messages.encode(word))

    def try_send(self, peer: str, word: messages.Message) -> None:
        """Send to a peer that may have left."""
        try:
            self.send(peer, word)
        except PeerLost:
            _log.debug("%s is not there to be told", peer)

    def lose(self, peer: str, life: int, *, is_dead: bool) -> None:
        """End what is under way with a life of a peer that cannot be reached."""
        for one in self.jobs.all():
            if one.is_with(peer, life) and one.write is not None:
                one.write.lose(is_dead=is_dead)
            elif one.is_with(peer, life):
                one.job.end(Code.PEER_LOST)

    def _run(self, carry: Carry, active: Active, note: bytes) -> None:
        carry.run()
        if note and active.job.state() == "done":
            self.try_send(active.peer, messages.Note(note))

    def _lost(self, peer: str, life: int, has_ended: bool) -> None:  # noqa: FBT001 - a callback
        self.lose(peer, life, is_dead=has_ended)

    def _received(self, peer: str, payload: bytes) -> None:
        """Take a message, on the agent's thread: what takes longer is for the clerk."""
        try:
            word = messages.decode(payload)
        except UsageError as error:
            _log.warning("%s: %s", peer, error)
            return
        self.clerk.do(functools.partial(self._take, peer, word))

    def _take(self, peer: str, word: messages.Message) -> None:
        match word:
            case messages.Write():
                self._receiving.write(peer, word)
            case messages.Done():
                self.writes.answered(peer, word)
            case messages.Cancel():
                self._receiving.cancel(peer, word.number)
            case messages.Note():
                self.host.deliver(peer, word.payload)
            case _:
                _log.warning("%s says what is of no use here: %s", peer, type(word).__name__)
