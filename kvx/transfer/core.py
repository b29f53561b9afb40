"""What the native `LinkAgent` offers, as protocols: agents take their core by injection.

The manual of the native side is `kvx_ext/include/kvx/agent.h`; tests put an agent on a fake.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.backend import LeaseUse, PeerSight

    Int64s = npt.NDArray[np.int64]
    Uint64s = npt.NDArray[np.uint64]
    Bytes2d = npt.NDArray[np.uint8]

GREETING_BYTES_MAX = 16 << 10
MESSAGE_BYTES_MAX = 8 << 20
NOTE_BYTES_MAX = 64 << 10
DESCRIPTORS_MAX = 1 << 20
ANY_PEER = 0
# Regions of memory that the core cannot touch, such as a device's, are numbered from here on.
OPAQUE_REGIONS = 1 << 31


class Way(enum.IntEnum):
    """How the native core moves the bytes of one request."""

    STREAM = 0
    PULL = 1


class EventKind(enum.IntEnum):
    """The kinds of `LinkCore.next_events`."""

    OPENED = 1
    GREETING = 2
    MESSAGE = 3
    NOTE = 4
    CLOSED = 5
    ENDED = 6
    QUIET = 7


class LeaseRef(NamedTuple):
    """What identifies a lease to its owner and to readers of the shared page."""

    id: int
    slot: int
    generation: int


Event = tuple[int, int, int, int, bytes]  # kind, connection, peer, id, payload


class LinkJob(Protocol):
    """One read or write on its way; ends twice: terminal, then quiesced. Thread-safe."""

    @property
    def id(self) -> int:
        """Number of the job, unique among those of its backend and agent."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""

    @property
    def blocks_done(self) -> int:
        """Blocks that have arrived and were verified so far."""

    @property
    def bytes_done(self) -> int:
        """Their bytes."""

    @property
    def latency_ns(self) -> int:
        """Nanoseconds from submission to the end, or to now."""

    def state(self) -> str:
        """Return ``running``, ``done``, ``failed``, ``timed_out`` or ``cancelled``."""

    def is_terminal(self) -> bool:
        """Return whether the outcome is final."""

    def is_quiesced(self) -> bool:
        """Return whether nothing touches its memory any more."""

    def is_lost(self) -> bool:
        """Return whether it failed because the peer is gone."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until terminal; False when time was up first. Releases the GIL."""

    def wait_quiesced(self, timeout_s: float) -> bool:
        """Wait until quiesced; False when time was up first. Releases the GIL."""

    def cancel(self) -> bool:
        """Ask to end it; False when it had ended."""

    def watch(self) -> bool:
        """Ask to be told of the end; True when it has ended already, and nobody will tell."""

    def codes(self) -> npt.NDArray[np.int32]:
        """Return the outcome of every block, of `kvx.transfer.codes.Code`; -1 while open."""

    def errnos(self) -> npt.NDArray[np.int32]:
        """Return the errno behind a storage code of every block."""

    def checksums(self) -> Uint64s:
        """Return the checksum computed of every block; 0 where no bytes were seen."""


class NativePlan(Protocol):
    """Both sides of a transfer, checked once by the native core."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""


class LinkCore(Protocol):
    """The native endpoint of an agent. Thread-safe; `next_events` has one reader."""

    def listen_tcp(self, host: str, port: int, tls: object) -> int:
        """Listen; port 0 takes a free one. Returns the port."""

    def listen_unix(self, path: str) -> None:
        """Listen on a socket file, made 0600."""

    def dial_tcp(self, host: str, port: int, tls: object, timeout_s: float) -> int:
        """Begin to connect; an OPENED or CLOSED event of the returned connection follows."""

    def dial_unix(self, path: str, timeout_s: float) -> int:
        """Begin to connect; see `dial_tcp`."""

    def send_greeting(self, connection: int, payload: bytes) -> None:
        """Send what a connection that is not approved may carry."""

    def send_message(self, connection: int, payload: bytes) -> None:
        """Send a control message."""

    def send_note(self, connection: int, payload: bytes) -> None:
        """Send a notification."""

    def approve(self, connection: int, peer: int) -> None:
        """Let a connection belong to a peer and carry everything."""

    def drop(self, connection: int, reason: str) -> None:
        """End a connection."""

    def info(self, connection: int) -> dict[str, object]:
        """Return the fields of ConnectionInfo; PeerLost when it is gone."""

    def can_pull(self, peer: int, region: int, timeout_s: float = 0.0) -> str:
        """Return why memory of a peer cannot be copied on this host; empty when it can.

        What it has registered just now is waited for as long as that.
        """

    def add_region(self, address: int, bytes: int, fd: int = -1, fd_offset: int = 0) -> int:  # noqa: A002 - the native name
        """Let transfers touch memory; returns the region's number."""

    def add_opaque_region(self, bytes: int) -> int:  # noqa: A002 - the native name
        """Let memory be leased that the core cannot touch; returns the region's number."""

    def remove_region(self, id: int, timeout_s: float) -> bool:  # noqa: A002 - the native name
        """Wait until nobody uses a region and forget it; False when it is still in use."""

    def grant(
        self,
        region: int,
        blocks: Int64s,
        *,
        rights: int,
        peer: int,
        ttl_s: float,
        checksums: Uint64s | None,
        keys: Bytes2d | None,
    ) -> tuple[int, int, int]:
        """Lease blocks of a region; returns (id, slot, generation)."""

    def revoke(self, lease_id: int, timeout_s: float) -> bool:
        """End a lease and wait for its users; False when it is still in use."""

    def renew(self, lease_id: int, ttl_s: float) -> None:
        """Extend a lease; StaleReference when it has ended."""

    def use_lease(self, lease: tuple[int, int, int], peer: int, rights: int) -> LeaseUse:
        """Begin work of a peer under a lease of ours."""

    def sight(self, peer: int) -> PeerSight:
        """Return what can be seen of a peer on this host."""

    def submit(
        self,
        *,
        is_write: bool,
        way: int,
        peer: int,
        lease: tuple[int, int, int],
        plan: NativePlan,
        deadline_s: float,
        note: bytes,
    ) -> LinkJob:
        """Begin a transfer."""

    def next_events(self, max: int, timeout_s: float) -> Sequence[Event]:  # noqa: A002 - the native name
        """Wait for events and return them."""

    def wake(self) -> None:
        """Make one `next_events` return."""

    def stats(self) -> dict[str, int]:
        """Return the counters of AgentStats."""

    def quarantine(self) -> Sequence[tuple[int, int, bool, int, float]]:
        """Return (id, peer, is_write, bytes, since_s) of what has ended and not quiesced."""

    def close(self, timeout_s: float) -> tuple[int, int, int]:
        """End everything; returns (cancelled jobs, abandoned jobs, abandoned bytes)."""

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""


class CoreMaker(Protocol):
    """Makes cores and plans: the native module, or a fake."""

    def agent(
        self,
        *,
        io_threads: int,
        copy_threads: int,
        greeting_s: float,
        ping_s: float,
        piece_bytes: int,
        cancel_grace_s: float,
    ) -> LinkCore:
        """Return a new core."""

    def pair(self, one: LinkCore, other: LinkCore) -> tuple[int, int]:
        """Join two cores of this process; returns each one's connection."""

    def plan(
        self,
        core: LinkCore,
        *,
        region: int,
        local: Int64s,
        remote_region: int,
        remote: Int64s,
        indices: npt.NDArray[np.uint32] | None,
        checksums: Uint64s | None,
        keys: Bytes2d | None,
    ) -> NativePlan:
        """Check both sides of a transfer against each other."""

    def tls(self, certificate: str, private_key: str, authority: str) -> object:
        """Return a context for TLS connections."""
