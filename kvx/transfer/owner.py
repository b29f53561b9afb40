"""An agent that owns some blocks and leases them, in this process or in one of its own.

What checks of backends and tests talk to: everything goes in and out as plain values, so that
`OwnerProcess` can pass it on to another process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kvx.errors import KvxError, TransferTimeout
from kvx.transfer.agents.agent import Agent
from kvx.transfer.agents.lease_token import Rights
from kvx.transfer.memory import MemoryRegion

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.connection import Connection
    from multiprocessing.context import BaseContext
    from types import TracebackType

    from kvx.transfer.agents.lease import BlockLease

_END_S = 10.0


class Owner:
    """An agent with one registration of equal blocks.

    Attributes:
        agent: The agent.
        blocks: (num_blocks, block_bytes) uint8, its memory.
        registration: Of that memory.
    """

    def __init__(
        self,
        name: str = "owner",
        *,
        num_blocks: int = 64,
        block_bytes: int = 4096,
        is_shared: bool = True,
        key: bytes | None = None,
        listen: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        """Open an agent and register memory; a shared region, or private memory."""
        self.agent = Agent(name, listen=listen, key=key, config=config)
        size = num_blocks * block_bytes
        region = MemoryRegion(size, is_shared=is_shared)
        self.blocks = region.array()[:size].reshape(num_blocks, block_bytes)
        self.registration = self.agent.register(region if is_shared else self.blocks)
        self._block_bytes = block_bytes
        self._leases: dict[int, BlockLease] = {}

    def card(self) -> bytes:
        """Return the agent's card."""
        return self.agent.export()

    def addresses(self) -> tuple[str, ...]:
        """Return where the agent listens."""
        return self.agent.addresses

    def fill(self, seed: int) -> None:
        """Give every block bytes of its own; see `pattern`."""
        self.blocks[:] = pattern(seed, *self.blocks.shape)

    def content(self, block: int) -> bytes:
        """Return the bytes of a block."""
        return bytes(self.blocks[block])

    def spoil(self, block: int) -> None:
        """Flip a bit of a block, behind the back of whoever leased it."""
        self.blocks[block, -1] ^= 1

    def lease(
        self, ids: list[int] | None = None, *, rights: int = int(Rights.READ), ttl_s: float = 30.0,
        peer: str | None = None, has_checksums: bool = False,
    ) -> tuple[int, bytes]:  # fmt: skip
        """Lease blocks by number, or all the memory; returns the lease's number and its token."""
        described = None if ids is None else self.registration.blocks(ids, self._block_bytes)
        lease = self.registration.lease(
            described, rights=Rights(rights), ttl_s=ttl_s, peer=peer,
            checksums="compute" if has_checksums else None,
        )  # fmt: skip
        self._leases[lease.id] = lease
        return lease.id, lease.token

    def lease_rows(self, rows: list[tuple[int, int, int, int]], *, rights: int) -> bytes:
        """Lease blocks of any shape; returns the token."""
        lease = self.registration.lease(self.registration.rows(rows), rights=Rights(rights))
        self._leases[lease.id] = lease
        return lease.token

    def revoke(self, lease: int, timeout_s: float = 5.0) -> None:
        """End a lease."""
        self._leases[lease].revoke(timeout_s)

    def renew(self, lease: int, ttl_s: float) -> None:
        """Extend a lease."""
        self._leases[lease].renew(ttl_s)

    def notifications(self, timeout_s: float = 0.0) -> list[tuple[str, bytes]]:
        """Take the notifications that have come."""
        return [(note.peer, note.payload) for note in self.agent.notifications(timeout_s)]

    def events(self, timeout_s: float = 0.0) -> list[str]:
        """Take the peer events that have come, as texts."""
        return [f"{type(event).__name__} {event.name}" for event in self.agent.events(timeout_s)]

    def connect(self, target: str | bytes, timeout_s: float = 10.0) -> str:
        """Be connected with a peer; returns its name."""
        return self.agent.connect(target, timeout_s).name

    def peers(self) -> dict[str, str]:
        """Return the states of peers by name."""
        return {name: peer.state.value for name, peer in self.agent.peers.items()}

    def known(self) -> list[str]:
        """Return the names whose cards are known."""
        return self.agent.known()

    def stats(self) -> dict[str, int]:
        """Return the counters of the core."""
        return self.agent.stats()

    def close(self) -> None:
        """Close the agent."""
        self.agent.close(1.0)


class OwnerProcess:
    """An `Owner` in a process of its own."""

    def __init__(
        self,
        name: str = "owner",
        *,
        kind: type[Owner] | None = None,
        context: BaseContext | None = None,
        **options: object,
    ) -> None:
        """Start the process and wait until its agent is open.

        Args:
            name: Of the agent there.
            kind: What runs there, when it can do more than an `Owner`.
            context: How processes are started; None for `spawn`.
            options: Of the `Owner`.

        Raises:
            KvxError: The agent could not be opened there; the same error as here.
        """
        # The base class of contexts is typed without Process, which every context has.
        chosen: Any = multiprocessing.get_context("spawn") if context is None else context
        ours, theirs = chosen.Pipe()
        self._pipe: Connection = ours
        self._process = chosen.Process(
            target=_serve, args=(theirs, kind or Owner, name, options), name=f"kvx-owner-{name}",
            daemon=True,
        )  # fmt: skip
        self._process.start()
        theirs.close()
        self._answer()

    @property
    def pid(self) -> int:
        """Number of the process."""
        assert self._process.pid is not None, "it was started"
        pid: int = self._process.pid
        return pid

    def ask(self, method: str, *arguments: object, **named: object) -> Any:
        """Call a method of the `Owner` there, and return what it returns.

        Raises:
            KvxError: What it raises.
        """
        self._pipe.send((method, arguments, named))
        return self._answer()

    def freeze(self) -> None:
        """Stop the process; see `freeze`."""
        freeze(self.pid)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End the process without a word."""
        self._process.kill()
        self._process.join(_END_S)

    def close(self) -> None:
        """Close the agent there and end the process."""
        if self._process.is_alive():
            self.thaw()
            with contextlib.suppress(BrokenPipeError, EOFError, ConnectionResetError):
                self.ask("close")
                self._pipe.send(None)
            self._process.join(_END_S)
        if self._process.is_alive():
            self.kill()
        self._pipe.close()
        self._process.close()

    def __enter__(self) -> Self:
        """Return the owner."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _answer(self) -> object:
        is_error, answer = self._pipe.recv()
        if is_error:
            raise answer
        return answer


def freeze(pid: int) -> None:
    """Stop a child of this process as SIGSTOP does; returns when all its threads stand, or it died.

    Raises:
        TransferTimeout: Some thread of it goes on, 10 s later.
    """
    os.kill(pid, signal.SIGSTOP)
    # On a thread: the kernel tells the parent when the last one stands, but takes no time limit.
    waiter = threading.Thread(target=_wait_still, args=(pid,), daemon=True)
    waiter.start()
    waiter.join(_END_S)
    if waiter.is_alive():
        raise TransferTimeout(
            f"process {pid} did not stop within {_END_S:g} s of SIGSTOP: a system call or a "
            "debugger holds a thread of it"
        )


def _wait_still(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # it was waited for: it is dead
        # Whoever started it still has to learn how it ended.
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def pattern(seed: int, num_blocks: int, block_bytes: int) -> np.ndarray:
    """Return (num_blocks, block_bytes) uint8 in which every block differs from every other."""
    return np.random.default_rng(seed).integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)


def _serve(pipe: Connection, kind: type[Owner], name: str, options: dict[str, Any]) -> None:
    """Run an owner and answer calls until the pipe is closed or says so."""
    try:
        owner = kind(name, **options)
    except KvxError as error:
        pipe.send((True, error))
        return
    pipe.send((False, None))
    with contextlib.suppress(EOFError):
        while (call := pipe.recv()) is not None:
            method, arguments, named = call
            try:
                pipe.send((False, getattr(owner, method)(*arguments, **named)))
            except KvxError as error:
                pipe.send((True, error))
    owner.close()
