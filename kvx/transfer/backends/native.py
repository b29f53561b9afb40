"""What the native backends have in common: the core moves the bytes, they say when it can."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import UsageError
from kvx.transfer.backend import HOST_ONLY, BackendHost, LinkPlan, LinkRequest, Memory, PeerCard
from kvx.transfer.core import OPAQUE_REGIONS, Way

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.core import LinkJob


class NativeBackend:
    """A way of the native core."""

    kinds = HOST_ONLY

    def __init__(
        self, name: str, rank: int, way: Way, assess: Callable[[PeerCard], str]
    ) -> None:  # fmt: skip
        """Name a way.

        Args:
            name: What it is called.
            rank: Lower is preferred.
            way: What the core is asked for.
            assess: Why a peer cannot be reached so; empty when it can.
        """
        self.name = name
        self.rank = rank
        self._way = way
        self._assess = assess

    def availability(self) -> str:
        """Return nothing: the core is always here."""
        return ""

    def open(self, host: BackendHost) -> NativeEndpoint:
        """Return an agent's end of it."""
        return NativeEndpoint(host, self._way, self._assess)


class NativeEndpoint:
    """An agent's end: the core has the memory already."""

    def __init__(self, host: BackendHost, way: Way, assess: Callable[[PeerCard], str]) -> None:
        """Use the agent's core."""
        self._host = host
        self._way = way
        self._assess = assess

    def register(self, memory: Memory) -> None:
        """Do nothing: regions are the core's own."""

    def unregister(self, memory: Memory, timeout_s: float) -> bool:  # noqa: ARG002 - nothing to wait for
        """Return True: the core waits for its users itself."""
        return True

    def card(self) -> bytes:
        """Return nothing: the agent's card says where it listens."""
        return b""

    def assess(self, peer: PeerCard) -> str:
        """Return why a peer cannot be reached this way."""
        return self._assess(peer)

    def connect(self, peer: PeerCard, timeout_s: float) -> NativeChannel:  # noqa: ARG002 - no waiting
        """Return the way to a peer: its connections stand already."""
        return NativeChannel(self._host, self._way, peer.number)

    def close(self, timeout_s: float) -> None:
        """Do nothing: the agent closes its core."""


class NativeChannel:
    """The way to one peer."""

    def __init__(self, host: BackendHost, way: Way, number: int) -> None:
        """Lead to the peer that the core calls `number`."""
        self._host = host
        self._core = host.core
        self._way = way
        self._number = number

    def submit(self, request: LinkRequest) -> LinkJob:
        """Begin a transfer."""
        plan = request.plan.native
        if plan is None:
            raise UsageError("the native ways move host memory only")
        return self._core.submit(
            is_write=request.is_write,
            way=int(self._way),
            peer=self._number,
            lease=request.lease,
            plan=plan,
            deadline_s=request.deadline_s,
            note=request.note,
        )

    def objection(self, plan: LinkPlan, *, is_write: bool, patience_s: float) -> str:
        """Return why this plan has to go another way; see `Selective`."""
        if plan.memory.kind is not MemoryKind.HOST:
            return "it moves host memory only"
        if plan.remote_region >= OPAQUE_REGIONS:
            return "the peer's memory is a device's: have it leased with staged=True to read it so"
        if self._way is Way.STREAM:
            return ""
        if is_write:
            # The receiver pulls a write, so it is the peer that must be able to.
            return self._host.peer_objection(self._number, plan.memory.region, patience_s)
        return self._core.can_pull(self._number, plan.remote_region, patience_s)

    def is_up(self) -> bool:
        """Return whether it can be used now; the core says so when it is not."""
        return not self._core.is_closed

    def close(self, timeout_s: float) -> None:
        """Do nothing: connections are the agent's."""
