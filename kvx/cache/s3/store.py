"""What the S3 tier asks of an object store, and how such calls fail."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvx.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

LIST_PAGE_MAX = 1000
DELETE_BATCH_MAX = 1000


class ObjectFault(enum.StrEnum):
    """Why a call to an object store failed.

    MISSING: no such object. NO_BUCKET: no such bucket. DENIED: refused, whatever the reason, and
    will be again. EXPIRED: the credentials were good once. SKEWED: the clocks differ by too much.
    CONFLICT: the object is there, or somebody stores it now. THROTTLED: fewer requests, please.
    SERVER: the service failed. TRUNCATED: fewer bytes came than were announced. RANGE: the object
    has no such bytes. TIMEOUT: not done in time. CONNECTION: refused, or lost. DNS, TLS: the
    endpoint's name or certificate. PROTOCOL: an answer that fits no question. CLOSED: the store was
    closed. AVOIDED: nobody was asked, the endpoint failed too often of late.
    """

    MISSING = "missing"
    NO_BUCKET = "no_bucket"
    DENIED = "denied"
    EXPIRED = "expired"
    SKEWED = "skewed"
    CONFLICT = "conflict"
    THROTTLED = "throttled"
    SERVER = "server"
    TRUNCATED = "truncated"
    RANGE = "range"
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    DNS = "dns"
    TLS = "tls"
    PROTOCOL = "protocol"
    CLOSED = "closed"
    AVOIDED = "avoided"

    @property
    def is_transient(self) -> bool:
        """Whether the same call may succeed a moment later."""
        return self in _TRANSIENT

    @property
    def is_outage(self) -> bool:
        """Whether it says something about the endpoint, rather than about one object."""
        return self not in _OF_ONE_OBJECT


_TRANSIENT = frozenset(
    {
        ObjectFault.THROTTLED, ObjectFault.SERVER, ObjectFault.TRUNCATED, ObjectFault.TIMEOUT,
        ObjectFault.CONNECTION, ObjectFault.DNS, ObjectFault.PROTOCOL,
    }
)  # fmt: skip
_OF_ONE_OBJECT = frozenset(
    {
        ObjectFault.MISSING, ObjectFault.CONFLICT, ObjectFault.RANGE, ObjectFault.CLOSED,
        ObjectFault.AVOIDED,
    }
)  # fmt: skip


class ObjectError(StorageError):
    """A call to an object store failed; the message says what, with numbers, and what to do.

    Attributes:
        fault: Why.
        errno: HTTP status; None where no answer came.
        key: Name of the object; empty for calls on none.
    """

    def __init__(
        self, message: str, *, fault: ObjectFault, errno: int | None = None, key: str = ""
    ) -> None:
        """Keep the facts beside the message."""
        super().__init__(message, errno=errno, key=key)
        self.fault = fault
        self.retryable = fault.is_transient


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What a store says of an object.

    Attributes:
        name: Its full name in the bucket.
        size_bytes: Its size.
        modified_s: Unix time of its last change, by the server's clock.
    """

    name: str
    size_bytes: int
    modified_s: float


class ObjectStore(Protocol):
    """One bucket. Coroutines of one event loop; each may be cancelled at any time.

    All raise ObjectError, and nothing else for whatever the network or the server does.
    """

    async def get(self, name: str, start: int, size_bytes: int) -> memoryview:
        """Return exactly `size_bytes` from `start` on; RANGE where the object is shorter."""

    async def head(self, name: str) -> ObjectFacts:
        """Return what is known of an object, else MISSING."""

    async def put(self, name: str, body: memoryview, *, only_if_absent: bool) -> None:
        """Store an object whole or not at all; CONFLICT where it is there and may not be."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectFacts]]:
        """Yield the objects whose names begin so, in pages, in order, from behind `after`."""

    async def delete(self, names: Sequence[str]) -> None:
        """Delete up to DELETE_BATCH_MAX objects; those that are absent are no error."""

    async def close(self) -> None:
        """Let go of connections."""
