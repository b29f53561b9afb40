"""This agent's end of cuda-ipc: what peers have mapped of its memory, and it of theirs."""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import KvxError
from kvx.transfer.backends.cuda_ipc.allowing import Allowing
from kvx.transfer.backends.cuda_ipc.channel import CudaIpcChannel
from kvx.transfer.backends.cuda_ipc.course import Course
from kvx.transfer.backends.cuda_ipc.door import Doors
from kvx.transfer.backends.cuda_ipc.exports import Exports
from kvx.transfer.backends.cuda_ipc.imports import Imports, Place
from kvx.transfer.backends.cuda_ipc.sources import Sources, Want
from kvx.transfer.backends.device import messages
from kvx.transfer.backends.device.active import Active
from kvx.transfer.backends.device.endpoint import DeviceEnd

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.backend import BackendHost, Memory, PeerCard, PeerSight
    from kvx.transfer.backends.cuda_ipc.exports import Export
    from kvx.transfer.backends.device.plan import PullPlan

_log = logging.getLogger(__name__)
# Between two requests to let go of a region: a peer may have been disconnected at the last one.
_FORGET_EVERY_S = 0.2
# Between two looks at whether peers have closed their doors. The connection on which they could say
# so is gone, and the kernel tells nobody that the other end of a datagram socket was closed.
_DOOR_PAUSE_S = 0.01
# What peers had still mapped when its agent was closed: it must outlive what their devices do.
_ABANDONED: list[Export] = []


class CudaIpcEndpoint(DeviceEnd):
    """An end whose device memory peers map, and that maps theirs.

    Attributes:
        exports: Memory of ours that peers may map.
    """

    def __init__(self, host: BackendHost) -> None:
        """Open it; no device is touched yet."""
        super().__init__(host, f"kvx-cuda-{host.agent}")
        self.exports = Exports()
        self._doors = Doors()
        self._imports = Imports()
        self._sources = Sources(self.desks, self._imports, self._doors, self.send)
        self._allowing = Allowing(self, self.marks)
        self._reach: dict[tuple[int, str], str] = {}
        self._listen()

    def register(self, memory: Memory) -> None:
        """Get ready to move this memory; raises UnavailableError when it cannot be shared."""
        is_device = memory.kind is MemoryKind.DEVICE
        if is_device:
            self.exports.add(memory, self.desks.at(memory.device_ordinal))
        super().register(memory)
        if is_device:
            self.host.card_changed()

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
        return super().assess(peer)

    def connect(self, peer: PeerCard, timeout_s: float) -> CudaIpcChannel:  # noqa: ARG002 - no waiting
        """Return the way to a peer."""
        assert peer.card is not None, "it was assessed"
        return CudaIpcChannel(self, peer, messages.decode_card(peer.card))

    # What follows is for the parts of the endpoint.

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

    def lose(self, peer: str, life: int, *, is_dead: bool) -> None:
        """End what is under way with a life of a peer that cannot be reached."""
        self._sources.lose(peer, life)
        super().lose(peer, life, is_dead=is_dead)
        close = functools.partial(self._doors.close, peer, life)
        # By the clerk, behind what it may just be mapping.
        self.clerk.do(functools.partial(self._imports.leave, peer, life, close))

    def _leave(self, end: float) -> None:
        """Let go of what peers have mapped of ours, and of what is mapped of theirs."""
        self._imports.leave_all(self._doors.close_all)
        for export in self.exports.all():
            self._leave_behind(export, end)

    def _let_go(self, memory: Memory, end: float) -> bool:
        """Have peers unmap it, and unpin it; False when somebody was not through by `end`."""
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
        return True

    def _leave_behind(self, export: Export, end: float) -> None:
        """Wait for peers, who see that we are gone, to let go of a region; keep it otherwise."""
        region = export.memory.region
        self.exports.begin_leaving(region)
        while self.exports.importers(region):
            if time.monotonic() >= end:
                _log.warning("region %d is still mapped by peers: its memory is kept", region)
                _ABANDONED.append(export)
                return
            time.sleep(_DOOR_PAUSE_S)  # a peer that ends does not say so at its door
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

    def _take(self, peer: str, word: messages.Message) -> None:
        """Do what a message of a peer asks for; on the clerk."""
        match word:
            case messages.Open():
                self._allowing.open(peer, word)
            case messages.Opened():
                self._sources.answered(peer, word)
            case messages.Forget():
                say = functools.partial(self._say_forgotten, peer, word.region)
                self._imports.forget(peer, word.region, say)
            case messages.Forgotten():
                self.exports.forgotten(word.region, word.door)
            case _:
                super()._take(peer, word)
