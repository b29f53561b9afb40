"""How a read or write between agents ended: its result, and the error that stands for it. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import (
    CapacityError,
    CorruptBlock,
    KvxError,
    PeerLost,
    StaleReference,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    UnavailableError,
    UsageError,
)
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    import numpy.typing as npt


class LinkOutcome(enum.StrEnum):
    """Where a transfer between agents stands, the truth about cancelled ones included.

    CANCELLED: it was cancelled and nothing moves any more. QUARANTINED: it has ended, cancelled,
    timed out or failed, and somebody may still be at its memory: of a read some thread of this
    agent, of a write the peer at its own. DONE after a cancel: the cancel came too late.
    """

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True, eq=False)
class LinkResult:
    """What a read or write between agents has reached.

    Attributes:
        blocks_done: Blocks that arrived and were verified.
        bytes_done: Their bytes.
        codes: (n,) int32 of `kvx.transfer.codes.Code`, one a block.
        checksums: (n,) uint64 computed of the blocks; 0 where no bytes were seen.
        elapsed_s: From the call to the end.
        backend: The way the bytes went.
    """

    blocks_done: int
    bytes_done: int
    codes: npt.NDArray[np.int32]
    checksums: npt.NDArray[np.uint64]
    elapsed_s: float
    backend: str

    @property
    def num_blocks(self) -> int:
        """Blocks that were asked for."""
        return len(self.codes)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What an error says besides how far the transfer came.

    Attributes:
        verb: ``read`` or ``write``.
        peer: Name of the other side.
        peer_state: How it is doing, in words.
        size_bytes: Bytes that were to move.
        deadline_s: Seconds the transfer had.
        reason: What the backend has to say about the end; empty for nothing.
    """

    verb: str
    peer: str
    peer_state: str
    size_bytes: int
    deadline_s: float
    reason: str = ""


def error_of(
    state: str, result: LinkResult, about: Circumstances, *, is_lost: bool
) -> KvxError | None:
    """Return the error of a transfer that has ended in `state`; None when all arrived."""
    if state == "done":
        return None
    what = f"the {about.verb} {'from' if about.verb == 'read' else 'to'} {about.peer}"
    reached = (
        f"{result.blocks_done} of {result.num_blocks} blocks ({result.bytes_done} of "
        f"{about.size_bytes} bytes) arrived over {result.backend}"
    )
    facts = {"bytes_done": result.bytes_done, "peer": about.peer}
    if state == "timed_out":
        return TransferTimeout(
            f"{what} did not end within its deadline of {about.deadline_s} s: {reached}, and "
            f"{about.peer_state}; raise deadline_s, or see agent.explain({about.peer!r})",
            **facts,  # type: ignore[arg-type]
        )
    if state == "cancelled":
        return TransferCancelled(f"{what} was cancelled: {reached}", **facts)  # type: ignore[arg-type]
    if is_lost or (result.codes == Code.PEER_LOST).any():
        return PeerLost(
            f"{about.peer} was lost during {what}: {reached}, and {about.peer_state}; connect "
            "again and ask for new leases",
            **facts,  # type: ignore[arg-type]
        )
    return _error_of_code(result, what, reached, about, facts)


def _error_of_code(
    result: LinkResult, what: str, reached: str, about: Circumstances, facts: dict[str, object]
) -> KvxError:
    """Return the error of the first block that failed for a reason of its own."""
    own = ~np.isin(result.codes, (Code.OK, Code.SKIPPED, Code.CANCELLED))
    first = int(np.flatnonzero(own)[0]) if own.any() else 0
    code = Code(int(result.codes[first])) if own.any() else Code.CANCELLED
    where = f"{what} failed at block {first} of {result.num_blocks}: {reached}"
    match code:
        case Code.CORRUPT:
            return CorruptBlock(
                f"{where}; its bytes do not match the checksum of the lease: the owner wrote the "
                "memory, or it is damaged",
                key=str(first),
            )
        case Code.STALE:
            return StaleReference(
                f"{where}; the lease has ended, or its memory is not registered any more: ask "
                f"{about.peer} for a new one"
            )
        case Code.USAGE:
            if about.reason:
                return UsageError(f"{where}; {about.reason}")
            return UsageError(
                f"{where}; {about.peer} refuses it: the lease was granted to somebody else, or not "
                f"for a {about.verb}"
            )
        case Code.TIMEOUT:
            return TransferTimeout(
                f"{where}; {about.peer} saw its deadline of {about.deadline_s} s pass: raise "
                "deadline_s",
                **facts,  # type: ignore[arg-type]
            )
        case Code.CAPACITY:
            why = about.reason or f"{about.peer} has no room for it"
            return CapacityError(f"{where}; {why}: try again")
        case Code.UNAVAILABLE:
            why = about.reason or "this way is not possible"
            return UnavailableError(
                f"{where}; {why}: take another backend, see agent.explain({about.peer!r})"
            )
        case _:
            why = about.reason or code.name.lower()
            return TransferError(f"{where} ({why})", **facts)  # type: ignore[arg-type]
