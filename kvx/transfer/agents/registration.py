"""Memory that transfers may touch: registered once, described and leased any number of times."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from kvx.buffers import Buffer, MemoryKind, describe, stream_handle
from kvx.errors import KvxError, TransferTimeout, UsageError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.lease import (
    BlockLease,
    as_checksums,
    as_keys,
    check_ttl,
    compute_checksums,
)
from kvx.transfer.agents.lease_token import RemoteLease, Rights
from kvx.transfer.agents.peer import Peer
from kvx.transfer.agents.staged import StagedLeases, stage, staged_checksums
from kvx.transfer.backend import Memory
from kvx.transfer.core import ANY_PEER, LeaseRef
from kvx.transfer.memory import MemoryRegion

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.agents.parts import AgentParts
    from kvx.transfer.backend import DeviceEndpoint
    from kvx_ext import _core


class Descriptors:
    """Blocks of one registration, in order; made by `Registration`."""

    __slots__ = ("after", "registration", "rows")

    def __init__(
        self,
        registration: Registration,
        rows: npt.NDArray[np.int64],
        after: _core.StreamMark | None = None,
    ) -> None:
        """Describe blocks.

        Args:
            registration: Whose memory it is.
            rows: (n, 4) int64 of offset, stride, count, bytes; checked.
            after: A point in a stream that they are used after; None for at once.
        """
        self.registration = registration
        self.rows = rows
        self.after = after

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.rows)

    def __getitem__(self, which: slice | npt.NDArray[np.int64] | Sequence[int]) -> Descriptors:
        """Return some of the blocks."""
        return Descriptors(self.registration, self.rows[which], self.after)

    @property
    def size_bytes(self) -> int:
        """Bytes of all blocks."""
        return int(descriptors.totals(self.rows).sum())

    def __repr__(self) -> str:
        """Return a text for people."""
        return f"Descriptors(blocks={len(self)}, size_bytes={self.size_bytes})"


class Registration:
    """Memory that an agent's transfers may touch, kept alive until `close`.

    Attributes:
        memory: Where and what it is.
    """

    def __init__(self, parts: AgentParts, keep: object, memory: Memory, row_bytes: int) -> None:
        """Hold registered memory; use `Agent.register` instead. Keeps the agent (`keep`) alive."""
        self._parts = parts
        self._keep = keep
        self._row_bytes = row_bytes
        self._leases: set[int] = set()
        self._is_open = True
        self._staged = StagedLeases()
        self.memory = memory

    @property
    def size_bytes(self) -> int:
        """Bytes of the memory."""
        return self.memory.size_bytes

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return self._is_open and self._parts.is_open

    def blocks(
        self, ids: object, block_bytes: int | None = None, *, after: object = None
    ) -> Descriptors:
        """Return equal blocks that lie back to back, by number.

        Args:
            ids: (n,) integers.
            block_bytes: None for the bytes of one index of the first dimension of what was
                registered.
            after: A CUDA stream, for device memory: the blocks are read or written only after what
                is in it now. None: they may be used at once.
        """
        size = self._row_bytes if block_bytes is None else block_bytes
        if not size:
            raise UsageError("block_bytes: needed, since the memory has one dimension only")
        return self._described(descriptors.blocks(ids, size), after)

    def descriptors(self, offsets: object, sizes: object, *, after: object = None) -> Descriptors:
        """Return runs of bytes: (n,) offsets and (n,) sizes, integers; `after` as in `blocks`."""
        return self._described(descriptors.contiguous(offsets, sizes), after)

    def strided(
        self, base: object, stride: int, count: int, row_bytes: int, *, after: object = None
    ) -> Descriptors:
        """Return blocks of `count` rows of `row_bytes`, `stride` apart: one at each of `base`.

        `after` as in `blocks`.
        """
        return self._described(descriptors.strided(base, stride, count, row_bytes), after)

    def rows(self, rows: object, *, after: object = None) -> Descriptors:
        """Return blocks of any shape: (n, 4) integers of offset, stride, count, bytes.

        `after` as in `blocks`.
        """
        return self._described(descriptors.as_rows(rows).copy(), after)

    def lease(
        self,
        blocks: Descriptors | None = None,
        *,
        rights: Rights = Rights.READ,
        ttl_s: float | None = None,
        peer: Peer | str | None = None,
        checksums: npt.NDArray[np.uint64] | str | None = None,
        keys: npt.NDArray[np.uint8] | None = None,
        staged: bool = False,
    ) -> BlockLease:
        """Let peers use blocks of this memory for a while.

        Args:
            blocks: Of this registration; None for all of the memory, of which peers may then name
                any part.
            rights: What they may do.
            ttl_s: Seconds until it expires; None for the configured time.
            peer: The only one that may use it, also one that is not connected yet; None for any.
            checksums: (n,) uint64 that the blocks have, ``"compute"`` to read them once now, or
                None to compute them whenever a block is sent. Fixed ones also find out that the
                memory was written meanwhile.
            keys: (n, 16) uint8 that checksums are computed under; None for zeros.
            staged: For device memory: copy the blocks into host memory now, and lease that, so that
                peers elsewhere can read them. Blocks until they are copied. What is written to the
                device later is not seen; the host memory goes with the lease.

        Raises:
            UsageError: The arguments do not fit each other.
            CapacityError: As many leases as possible are out, or there is no host memory.
            TransferTimeout: The blocks could not be copied within the configured deadline.
        """
        self._check_open()
        rows = self._rows_of(blocks)
        if staged:
            after = None if blocks is None else blocks.after
            return self._staged.keep(
                self._lease_staged(
                    rows, after, rights=rights, ttl_s=ttl_s, peer=peer, checksums=checksums,
                    keys=keys,
                )
            )  # fmt: skip
        ttl = self._parts.config.lease_ttl_s if ttl_s is None else ttl_s
        check_ttl(ttl)
        self._check_rights(rights, has_checksums=checksums is not None)
        seeds = None if keys is None else as_keys(keys, len(rows))
        sums = self._checksums(checksums, rows, seeds)
        name = "" if peer is None else peer.name if isinstance(peer, Peer) else peer
        ref = self._parts.core.grant(
            self.memory.region,
            rows,
            rights=int(rights),
            peer=ANY_PEER if peer is None else self._number_of(peer),
            ttl_s=ttl,
            checksums=sums,
            keys=seeds,
        )
        self._leases.add(ref[0])
        if blocks is not None and blocks.after is not None:
            for endpoint in self._parts.ways.device_endpoints(self.memory):
                endpoint.hold_back(LeaseRef(*ref), blocks.after)
        identity = self._parts.identity
        granted = RemoteLease(
            identity.name, identity.incarnation, LeaseRef(*ref), self.memory.region,
            self.size_bytes, Rights(rights), ttl, name, rows, sums, seeds,
        )  # fmt: skip
        return BlockLease(self._parts, granted, self._leases.discard)

    def close(self, timeout_s: float = 10.0) -> None:
        """Revoke its leases, wait for whoever uses it, and let the memory go.

        Calling it twice does no harm.

        Raises:
            TransferTimeout: It is still in use; names by what. Nobody new can begin: call again
                before the memory is freed or reused.
        """
        if not self.is_open:
            return
        end = time.monotonic() + timeout_s
        self._staged.revoke(end)
        for lease in sorted(self._leases):
            if not self._parts.core.revoke(lease, max(0.0, end - time.monotonic())):
                raise self._still_used(f"lease {lease}", timeout_s)
            self._leases.discard(lease)
        holder = self._parts.ways.unregister(self.memory, max(0.0, end - time.monotonic()))
        if holder:
            raise self._still_used(f"backend {holder}", timeout_s)
        if not self._parts.core.remove_region(self.memory.region, max(0.0, end - time.monotonic())):
            raise self._still_used("a transfer, see agent.quarantine,", timeout_s)
        self._is_open = False
        with self._parts.roster.changed:
            self._parts.conversation.remove_region(self.memory.region)
            self._parts.memories.pop(self.memory.region, None)

    def __enter__(self) -> Self:
        """Return the registration."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Return a text for people."""
        return f"Registration(region={self.memory.region}, size_bytes={self.size_bytes})"

    def _described(self, rows: npt.NDArray[np.int64], after: object) -> Descriptors:
        self._check_open()
        rows = descriptors.check(rows, self.size_bytes)
        if after is None:
            return Descriptors(self, rows)
        if self.memory.kind is not MemoryKind.DEVICE:
            raise UsageError("after: streams are for blocks in device memory")
        stream = stream_handle(after)
        return Descriptors(self, rows, self._device_endpoint().mark(self.memory, stream))

    def _device_endpoint(self) -> DeviceEndpoint:
        return self._parts.ways.device_endpoints(self.memory)[0]

    def _lease_staged(
        self, rows: npt.NDArray[np.int64], after: _core.StreamMark | None, *, rights: Rights,
        ttl_s: float | None, peer: Peer | str | None,
        checksums: npt.NDArray[np.uint64] | str | None, keys: npt.NDArray[np.uint8] | None,
    ) -> BlockLease:  # fmt: skip
        """Lease a copy in host memory; see `lease`."""
        if self.memory.kind is not MemoryKind.DEVICE or rights != Rights.READ:
            raise UsageError(
                "staged: for device memory that peers are to read; what they write is staged by "
                "itself"
            )
        region, places = stage(
            self._device_endpoint(), self.memory, rows, after, self._parts.config.deadline_s
        )
        staging = register(self._parts, self._keep, region)
        try:
            lease = staging.lease(
                staging.rows(places), ttl_s=ttl_s, peer=peer, checksums=checksums, keys=keys
            )
        except KvxError:
            staging.close(0.0)
            raise
        lease.when_revoked = staging.close
        return lease

    def _rows_of(self, blocks: Descriptors | None) -> npt.NDArray[np.int64]:
        if blocks is None:
            return descriptors.contiguous([0], [self.size_bytes])
        if blocks.registration is not self:
            raise UsageError("the blocks are of another registration")
        if not len(blocks):
            raise UsageError("a lease needs at least one block")
        return blocks.rows

    def _check_rights(self, rights: Rights, *, has_checksums: bool) -> None:
        if not 0 < int(rights) <= int(Rights.READ | Rights.WRITE | Rights.REMOTE_WRITE):
            raise UsageError(f"rights = {rights!r}; accepted: Rights.READ, Rights.WRITE, or both")
        if Rights.REMOTE_WRITE in Rights(rights) and Rights.WRITE not in Rights(rights):
            raise UsageError("Rights.REMOTE_WRITE is given beside Rights.WRITE, not instead of it")
        if Rights.WRITE in Rights(rights) and has_checksums:
            raise UsageError(
                "what peers may write has no checksums that stay right: leave them out"
            )
        if Rights.WRITE in Rights(rights) and not self.memory.is_writable:
            raise UsageError("the memory is read-only: a lease to write it is not possible")

    def _checksums(
        self,
        checksums: npt.NDArray[np.uint64] | str | None,
        rows: npt.NDArray[np.int64],
        keys: npt.NDArray[np.uint8] | None,
    ) -> npt.NDArray[np.uint64] | None:
        if checksums is None:
            return None
        if isinstance(checksums, str):
            if checksums != "compute":
                raise UsageError(f"checksums = {checksums!r}; accepted: an array, or 'compute'")
            if self.memory.kind is MemoryKind.HOST:
                return compute_checksums(self.memory, rows, keys)
            return staged_checksums(
                self._device_endpoint(), self.memory, rows, keys, self._parts.config.deadline_s
            )
        return as_checksums(checksums, len(rows))

    def _number_of(self, peer: Peer | str) -> int:
        return peer.number if isinstance(peer, Peer) else self._parts.roster.number_of(peer)

    def _still_used(self, what: str, timeout_s: float) -> TransferTimeout:
        return TransferTimeout(
            f"{self!r} is still in use by {what} after {timeout_s} s; nobody new can begin: close "
            "it again before the memory is freed"
        )

    def _check_open(self) -> None:
        if not self.is_open:
            raise UsageError("the registration is closed")


def register(parts: AgentParts, keep: object, source: object) -> Registration:
    """Register memory of any library; see `Agent.register`."""
    memory, row_bytes = _memory_of(source)
    if memory.kind is MemoryKind.HOST:
        region = parts.core.add_region(
            memory.address, memory.size_bytes, memory.fd, memory.fd_offset
        )
    else:
        region = parts.core.add_opaque_region(memory.size_bytes)
    registered = Memory(
        region, memory.address, memory.size_bytes, memory.kind, memory.device_ordinal, memory.fd,
        memory.fd_offset, memory.is_writable, memory.owner,
    )  # fmt: skip
    try:
        parts.ways.register(registered)
    except BaseException:
        parts.core.remove_region(region, 0.0)
        raise
    with parts.roster.changed:
        parts.memories[region] = registered
        if memory.kind is MemoryKind.HOST:
            parts.conversation.add_region(region)
    return Registration(parts, keep, registered, row_bytes)


def _memory_of(source: object) -> tuple[Memory, int]:
    """Return where memory lies, and the bytes of one index of its first dimension, 0 for flat."""
    if isinstance(source, MemoryRegion):
        return Memory(
            0, source.address, source.size_bytes, fd=source.fd, owner=(source, source.array())
        ), 0
    found = describe(source)
    _check_contiguous(found, source)
    size_bytes = found.row_bytes * (found.shape[0] if found.shape else 1)
    if size_bytes < 1:
        raise UsageError(f"{type(source).__name__}: it has no bytes")
    row_bytes = found.row_bytes if len(found.shape) > 1 else 0
    return Memory(
        0, found.address, size_bytes, found.kind, found.device_ordinal,
        is_writable=found.is_writable, owner=found.owner,
    ), row_bytes  # fmt: skip


def _check_contiguous(found: Buffer, source: object) -> None:
    is_dense = not found.shape or found.shape[0] <= 1 or (
        found.strides_bytes[0] == found.row_bytes
    )  # fmt: skip
    if not is_dense or not found.has_contiguous_rows:
        raise UsageError(
            f"{type(source).__name__} of shape {found.shape}: it has gaps; register what it is a "
            "part of, and name its blocks with strided()"
        )
