"""A read or write that was checked once and can be begun any number of times."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import PeerLost, StaleReference, UnavailableError, UsageError
from kvx.transfer.agents.lease_token import Rights
from kvx.transfer.agents.peer_state import PeerState
from kvx.transfer.backend import LinkPlan, LinkRequest
from kvx.transfer.backends.native import NativeChannel

if TYPE_CHECKING:
    from kvx.transfer.agents.parts import AgentParts
    from kvx.transfer.agents.peer import RemoteBlocks
    from kvx.transfer.agents.registration import Descriptors
    from kvx.transfer.agents.transfers import LinkTransfer

NOTE_BYTES_MAX = 64 << 10


class PreparedTransfer:
    """Local blocks and leased blocks of a peer that fit each other. Thread-safe.

    The lease is looked at each time: when it has ended the transfer fails with StaleReference.
    """

    def __init__(self, parts: AgentParts, local: Descriptors, remote: RemoteBlocks) -> None:
        """Check both sides against each other; use `Agent.prepare` instead."""
        self._parts = parts
        self._local = local
        self._remote = remote
        self._plans: dict[bool, LinkPlan] = {}
        self._lock = threading.Lock()
        if len(local) != len(remote):
            raise UsageError(f"{len(local)} local blocks but {len(remote)} remote ones")
        if not len(local):
            raise UsageError("a transfer needs at least one block")

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._local)

    def read(
        self, *, deadline_s: float | None = None, backend: str | None = None, notify: bytes = b""
    ) -> LinkTransfer:
        """Begin to read; see `Agent.read`."""
        if not self._local.registration.memory.is_writable:
            raise UsageError("the local memory is read-only: nothing can be read into it")
        return self._begin(is_write=False, deadline_s=deadline_s, backend=backend, notify=notify)

    def write(
        self, *, deadline_s: float | None = None, backend: str | None = None, notify: bytes = b""
    ) -> LinkTransfer:
        """Begin to write; see `Agent.write`."""
        return self._begin(is_write=True, deadline_s=deadline_s, backend=backend, notify=notify)

    def _begin(
        self, *, is_write: bool, deadline_s: float | None, backend: str | None, notify: bytes
    ) -> LinkTransfer:
        deadline = self._parts.config.deadline_s if deadline_s is None else deadline_s
        if deadline <= 0:
            raise UsageError(f"deadline_s = {deadline}; a transfer needs time")
        if len(notify) > NOTE_BYTES_MAX:
            raise UsageError(f"notify has {len(notify)} bytes; at most {NOTE_BYTES_MAX}")
        self._check_peer(is_write=is_write)
        plan = self._plan(is_write=is_write)
        record = self._remote.peer.record
        try:
            name, channel = self._parts.ways.channel(
                record, plan, is_write=is_write, forced=backend, timeout_s=deadline
            )
        except UnavailableError as error:
            # Its last connection may have gone just now, before anybody was told.
            if self._remote.peer.connections():
                raise
            raise PeerLost(
                f"{record.name} was lost just now: wait until it is up, or connect again",
                peer=record.name,
            ) from error
        request = LinkRequest(is_write, plan, self._remote.lease.ref, deadline, bytes(notify))
        job = channel.submit(request)
        return self._parts.desk.begin(
            job,
            record,
            family="" if isinstance(channel, NativeChannel) else name,
            backend=name,
            verb="write" if is_write else "read",
            deadline_s=deadline,
        )

    def _check_peer(self, *, is_write: bool) -> None:
        peer, lease = self._remote.peer, self._remote.lease
        needed, verb = (Rights.WRITE, "write") if is_write else (Rights.READ, "read")
        if needed not in lease.rights:
            raise UsageError(f"the lease does not allow to {verb}: {lease.rights!r}")
        if not self._local.registration.is_open:
            raise UsageError("the local registration is closed")
        if peer.state is PeerState.FENCED:
            raise StaleReference(
                f"{peer.name} was restarted: ask it for a new lease, and take "
                f"agent.peers[{peer.name!r}]"
            )
        if not peer.state.is_connected:
            reason = f" ({peer.reason})" if peer.reason else ""
            raise PeerLost(
                f"{peer.name} is {peer.state.value}{reason}: wait until it is up, or connect again",
                peer=peer.name,
            )

    def _plan(self, *, is_write: bool) -> LinkPlan:
        """Return the plan of a direction: what is written does not have the lease's checksums."""
        with self._lock:
            plan = self._plans.get(is_write)
            if plan is None:
                plan = self._plans[is_write] = self._make_plan(is_write=is_write)
            return plan

    def _make_plan(self, *, is_write: bool) -> LinkPlan:
        memory, remote = self._local.registration.memory, self._remote
        checksums = None if is_write else remote.checksums
        native = None
        if memory.kind is MemoryKind.HOST:
            native = self._parts.maker.plan(
                self._parts.core,
                region=memory.region,
                local=self._local.rows,
                remote_region=remote.lease.region,
                remote=remote.rows,
                indices=remote.indices,
                checksums=checksums,
                keys=remote.keys,
            )
        return LinkPlan(
            memory, self._local.rows, remote.lease.region, remote.rows, remote.indices, checksums,
            remote.keys, native, self._local.after,
        )  # fmt: skip
