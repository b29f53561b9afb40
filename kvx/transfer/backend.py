"""What a backend is: one way to move bytes between the registered memory of two agents.

    Backend    is it here at all?                        one object a process
    Endpoint   this agent's end of it: its memory        one an agent
    Channel    the way to one peer                       one a peer

A package adds one through the entry point group `kvx.backends` (name -> class). What every backend
must hold to is run by `kvx.transfer.conformance`: nothing written late, deadlines kept, leases
honoured, no block counted that was not verified.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvx.buffers import MemoryKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.agents.identity import HostIdentity
    from kvx.transfer.core import LeaseRef, LinkCore, LinkJob, NativePlan
    from kvx.transfer.memory import MemoryRegion
    from kvx_ext import _core

ENTRY_POINTS = "kvx.backends"
CARD_BYTES_MAX = 16 << 10
HOST_ONLY = frozenset({MemoryKind.HOST})


@dataclass(frozen=True, slots=True)
class Memory:
    """Registered memory of this agent.

    Attributes:
        region: Number of the registration, as leases and plans name it; never reused.
        address: Of the first byte.
        size_bytes: From there on.
        kind: Where it lies.
        device_ordinal: Number of the device; -1 for host memory.
        fd: Of the memfd that is mapped at `address`; -1 for private memory.
        fd_offset: Where in it `address` is.
        is_writable: Whether its owner lets others write; if not it can only be read from.
        owner: What keeps the memory alive.
    """

    region: int
    address: int
    size_bytes: int
    kind: MemoryKind = MemoryKind.HOST
    device_ordinal: int = -1
    fd: int = -1
    fd_offset: int = 0
    is_writable: bool = True
    owner: object = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class PeerCard:
    """A peer as a backend sees it; everything in it was signed where there is a key.

    Attributes:
        name: The peer.
        incarnation: Its life; another one after a restart.
        number: What the native core calls it.
        host: Where it runs.
        is_same_host: Whether that is this host.
        is_same_process: Whether that is this process.
        is_unix: Whether the connection to it is a unix socket or lies within this process.
        card: What its endpoint of the same backend said of itself; None when it has none.
    """

    name: str
    incarnation: int
    number: int
    host: HostIdentity
    is_same_host: bool
    is_same_process: bool
    is_unix: bool
    card: bytes | None


# A right of a lease, beside READ and WRITE: the holder may write the leased memory itself, through
# a backend that the owner cannot stop.
REMOTE_WRITE = 4


class LeaseUse(Protocol):
    """Work of a peer under a live lease of ours, from `BackendHost.use_lease` until `end`.

    While it is open the agent gives the leased memory to nobody else, whatever becomes of the
    lease: revoking waits, and what has expired stays quarantined.
    """

    @property
    def region(self) -> int:
        """Number of the leased region."""

    @property
    def blocks(self) -> npt.NDArray[np.int64]:
        """The leased blocks, (n, 4) int64 of offset, stride, count, bytes."""

    def is_live(self) -> bool:
        """Return whether the lease has neither been revoked nor expired."""

    def end(self) -> None:
        """Say that the peer is through, or gone."""


class PeerSight(Protocol):
    """What can be seen of a peer on this host, also after it is gone."""

    def look(self, slot: int, generation: int) -> int:
        """Return a `Code`: OK, STALE when that lease has ended, PEER_LOST when its process has."""


@dataclass(frozen=True, slots=True)
class BackendHost:
    """What an agent offers to the endpoints in it.

    Attributes:
        agent: Name of the agent.
        incarnation: Its life.
        core: The native core that moves and enforces leases for the backends of kvx itself.
        send: Sends a message to the endpoint of this backend at a peer, by name; at most 1 MiB.
            PeerLost when there is no connection.
        on_message: Sets who is called with (peer name, message), on the agent's thread.
        ended: To be called with the number of a job that ended after `LinkJob.watch`, from any
            thread.
        card_changed: To be called when `Endpoint.card` returns something new.
        use_lease: Opens work of a peer, by name, that needs these rights under a lease of this
            agent. StaleReference when the lease is not live, UsageError when it is not this peer's
            or does not give the rights.
        deliver: Hands a note of a peer, by name, to this agent as a notification.
        on_lost: Sets who is called with (peer name, incarnation, whether that life has ended) when
            a peer cannot be reached any more, and again once it is known to be dead.
        number_of: Returns what the core calls a peer, by name; PeerLost when it was never met.
        sight: Returns what can be seen of a peer, by name, on this host; UnavailableError when it
            is not connected over a unix socket, PeerLost without any connection.
        verifies_device: Whether blocks that were copied between devices are read back and
            verified.
        peer_objection: Returns why a peer, by number, cannot copy out of a region of ours, as it
            said itself; empty when it can. Waits for its word as many seconds as are given.
    """

    agent: str
    incarnation: int
    core: LinkCore
    send: Callable[[str, bytes], None]
    on_message: Callable[[Callable[[str, bytes], None]], None]
    ended: Callable[[int], None]
    card_changed: Callable[[], None]
    use_lease: Callable[[str, LeaseRef, int], LeaseUse]
    deliver: Callable[[str, bytes], None]
    on_lost: Callable[[Callable[[str, int, bool], None]], None]
    number_of: Callable[[str], int]
    sight: Callable[[str], PeerSight]
    verifies_device: bool
    peer_objection: Callable[[int, int, float], str]


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """Both sides of a transfer.

    Attributes:
        memory: Local.
        local: (n, 4) int64 of offset, stride, count, bytes in it.
        remote_region: Region of the peer.
        remote: (n, 4) int64 in it; row by row as many bytes as `local`.
        indices: (n,) uint32, the lease's blocks; None when `remote` lies within a range lease.
        checksums: (n,) uint64 that the blocks must have; None when they are not known.
        keys: (n, 16) uint8 that the checksums are computed under; None for zeros.
        native: The same, checked by the native core; None for memory it cannot touch.
        after: A point in a stream that the local memory is used after; None for at once.
    """

    memory: Memory
    local: npt.NDArray[np.int64]
    remote_region: int
    remote: npt.NDArray[np.int64]
    indices: npt.NDArray[np.uint32] | None
    checksums: npt.NDArray[np.uint64] | None
    keys: npt.NDArray[np.uint8] | None
    native: NativePlan | None
    after: _core.StreamMark | None = None


@dataclass(frozen=True, slots=True)
class LinkRequest:
    """One read or write.

    Attributes:
        is_write: Whether the bytes go to the peer.
        plan: What goes where.
        lease: Of the peer, on its side of the plan.
        deadline_s: Seconds until the job ends whatever happens.
        note: Delivered to the peer as a notification once the bytes have arrived, and only then.
    """

    is_write: bool
    plan: LinkPlan
    lease: LeaseRef
    deadline_s: float
    note: bytes = b""


class Channel(Protocol):
    """The way to one peer. Thread-safe."""

    def submit(self, request: LinkRequest) -> LinkJob:
        """Begin a transfer; raises KvxError when it cannot be begun."""

    def is_up(self) -> bool:
        """Return whether it can be used now."""

    def close(self, timeout_s: float) -> None:
        """End what runs over it, and it."""


class Selective(Protocol):
    """A channel that does not take every request its peer could make."""

    def objection(self, plan: LinkPlan, *, is_write: bool, patience_s: float) -> str:
        """Return why this plan has to go another way; empty when it need not.

        Args:
            plan: What is to move.
            is_write: Whether to the peer.
            patience_s: How long it may wait for what the peer has to say first, for instance of
                memory that was registered just now; it does not block otherwise.
        """


@runtime_checkable
class Reasoned(Protocol):
    """A job that can say more about its end than codes can."""

    def reason(self) -> str:
        """Return why it failed and what can be done, for people; empty for nothing to add."""


@runtime_checkable
class Quarantining(Protocol):
    """An endpoint whose jobs can end although somebody may still be at their memory."""

    def quarantine(self) -> Sequence[tuple[int, str, bool, int, float]]:
        """Return (id, peer, is_write, bytes, since_s) of what has ended and not quiesced."""


@runtime_checkable
class DeviceEndpoint(Protocol):
    """An endpoint that moves device memory: what registrations of it need besides."""

    def mark(self, memory: Memory, stream: int) -> _core.StreamMark:
        """Return a point behind what is in a stream now."""

    def hold_back(self, lease: LeaseRef, mark: _core.StreamMark) -> None:
        """Let nobody copy under a lease of ours before a mark was reached."""

    def stage(
        self, memory: Memory, rows: npt.NDArray[np.int64], mark: _core.StreamMark | None,
        timeout_s: float,
    ) -> MemoryRegion:  # fmt: skip
        """Return a shared host region with the bytes of the blocks, one behind the other."""


class Endpoint(Protocol):
    """This agent's end of a backend. Thread-safe."""

    def register(self, memory: Memory) -> None:
        """Get ready to move this memory; raises UnavailableError when it cannot."""

    def unregister(self, memory: Memory, timeout_s: float) -> bool:
        """Forget it; False when it is still in use."""

    def card(self) -> bytes:
        """Return what peers must know, at most `CARD_BYTES_MAX`; travels signed."""

    def assess(self, peer: PeerCard) -> str:
        """Return why a peer cannot be reached this way; empty when it can. Never blocks."""

    def connect(self, peer: PeerCard, timeout_s: float) -> Channel:
        """Return the way to a peer; raises UnavailableError, or TransferTimeout."""

    def close(self, timeout_s: float) -> None:
        """Let everything go."""


class Backend(Protocol):
    """One way to move bytes. A class without arguments.

    Attributes:
        name: One lower-case word.
        rank: Lower is preferred; those of kvx are 10 (local), 20 (shm) and 100 (tcp).
        kinds: Memory it moves; a backend that does not say moves host memory.
    """

    name: str
    rank: int
    kinds: frozenset[MemoryKind]

    def availability(self) -> str:
        """Return why it is not here; empty when it is. May probe, once."""

    def open(self, host: BackendHost) -> Endpoint:
        """Return an agent's end of it."""


def kinds_of(backend: Backend) -> frozenset[MemoryKind]:
    """Return the kinds of memory that a backend moves."""
    return getattr(backend, "kinds", HOST_ONLY)
