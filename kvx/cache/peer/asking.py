"""Asking a peer for a lease, and reading under it, as jobs that a cache's steps can wait for."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import KvxError, PeerLost, TransferCancelled, TransferTimeout
from kvx.transfer.codes import Code
from kvx.transfer.handle import TransferState

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.peer.messages import Grant
    from kvx.cache.peer.source import Source
    from kvx.transfer.agents.transfers import LinkTransfer

# Below zero, where the engine has no jobs.
_ids = itertools.count(-1, -1)


class LeaseAsk:
    """A question to one peer. Ends when it is answered, late, cancelled or the peer is lost.

    Attributes:
        id: Number of the job.
        number: What the peer knows it by.
        source: The peer.
        grant: Its answer; None without one.
        code: How it ended.
        is_patient: Whether the peer has all the time that a peer is given.
    """

    def __init__(
        self, number: int, source: Source, num_blocks: int, deadline_s: float,
        when_over: Callable[[LeaseAsk], None], *, is_patient: bool,
    ) -> None:  # fmt: skip
        """Begin to wait; whoever makes it sends the question.

        Args:
            number: Of the question, unique in this cache.
            source: Who is asked.
            num_blocks: For how many blocks.
            deadline_s: Seconds until nobody waits any more.
            when_over: Called once with this, on whatever thread ended it.
            is_patient: Whether that is all the time that a peer is given.
        """
        self.id = next(_ids)
        self.number = number
        self.source = source
        self.grant: Grant | None = None
        self.code = Code.OK
        self.is_patient = is_patient
        self._num_blocks = num_blocks
        self._end = time.monotonic() + deadline_s
        self._when_over = when_over
        self._lock = threading.Lock()
        self._over = threading.Event()

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._end - time.monotonic())

    def answer(self, grant: Grant) -> bool:
        """Take the answer; False when it comes too late."""
        return self._finish(Code.OK, grant)

    def expire(self) -> None:
        """End it when its time is over."""
        if self.remaining_s <= 0:
            self._finish(Code.TIMEOUT)

    def lose(self) -> None:
        """End it: the peer is gone."""
        self._finish(Code.PEER_LOST)

    def state(self) -> str:
        """See `MovingJob`."""
        if not self._over.is_set():
            return "running"
        ends = {Code.OK: "done", Code.TIMEOUT: "timed_out", Code.CANCELLED: "cancelled"}
        return ends.get(self.code, "failed")

    def is_terminal(self) -> bool:
        """See `MovingJob`."""
        return self._over.is_set()

    def is_quiesced(self) -> bool:
        """See `MovingJob`; no bytes move."""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """See `MovingJob`; ends it when its deadline comes first."""
        if not self._over.wait(min(timeout_s, self.remaining_s)):
            self.expire()
        return self._over.is_set()

    def wait_at_rest(self, timeout_s: float) -> bool:
        """See `MovingJob`; no bytes move."""
        return self.wait(timeout_s)

    def cancel(self) -> bool:
        """See `MovingJob`."""
        return self._finish(Code.CANCELLED)

    def codes(self) -> npt.NDArray[np.int32]:
        """See `MovingJob`."""
        return np.full(self._num_blocks, int(self.code) if self._over.is_set() else -1, np.int32)

    def errnos(self) -> npt.NDArray[np.int32]:
        """See `MovingJob`."""
        return np.zeros(self._num_blocks, np.int32)

    def _finish(self, code: Code, grant: Grant | None = None) -> bool:
        with self._lock:
            if self._over.is_set():
                return False
            self.code, self.grant = code, grant
            self._over.set()
        self._when_over(self)
        return True


class PeerRead:
    """A read between agents, into DRAM slots. Settled like a job of the engine.

    What has landed is copied on by a job of the engine: this one never touches the memory of
    whoever uses the cache.

    Attributes:
        id: Number of the job.
    """

    def __init__(self, transfer: LinkTransfer, num_blocks: int) -> None:
        """Take over a transfer that has begun."""
        self.id = next(_ids)
        self._transfer = transfer
        self._num_blocks = num_blocks

    def tell(self, when_over: Callable[[int], None]) -> None:
        """Have the end told, with the job's number, on whatever thread finds out."""
        self._transfer.add_done_callback(lambda: when_over(self.id))

    def state(self) -> str:
        """See `MovingJob`."""
        found = self._transfer.poll()
        return "running" if found is TransferState.PENDING else found.value

    def is_terminal(self) -> bool:
        """See `MovingJob`."""
        return self._transfer.poll() is not TransferState.PENDING

    def is_quiesced(self) -> bool:
        """See `MovingJob`."""
        return self.is_terminal() and self._transfer.wait_quiesced(0.0)

    def wait(self, timeout_s: float) -> bool:
        """See `MovingJob`; helps to copy meanwhile."""
        try:
            self._transfer.wait(timeout_s)
        except KvxError:
            # How it ended is in its codes; or the time was up.
            return self.is_terminal()
        return True

    def wait_at_rest(self, timeout_s: float) -> bool:
        """See `MovingJob`; it only ever lands in slots."""
        return self.wait(timeout_s)

    def cancel(self) -> bool:
        """See `MovingJob`."""
        return self._transfer.cancel()

    def codes(self) -> npt.NDArray[np.int32]:
        """See `MovingJob`; blocks that were not begun end as the whole did."""
        result, error = self._transfer.result, self._transfer.error
        if result is None:
            return np.full(self._num_blocks, -1, np.int32)
        codes = result.codes.copy()
        unbegun = (codes == Code.SKIPPED) | (codes < Code.OK)
        match error:
            case TransferTimeout():
                codes[unbegun] = Code.TIMEOUT
            case TransferCancelled():
                codes[unbegun] = Code.CANCELLED
            case PeerLost():
                codes[unbegun] = Code.PEER_LOST
            case _:
                codes[unbegun] = Code.UNAVAILABLE
        return codes

    def errnos(self) -> npt.NDArray[np.int32]:
        """See `MovingJob`."""
        return np.zeros(self._num_blocks, np.int32)
