"""The other side: an owner of blocks in a process of its own, to which bad things happen."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np

from kvx.transfer.agents.lease_token import Rights
from kvx.transfer.agents.ways import load_backends
from kvx.transfer.memory import MemoryRegion
from kvx.transfer.owner import Owner, OwnerProcess, pattern

NUM_BLOCKS = 256
BLOCK_BYTES = 64 << 10
SIZE_BYTES = NUM_BLOCKS * BLOCK_BYTES
KEY = b"the key of the fault matrix"
# What victims fill their memory with when it is nobody's any more, and when nobody may write it.
JUNK, CANARY = 0xEE, 0xC5
# Long after any deadline here, so that what ends before it ended by itself.
LEASE_S = 3600.0
# Seconds of silence until a peer is suspected.
SUSPECT_S = 0.25


@dataclass(frozen=True, slots=True)
class Way:
    """How bytes go between the initiator and its victim.

    Attributes:
        name: Of the row in the table.
        backend: The one that transfers take.
        backends: All that may be used.
        is_shared: Whether memory is a memfd that peers map.
        listen: Where the victim listens besides its socket file.
        unix: Whether it has that file.
        namespace: Network namespace that the victim runs in; None for this one.
        rights: What the victim leases its memory for.
        environment: Of both processes, by name.
    """

    name: str
    backend: str
    backends: tuple[str, ...]
    is_shared: bool
    listen: str | None = None
    unix: bool = True
    namespace: str | None = None
    rights: Rights = Rights.READ | Rights.WRITE
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def config(self) -> dict[str, object]:
        """Of agents on both sides."""
        return {
            "backends": self.backends, "unix": self.unix, "gossip": False, "ping_s": 0.05,
            "suspect_after_s": SUSPECT_S, "lost_after_s": 20.0, "redial_s": 0.01,
            "redial_max_s": 0.05, "lease_ttl_s": LEASE_S,
        }  # fmt: skip


def _nixl(name: str, **environment: str) -> Way:
    return Way(
        name, "nixl", ("nixl",), is_shared=False, listen="tcp://127.0.0.1:0",
        rights=Rights.READ | Rights.WRITE | Rights.REMOTE_WRITE,
        environment=tuple(environment.items()),
    )  # fmt: skip


WAYS = (
    Way("shm", "shm", ("shm",), is_shared=True),
    Way("foreign", "shm", ("shm",), is_shared=False),
    # What is left for private memory that the kernel does not let peers read.
    Way("unix", "tcp", ("shm", "tcp"), is_shared=False),
    Way("tcp", "tcp", ("tcp",), is_shared=False, listen="tcp://127.0.0.1:0", unix=False),
    _nixl("nixl"),
    # The bytes come out of the peer's process, as over a network: a frozen one sends none.
    _nixl("nixl, tcp", UCX_TLS="tcp"),
)


@functools.cache
def why_not(way: Way) -> str:
    """Return why a way cannot be tried here; empty when it can."""
    backends, failures = load_backends()
    for backend in backends:
        if backend.name == way.backend:
            return backend.availability()
    return failures.get(way.backend, f"there is no backend {way.backend} here")


class Guarded:
    """Who has blocks, and looks whether somebody has written them."""

    blocks: np.ndarray

    def guard(self, first: int = 0, count: int = NUM_BLOCKS) -> None:
        """Fill blocks with what nobody sends."""
        self.blocks[first : first + count] = CANARY

    def touched(self, first: int = 0, count: int = NUM_BLOCKS) -> int:
        """Return how many blocks were written since `guard`."""
        return int((self.blocks[first : first + count] != CANARY).any(axis=1).sum())


class Victim(Guarded, Owner):
    """An owner whose memory can be taken away under its peers."""

    def __init__(
        self, name: str, *, is_shared: bool, config: dict[str, object], listen: str | None,
        rights: int, namespace: str | None = None, environment: tuple[tuple[str, str], ...] = (),
    ) -> None:  # fmt: skip
        """Open an agent with `NUM_BLOCKS` blocks of pattern 1."""
        os.environ.update(environment)
        if namespace is not None:
            enter(namespace)
        super().__init__(
            name, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, is_shared=is_shared, key=KEY,
            config=config, listen=listen,
        )  # fmt: skip
        self._is_shared = is_shared
        self._rights = rights
        self.fill(1)

    def fill(self, seed: int) -> None:
        """Give every block bytes of its own; made once."""
        self.blocks[:] = _pattern(seed)

    def token(self) -> bytes:
        """Lease all the memory to be read and written."""
        return self.lease(rights=self._rights, ttl_s=LEASE_S)[1]

    def hand_out(self, ttl_s: float) -> tuple[int, bytes]:
        """Lease all the memory, to take it back."""
        return self.lease(rights=self._rights, ttl_s=ttl_s)

    def deregister(self, timeout_s: float) -> float:
        """Let the memory go while peers are at it, and use it for something else at once."""
        began = time.monotonic()
        self.registration.close(timeout_s)
        self.blocks[:] = JUNK
        return time.monotonic() - began

    def free(self, timeout_s: float) -> float:
        """Let the memory go, and give it back to the kernel."""
        took_s = self.deregister(timeout_s)
        self.blocks = np.zeros((1, BLOCK_BYTES), np.uint8)
        return took_s

    def register_again(self) -> None:
        """Have memory again after it was let go."""
        region = MemoryRegion(SIZE_BYTES, is_shared=self._is_shared)
        self.blocks = region.array()[:SIZE_BYTES].reshape(NUM_BLOCKS, BLOCK_BYTES)
        self.registration = self.agent.register(region if self._is_shared else self.blocks)
        self.fill(1)

    def drop_peers(self) -> None:
        """Close every connection."""
        for peer in self.agent.peers.values():
            peer.close()

    def wrong(self, seed: int, blocks: list[int]) -> int:
        """Return how many of these blocks are not those of a pattern."""
        return int((self.blocks[blocks] != _pattern(seed)[blocks]).any(axis=1).sum())

    def settle(self, first: int, count: int, arrived: list[int]) -> int:
        """Return how many of the blocks that arrived did not, and guard all of them."""
        wrong = self.wrong(2, arrived) if arrived else 0
        self.guard(first, count)
        return wrong


_pattern = functools.lru_cache(maxsize=4)(
    lambda seed: pattern(seed, NUM_BLOCKS, BLOCK_BYTES)
)  # fmt: skip


def victim_pattern(seed: int) -> np.ndarray:
    """Return (NUM_BLOCKS, BLOCK_BYTES) uint8, not to be written."""
    return _pattern(seed)


@functools.cache
def _context() -> BaseContext:
    """Return what starts processes in a tenth of the time that a new interpreter takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.transfer.faults.victim"])
    return context


def enter(namespace: str) -> None:
    """Move this process, which has one thread, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open() as opened:
        if libc.setns(opened.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def start_victim(way: Way, name: str = "victim") -> OwnerProcess:
    """Start a victim and wait until it listens."""
    return OwnerProcess(
        name, kind=Victim, context=_context(), is_shared=way.is_shared, config=way.config,
        listen=way.listen, namespace=way.namespace,
        rights=int(way.rights), environment=way.environment,
    )  # fmt: skip
