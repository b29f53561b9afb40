"""An agent's end of a backend of device memory, but for the way the bytes go."""

from __future__ import annotations

import abc
import functools
import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING

from kvx.errors import PeerLost, UsageError
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

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.backend import BackendHost, Memory, PeerCard, PeerSight
    from kvx.transfer.backends.device.active import Active
    from kvx.transfer.backends.device.plan import PullPlan
    from kvx.transfer.core import LeaseRef
    from kvx.transfer.memory import MemoryRegion
    from kvx_ext import _core

_log = logging.getLogger(__name__)
# What a device was still at when its agent was closed: it must outlive that.
_ABANDONED: list[object] = []


class DeviceEnd(abc.ABC):
    """See `kvx.transfer.backend.Endpoint` and `DeviceEndpoint`. Thread-safe.

    Attributes:
        host: The agent.
        desks: Devices that were opened.
        clerk: Does what takes a while, and takes messages in order.
        marks: What leases of ours wait for.
        jobs: What is under way.
        writes: Of that, what receivers do.
    """

    def __init__(self, host: BackendHost, name: str) -> None:
        """Open it, its threads under a name; no device is touched yet."""
        self.host = host
        self.desks = Desks(name)
        self.clerk = Clerk(name)
        self._alarm = Alarm(f"{name}-alarm")
        self.jobs = ActiveJobs(self._alarm)
        self.marks = Marks()
        self._receiving = Receiving(self, self.marks)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._memories: dict[int, Memory] = {}
        self.writes = Writes(
            host, self.jobs, self._alarm, numbers=self._numbers, send=self.send,
            try_send=self.try_send,
        )  # fmt: skip

    def register(self, memory: Memory) -> None:
        """Get ready to move this memory; raises KvxError when it cannot be moved."""
        with self._lock:
            self._memories[memory.region] = memory

    def unregister(self, memory: Memory, timeout_s: float) -> bool:
        """Forget it; False while somebody is at it."""
        end = time.monotonic() + timeout_s
        if not self.jobs.wait_quiet(memory.region, timeout_s) or not self._let_go(memory, end):
            return False
        with self._lock:
            self._memories.pop(memory.region, None)
        return True

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

    def close(self, timeout_s: float) -> None:
        """End everything; what a device is not through with is kept alive."""
        end = time.monotonic() + timeout_s
        active = self.jobs.close()
        for one in active:
            one.job.end(Code.CANCELLED)
            if one.write is not None:
                one.write.lose(is_dead=True)  # without a connection nobody will say more
        for one in active:
            one.job.wait_quiesced(max(0.0, end - time.monotonic()))
        self.clerk.close(max(0.1, end - time.monotonic()))
        self._leave(end)
        self._alarm.close()
        is_free = self.desks.close(max(0.1, end - time.monotonic()))
        if not is_free or not all(one.job.is_quiesced() for one in active):
            _ABANDONED.append((self, active))

    def quarantine(self) -> list[tuple[int, str, bool, int, float]]:
        """Return what has ended and not quiesced; see `Quarantining`."""
        return self.jobs.quarantine()

    def mark(self, memory: Memory, stream: int) -> _core.StreamMark:
        """Return a point behind what is in a stream now."""
        return self.desks.at(memory.device_ordinal).device.mark(stream)

    def hold_back(self, lease: LeaseRef, mark: _core.StreamMark) -> None:
        """Let nobody copy under a lease of ours before a mark was reached."""
        self.marks.hold_back(lease.id, mark)

    def stage(
        self, memory: Memory, rows: npt.NDArray[np.int64], mark: _core.StreamMark | None,
        timeout_s: float,
    ) -> MemoryRegion:  # fmt: skip
        """Return a shared host region with the bytes of the blocks, one behind the other."""
        return stage(self.desks.at(memory.device_ordinal), memory, rows, mark, timeout_s)

    # What follows is for the parts of the endpoint.

    def memory(self, region: int) -> Memory | None:
        """Return registered memory by its region."""
        with self._lock:
            return self._memories.get(region)

    def new_job(self, block_bytes: npt.NDArray[np.int64], deadline_s: float) -> DeviceJob:
        """Return a job with a number of its own."""
        return DeviceJob(next(self._numbers), block_bytes, deadline_s, ended=self.host.ended)

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

    def sight_of(self, peer: str) -> PeerSight | None:  # noqa: ARG002 - for who needs it
        """Return what can be seen of a peer; None where that is not needed."""
        return None

    @abc.abstractmethod
    def pull_for(self, active: Active, plan: PullPlan, region: int, first: int) -> None:
        """Copy blocks of a lease of a peer, from `first` on; the job is told of all."""

    # What follows is for the endpoint of a backend itself.

    @abc.abstractmethod
    def _leave(self, end: float) -> None:
        """Let go, by a time, of what only this backend has; messages are not taken any more."""

    def _let_go(self, memory: Memory, end: float) -> bool:  # noqa: ARG002 - for who needs it
        """Let go of memory that no job is at; False when somebody else was not through by `end`."""
        return True

    def _listen(self) -> None:
        """Hear of peers from now on. REQUIRES: the endpoint is complete."""
        self.host.on_message(self._received)
        self.host.on_lost(self._lost)

    def _take(self, peer: str, word: messages.Message) -> None:
        """Do what a message of a peer asks for; on the clerk."""
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
