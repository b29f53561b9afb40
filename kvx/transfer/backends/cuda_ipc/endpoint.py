"""This agent's end of cuda-ipc: its memory, the peers it knows, and the words they exchange."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import KvxError, PeerLost, UsageError
from kvx.transfer.backends.cuda_ipc.allowing import Allowing
from kvx.transfer.backends.cuda_ipc.channel import CudaIpcChannel
from kvx.transfer.backends.cuda_ipc.course import Course
from kvx.transfer.backends.cuda_ipc.door import Doors
from kvx.transfer.backends.cuda_ipc.exports import Exports
from kvx.transfer.backends.cuda_ipc.imports import Imports, Place
from kvx.transfer.backends.cuda_ipc.sources import Sources, Want
from kvx.transfer.backends.device import messages
from kvx.transfer.backends.device.active import Active, ActiveJobs
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
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.backend import BackendHost, Memory, PeerCard, PeerSight
    from kvx.transfer.backends.cuda_ipc.exports import Export
    from kvx.transfer.backends.device.plan import PullPlan
    from kvx.transfer.core import LeaseRef
    from kvx.transfer.memory import MemoryRegion
    from kvx_ext import _core

_log = logging.getLogger(__name__)
# Between two requests to let go of a region: a peer may have been disconnected at the last one.
_FORGET_EVERY_S = 0.2
# Between two looks at whether peers have closed their doors, when there is nobody to say so.
_DOOR_PAUSE_S = 0.01
# What was still in use when its agent was closed: it must outlive what the devices do.
_ABANDONED: list[object] = []


class CudaIpcEndpoint:
    """See `kvx.transfer.backend.Endpoint` and `DeviceEndpoint`. Thread-safe.

    Attributes:
        host: The agent.
        desks: Devices that were opened.
        exports: Memory of ours that peers may map.
        clerk: Does what takes a while, and takes messages in order.
        jobs: What is under way.
        writes: Of that, what receivers do.
    """

    def __init__(self, host: BackendHost) -> None:
        """Open it; no device is touched yet."""
        name = f"kvx-cuda-{host.agent}"
        self.host = host
        self.desks = Desks(name)
        self.exports = Exports()
        self.clerk = Clerk(name)
        self._alarm = Alarm(f"{name}-alarm")
        self.jobs = ActiveJobs(self._alarm)
        self._doors = Doors()
        self._imports = Imports()
        self._sources = Sources(self.desks, self._imports, self._doors, self.send)
        self._marks = Marks()
        self._allowing = Allowing(self, self._marks)
        self._receiving = Receiving(self, self._marks)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._memories: dict[int, Memory] = {}
        self.writes = Writes(
            host, self.jobs, self._alarm, numbers=self._numbers, send=self.send,
            try_send=self.try_send,
        )  # fmt: skip
        self._reach: dict[tuple[int, str], str] = {}
        host.on_message(self._received)
        host.on_lost(self._lost)

    def register(self, memory: Memory) -> None:
        """Get ready to move this memory; raises UnavailableError when it cannot be shared."""
        if memory.kind is MemoryKind.DEVICE:
            self.exports.add(memory, self.desks.at(memory.device_ordinal))
        with self._lock:
            self._memories[memory.region] = memory
        if memory.kind is MemoryKind.DEVICE:
            self.host.card_changed()

    def unregister(self, memory: Memory, timeout_s: float) -> bool:
        """Forget it; False while a device, or a peer that may have it mapped, is not through."""
        end = time.monotonic() + timeout_s
        if not self.jobs.wait_quiet(memory.region, timeout_s):
            return False
        if self.exports.get(memory.region) is not None:
            self.exports.begin_leaving(memory.region)
            if not self._wait_forgotten(memory.region, end):
                return False
            self.exports.remove(memory.region)
            self.host.card_changed()
        for desk in self.desks.open():
            unpin = functools.partial(desk.unpin, memory.region)
            if not desk.run(unpin, max(0.1, end - time.monotonic())):
                return False
        with self._lock:
            self._memories.pop(memory.region, None)
        return True

    def card(self) -> bytes:
        """Return which devices our memory lies on."""
        return messages.encode(self.exports.card())

    def assess(self, peer: PeerCard) -> str:
        """Return why a peer cannot be reached; empty when it can."""
        if not peer.is_same_host:
            return f"{peer.name} runs on another host: lease device memory with staged=True there"
        if peer.is_same_process:
            return f"{peer.name} is in this process, where the driver opens no handle of its own"
        if not peer.is_unix:
            return (
                f"{peer.name} is connected over TCP; leases are seen over a unix socket, which "
                "needs the same user, the same file system and unix = true on both sides"
            )
        if peer.card is None:
            return f"{peer.name} has no cuda-ipc: see agent.explain there"
        try:
            version = messages.decode_card(peer.card).version
        except UsageError as error:
            return str(error)
        if version != messages.VERSION:
            return f"{peer.name} speaks version {version} of this, not {messages.VERSION}"
        return ""

    def connect(self, peer: PeerCard, timeout_s: float) -> CudaIpcChannel:  # noqa: ARG002 - no waiting
        """Return the way to a peer."""
        assert peer.card is not None, "it was assessed"
        return CudaIpcChannel(self, peer, messages.decode_card(peer.card))

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
        self._imports.leave_all(self._doors.close_all)
        for export in self.exports.all():
            self._leave_behind(export, end)
        self.clerk.close(max(0.1, end - time.monotonic()))
        self._alarm.close()
        if not self.desks.close(max(0.1, end - time.monotonic())):
            _ABANDONED.append((self, active))

    def quarantine(self) -> list[tuple[int, str, bool, int, float]]:
        """Return what has ended and not quiesced; see `Quarantining`."""
        return self.jobs.quarantine()

    def mark(self, memory: Memory, stream: int) -> _core.StreamMark:
        """Return a point behind what is in a stream now."""
        return self.desks.at(memory.device_ordinal).device.mark(stream)

    def hold_back(self, lease: LeaseRef, mark: _core.StreamMark) -> None:
        """Let nobody copy under a lease of ours before a mark was reached."""
        self._marks.hold_back(lease.id, mark)

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

    def reach(self, ordinal: int, uuid: str) -> str:
        """Return why copies of a device of ours do not reach another device; empty if they do."""
        key = (ordinal, uuid)
        if key not in self._reach:
            try:
                desk = self.desks.at(ordinal)
                objection = ""
                if desk.uuid != uuid:
                    objection = desk.device.can_reach(self.desks.ordinal_of(uuid))
            except KvxError as error:
                objection = str(error)
            self._reach[key] = objection and f"{objection}; go through host memory"
        return self._reach[key]

    def new_job(self, block_bytes: npt.NDArray[np.int64], deadline_s: float) -> DeviceJob:
        """Return a job with a number of its own."""
        return DeviceJob(next(self._numbers), block_bytes, deadline_s, ended=self.host.ended)

    def pull(
        self, active: Active, plan: PullPlan, *, region: int, must_ask: bool,
        was_allowed: Callable[[], None] = lambda: None, note: bytes = b"",
    ) -> None:  # fmt: skip
        """Copy out of a region of a peer; the job is told of all that happens."""
        is_to_device = plan.target.kind is MemoryKind.DEVICE
        ordinal = plan.target.device_ordinal if is_to_device else -1
        place = Place(active.peer, active.life, region, ordinal)
        course = Course(
            active.job, plan, Want(place, plan.lease, must_ask), imports=self._imports,
            sources=self._sources, was_allowed=was_allowed,
        )  # fmt: skip
        if note:
            self._say_when_done(active, note)
        # Only now: from here on its deadline may end it.
        self.jobs.enter(active)
        course.begin()

    def sight_of(self, peer: str) -> PeerSight:
        """Return what can be seen of a peer."""
        return self.host.sight(peer)

    def pull_for(self, active: Active, plan: PullPlan, region: int, first: int) -> None:  # noqa: ARG002 - rows tell
        """Do a write of a peer."""
        self.pull(active, plan, region=region, must_ask=False)

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
        self._sources.lose(peer, life)
        for one in self.jobs.all():
            if one.is_with(peer, life) and one.write is not None:
                one.write.lose(is_dead=is_dead)
            elif one.is_with(peer, life):
                one.job.end(Code.PEER_LOST)
        close = functools.partial(self._doors.close, peer, life)
        # By the clerk, behind what it may just be mapping.
        self.clerk.do(functools.partial(self._imports.leave, peer, life, close))

    def _leave_behind(self, export: Export, end: float) -> None:
        """Wait for peers, who see that we are gone, to let go of a region; keep it otherwise."""
        region = export.memory.region
        self.exports.begin_leaving(region)
        while self.exports.importers(region):
            if time.monotonic() >= end:
                _log.warning("region %d is still mapped by peers: its memory is kept", region)
                _ABANDONED.append(export)
                return
            time.sleep(_DOOR_PAUSE_S)
        self.exports.remove(region)

    def _say_when_done(self, active: Active, note: bytes) -> None:
        ended = active.job.when_ended

        def say() -> None:
            if active.job.state() == "done":
                self.try_send(active.peer, messages.Note(note))
            ended()

        active.job.when_ended = say

    def _wait_forgotten(self, region: int, end: float) -> bool:
        while True:
            peers = self.exports.importers(region)
            if not peers:
                return True
            for peer in peers:
                self.clerk.do(functools.partial(self.try_send, peer, messages.Forget(region)))
            left_s = end - time.monotonic()
            if left_s <= 0:
                return False
            self.exports.wait(min(left_s, _FORGET_EVERY_S))

    def _say_forgotten(self, peer: str, region: int) -> None:
        for door in self._doors.names(peer):
            self.try_send(peer, messages.Forgotten(region, door))

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
            case messages.Open():
                self._allowing.open(peer, word)
            case messages.Opened():
                self._sources.answered(peer, word)
            case messages.Write():
                self._receiving.write(peer, word)
            case messages.Done():
                self.writes.answered(peer, word)
            case messages.Cancel():
                self._receiving.cancel(peer, word.number)
            case messages.Note():
                self.host.deliver(peer, word.payload)
            case messages.Forget():
                say = functools.partial(self._say_forgotten, peer, word.region)
                self._imports.forget(peer, word.region, say)
            case messages.Forgotten():
                self.exports.forgotten(word.region, word.door)
