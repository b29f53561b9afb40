"""A peer as the application sees it: one life of another agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import PeerLost, StaleReference, UsageError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.lease_token import RemoteLease
from kvx.transfer.agents.peer_state import PeerState

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.agents.parts import AgentParts
    from kvx.transfer.agents.roster import PeerRecord


@dataclass(frozen=True, slots=True, eq=False)
class RemoteBlocks:
    """Leased blocks of a peer, in order; made by `Peer.blocks` and `Peer.descriptors`.

    Attributes:
        peer: Whose they are.
        lease: What they were leased by.
        rows: (n, 4) int64 of offset, stride, count, bytes in the peer's region.
        indices: (n,) uint32, the lease's blocks; None for parts of a range.
    """

    peer: Peer
    lease: RemoteLease
    rows: npt.NDArray[np.int64] = field(repr=False)
    indices: npt.NDArray[np.uint32] | None = field(repr=False)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.rows)

    @property
    def size_bytes(self) -> int:
        """Bytes of all blocks."""
        return int(descriptors.totals(self.rows).sum())

    @property
    def checksums(self) -> npt.NDArray[np.uint64] | None:
        """Checksums that the lease promises of these blocks; None when it promises none."""
        if self.lease.checksums is None or self.indices is None:
            return None
        return self.lease.checksums[self.indices]

    @property
    def keys(self) -> npt.NDArray[np.uint8] | None:
        """Keys that their checksums are computed under; None for zeros."""
        if self.lease.keys is None or self.indices is None:
            return None
        return np.ascontiguousarray(self.lease.keys[self.indices])


class Peer:
    """One life of another agent. After a restart this is FENCED, the next life another Peer.

    Two objects that stand for the same life are equal.
    """

    def __init__(self, parts: AgentParts, keep: object, record: PeerRecord) -> None:
        """Show a peer; use `Agent.connect` or `Agent.peers`. Keeps the agent (`keep`) alive."""
        self._parts = parts
        self._keep = keep
        self._record = record

    @property
    def name(self) -> str:
        """Its name."""
        return self._record.name

    @property
    def incarnation(self) -> int:
        """Which life of the name it is."""
        return self._record.identity.incarnation

    @property
    def number(self) -> int:
        """What the native core calls it."""
        return self._record.number

    @property
    def record(self) -> PeerRecord:
        """What is known of it; for the agent."""
        return self._record

    @property
    def state(self) -> PeerState:
        """How it is doing, as of a moment ago."""
        return self._record.state

    @property
    def reason(self) -> str:
        """Why it is down; empty while it is not."""
        return self._record.reason

    def blocks(self, ids: object = None, *, lease: bytes | RemoteLease) -> RemoteBlocks:
        """Return blocks of a lease.

        Args:
            ids: (n,) integers, numbers within the lease; None for all of its blocks.
            lease: A token of this peer, or what `lease` made of it.

        Raises:
            UsageError: The lease is malformed, of another agent, for another one, or has no such
                block.
            StaleReference: It was granted by a former life of the peer.
        """
        found = self.lease(lease)
        if ids is None:
            indices = np.arange(len(found), dtype=np.uint32)
            return RemoteBlocks(self, found, found.blocks, indices)
        numbers = descriptors.as_int64(ids, "ids")
        if not len(numbers) or not 0 <= int(numbers.min()) <= int(numbers.max()) < len(found):
            raise UsageError(
                f"ids: {len(numbers)} numbers, of which each must be one of the lease's "
                f"{len(found)} blocks"
            )
        rows = np.ascontiguousarray(found.blocks[numbers])
        return RemoteBlocks(self, found, rows, numbers.astype(np.uint32))

    def descriptors(
        self, offsets: object, sizes: object, *, lease: bytes | RemoteLease
    ) -> RemoteBlocks:
        """Return runs of bytes within a lease on a range; offsets count from the region's start.

        Raises:
            UsageError: The lease is none on a range, or the runs do not lie within it; and as
                `blocks`.
            StaleReference: As `blocks`.
        """
        return self.rows(descriptors.contiguous(offsets, sizes), lease=lease)

    def rows(self, rows: object, *, lease: bytes | RemoteLease) -> RemoteBlocks:
        """Return blocks of any shape within a lease on a range: (n, 4) integers; see `blocks`."""
        found = self.lease(lease)
        if not found.is_range:
            raise UsageError(
                f"the lease names {len(found)} blocks: take some of them by number, with blocks()"
            )
        wanted = descriptors.check(descriptors.as_rows(rows), found.region_bytes)
        if not len(wanted):
            raise UsageError("at least one block is needed")
        offset, size = int(found.blocks[0, 0]), int(found.blocks[0, 3])
        last = wanted[:, 0] + (wanted[:, 2] - 1) * wanted[:, 1] + wanted[:, 3]
        if int(wanted[:, 0].min()) < offset or int(last.max()) > offset + size:
            raise UsageError(
                f"the lease is on bytes {offset} to {offset + size} of its region; the blocks run "
                f"from {int(wanted[:, 0].min())} to {int(last.max())}"
            )
        return RemoteBlocks(self, found, wanted, None)

    def lease(self, lease: bytes | RemoteLease) -> RemoteLease:
        """Return a lease of this peer from its token; see `blocks` for what it raises."""
        found = lease if isinstance(lease, RemoteLease) else (
            RemoteLease.decode(lease, self._parts.key)
        )  # fmt: skip
        if found.agent != self.name:
            raise UsageError(f"the lease is of {found.agent}, and this is {self.name}")
        if found.peer not in ("", self._parts.identity.name):
            raise UsageError(
                f"the lease is for {found.peer} only, and this is {self._parts.identity.name}"
            )
        if found.incarnation != self.incarnation or self.state is PeerState.FENCED:
            raise StaleReference(
                f"{self.name} was restarted since the lease was granted: ask it for a new one, and "
                f"take agent.peers[{self.name!r}]"
            )
        return found

    def connections(self) -> list[dict[str, object]]:
        """Return the numbers of its connections, as `ConnectionInfo` of agent.h names them."""
        with self._parts.roster.changed:
            lanes = list(self._record.lanes)
        found = []
        for connection in lanes:
            try:
                found.append(self._parts.core.info(connection))
            except PeerLost:  # it went meanwhile
                continue
        return found

    def close(self) -> None:
        """Drop its connections and do not dial it again; it may still dial this agent."""
        with self._parts.roster.changed:
            self._parts.membership.part(self._record, "closed on this side")

    def __eq__(self, other: object) -> bool:
        """Return whether both stand for the same life."""
        return isinstance(other, Peer) and other.record is self._record

    def __hash__(self) -> int:
        """Return a hash of the life."""
        return hash((self.name, self.incarnation))

    def __repr__(self) -> str:
        """Return a text for people."""
        return f"Peer({self.name!r}, {self.state.value})"
