"""Leases on memory of this agent: who may use it, and until when."""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Self

import numpy as np

from kvx.errors import StaleReference, TransferTimeout, UsageError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.lease_token import TTL_S_MAX, RemoteLease
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy.typing as npt

    from kvx.transfer.agents.parts import AgentParts
    from kvx.transfer.backend import Memory

KEY_BYTES = 16
_GATHER_BYTES = 64 << 20


class BlockLease:
    """Blocks of a registration that peers may use until it is revoked or expires.

    Hand `token` to whoever is to use them. Revoking takes effect at once for whoever begins, and
    waits for those that are at work.

    Attributes:
        when_revoked: Called with a time limit once nobody uses it; for who made it.
    """

    def __init__(
        self, parts: AgentParts, granted: RemoteLease, when_over: Callable[[int], None]
    ) -> None:
        """Hold a granted lease; use `Registration.lease` instead."""
        self._parts = parts
        self._granted = granted
        self._when_over = when_over
        self._ends = time.monotonic() + granted.ttl_s
        self._is_over = False
        self.when_revoked: Callable[[float], None] = lambda _: None

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._granted)

    @property
    def id(self) -> int:
        """Number of the lease, unique in this agent."""
        return self._granted.ref.id

    @property
    def token(self) -> bytes:
        """The lease as bytes, signed when the agent has a key."""
        return self._granted.encode(self._parts.key)

    @property
    def remaining_s(self) -> float:
        """Seconds until it expires; 0 when it has ended."""
        return 0.0 if self._is_over else max(0.0, self._ends - time.monotonic())

    def renew(self, ttl_s: float) -> None:
        """Let it last so long from now; who holds a token need not be told.

        Raises:
            StaleReference: It has ended: grant a new one.
        """
        check_ttl(ttl_s)
        if self._is_over:
            raise StaleReference("the lease was revoked: grant a new one")
        self._parts.core.renew(self.id, ttl_s)
        self._ends = time.monotonic() + ttl_s

    def revoke(self, timeout_s: float = 10.0) -> None:
        """End it for whoever begins from now on, and wait for those that are at work.

        Raises:
            TransferTimeout: Somebody is still at work; nobody new can begin. Call again.
        """
        if not self._parts.core.revoke(self.id, timeout_s):
            raise TransferTimeout(
                f"lease {self.id} ({len(self)} blocks) is still in use after {timeout_s} s; nobody "
                "new can begin: call revoke again before the memory is reused"
            )
        self._is_over = True
        self._when_over(self.id)
        self.when_revoked(timeout_s)

    def __enter__(self) -> Self:
        """Return the lease."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Revoke it."""
        if not self._parts.core.is_closed:
            self.revoke()

    def __repr__(self) -> str:
        """Return a text for people."""
        return f"BlockLease(id={self.id}, blocks={len(self)}, remaining_s={self.remaining_s:.1f})"


def check_ttl(ttl_s: float) -> None:
    """Raise UsageError for a time that no lease can last."""
    if not 0 < ttl_s <= TTL_S_MAX:
        raise UsageError(f"ttl_s = {ttl_s}; from just above 0 to {TTL_S_MAX:g} is possible")


def as_checksums(values: object, count: int) -> npt.NDArray[np.uint64]:
    """Return (n,) uint64 of what a caller passed."""
    array = np.ascontiguousarray(values)
    if array.shape != (count,) or array.dtype != np.uint64:
        raise UsageError(
            f"checksums are ({count},) uint64, one a block, or 'compute'; not {array.shape} "
            f"{array.dtype}"
        )
    return array


def as_keys(values: object, count: int) -> npt.NDArray[np.uint8]:
    """Return (n, 16) uint8 of what a caller passed."""
    array = np.ascontiguousarray(values)
    if array.shape != (count, KEY_BYTES) or array.dtype != np.uint8:
        raise UsageError(
            f"keys are ({count}, {KEY_BYTES}) uint8, one a block; not {array.shape} {array.dtype}"
        )
    return array


def compute_checksums(
    memory: Memory, rows: npt.NDArray[np.int64], keys: npt.NDArray[np.uint8] | None
) -> npt.NDArray[np.uint64]:
    """Return the checksums of blocks in registered host memory; reads all of it once.

    REQUIRES: the rows were checked against the memory.
    """
    source = np.ctypeslib.as_array(
        (ctypes.c_uint8 * memory.size_bytes).from_address(memory.address)
    )
    found = np.empty(len(rows), np.uint64)
    seeds = np.zeros((len(rows), KEY_BYTES), np.uint8) if keys is None else keys
    sizes = descriptors.totals(rows)
    for size in np.unique(sizes):
        # Blocks of one size at a time, gathered, because the native function takes a matrix.
        places = np.flatnonzero(sizes == size)
        step = max(1, _GATHER_BYTES // int(size))
        for start in range(0, len(places), step):
            some = places[start : start + step]
            gathered = np.stack([_canonical(source, rows[place]) for place in some])
            found[some] = _core.block_checksums(gathered, seeds[some])
    return found


def _canonical(source: npt.NDArray[np.uint8], row: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    offset, stride, count, size = (int(value) for value in row)
    if count == 1:
        return source[offset : offset + size]
    view = np.lib.stride_tricks.as_strided(source[offset:], (count, size), (stride, 1))
    return view.reshape(-1)
