"""The handle of one transfer: its outcome, and who waits for it.

It ends twice. *Terminal* at its deadline at the latest, whoever looks first: the thread that
watches over transfers, or a caller that asks. *Quiesced* when NIXL has reported the end of every
request and nobody reads the memory any more; until then the memory is quarantined.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvx.transfer.backends.nixl.rows import Int64s

UNDECIDED = -1
_STATES = {Code.TIMEOUT: "timed_out", Code.CANCELLED: "cancelled"}


class NixlJob:
    """One read or write on its way; see `kvx.transfer.core.LinkJob`. Thread-safe."""

    def __init__(
        self,
        number: int,
        block_bytes: Int64s,
        deadline_s: float,
        *,
        ended: Callable[[int], None],
        wake: Callable[[], None],
    ) -> None:
        """Start the clock.

        Args:
            number: Of the job.
            block_bytes: (n,) bytes of each block.
            deadline_s: Seconds from now.
            ended: Called with the number at the end of a job that is watched.
            wake: Called at the end of any job.
        """
        self.deadline = time.monotonic() + deadline_s
        self._id = number
        self._block_bytes = block_bytes
        self._ended = ended
        self._wake = wake
        self._begun_ns = time.monotonic_ns()
        self._latency_ns = 0
        self._condition = threading.Condition()
        self._codes = np.full(len(block_bytes), UNDECIDED, np.int32)
        self._sums = np.zeros(len(block_bytes), np.uint64)
        self._is_corrupt = np.zeros(len(block_bytes), np.bool_)
        self._state = "running"
        self._is_quiesced = False
        self._is_watched = False

    @property
    def id(self) -> int:
        """Number of the job, unique in its endpoint."""
        return self._id

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._codes)

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return int(self._block_bytes.sum())

    @property
    def blocks_done(self) -> int:
        """Blocks that have arrived; all at once, when the owner has confirmed its lease."""
        return int(np.count_nonzero(self._codes == Code.OK))

    @property
    def bytes_done(self) -> int:
        """Their bytes."""
        return int(self._block_bytes[self._codes == Code.OK].sum())

    @property
    def latency_ns(self) -> int:
        """Nanoseconds from submission to the end, or to now."""
        return self._latency_ns or time.monotonic_ns() - self._begun_ns

    @property
    def ended_ns(self) -> int:
        """When it ended, by time.monotonic_ns(); now when it has not."""
        return self._begun_ns + self.latency_ns

    def state(self) -> str:
        """Return ``running``, ``done``, ``failed``, ``timed_out`` or ``cancelled``."""
        self.expire()
        return self._state

    def is_terminal(self) -> bool:
        """Return whether the outcome is final."""
        return self.state() != "running"

    def is_quiesced(self) -> bool:
        """Return whether nothing touches its memory any more."""
        return self._is_quiesced

    def is_lost(self) -> bool:
        """Return whether it failed because the peer is gone."""
        return bool((self._codes == Code.PEER_LOST).any())

    def wait(self, timeout_s: float) -> bool:
        """Wait until terminal; False when time was up first."""
        end = time.monotonic() + timeout_s
        with self._condition:
            while self._state == "running":
                now = time.monotonic()
                if now >= end:
                    return False
                self._condition.wait(max(0.0, min(end, self.deadline) - now))
                self.expire()
        return True

    def wait_quiesced(self, timeout_s: float) -> bool:
        """Wait until quiesced; False when time was up first."""
        with self._condition:
            return self._condition.wait_for(lambda: self._is_quiesced, timeout_s)

    def cancel(self) -> bool:
        """End it now; False when it had ended. Its memory stays quarantined until it quiesces."""
        return self.end(Code.CANCELLED)

    def watch(self) -> bool:
        """Ask to be told of the end; True when it has ended already, and nobody will tell."""
        with self._condition:
            self._is_watched = True
            return self._state != "running"

    def codes(self) -> npt.NDArray[np.int32]:
        """Return the outcome of every block, of `kvx.transfer.codes.Code`; -1 while open."""
        with self._condition:
            return self._codes.copy()

    def errnos(self) -> npt.NDArray[np.int32]:
        """Return zeros: NIXL keeps no errno."""
        return np.zeros(len(self._codes), np.int32)

    def checksums(self) -> npt.NDArray[np.uint64]:
        """Return the checksum computed of every block; 0 where none was."""
        with self._condition:
            return self._sums.copy()

    # What follows is for the endpoint.

    def expire(self) -> bool:
        """End it if its deadline has passed; True when this did that."""
        is_due = self._state == "running" and time.monotonic() >= self.deadline
        return is_due and self.end(Code.TIMEOUT)

    def note_checksums(
        self, first: int, sums: npt.NDArray[np.uint64], expected: npt.NDArray[np.uint64] | None
    ) -> None:
        """Keep what was computed of some blocks, and whether it is what was expected."""
        part = slice(first, first + len(sums))
        with self._condition:
            if self._state == "running":
                self._sums[part] = sums
                self._is_corrupt[part] = expected is not None and sums != expected

    def conclude(self, code: Code, failures: Sequence[int]) -> None:
        """End it with what the owner says of the whole, and of blocks that did not agree.

        The owner is asked when all has moved and was verified: nothing touches the memory now.
        """
        with self._condition:
            self._is_quiesced = True
            if code is Code.OK and self._state == "running":
                self._is_corrupt[list(failures)] = True
                self._codes[self._is_corrupt] = Code.CORRUPT
            self.end(code)

    def end(self, code: Code) -> bool:
        """Give all open blocks this outcome; False when the job had ended."""
        with self._condition:
            if self._state != "running":
                return False
            self._codes[self._codes == UNDECIDED] = code
            is_done = bool((self._codes == Code.OK).all())
            self._latency_ns = time.monotonic_ns() - self._begun_ns
            self._state = "done" if is_done else _STATES.get(code, "failed")
            self._condition.notify_all()
            is_watched = self._is_watched
        self._wake()
        if is_watched:
            self._ended(self._id)
        return True

    def settle(self) -> None:
        """Say that nothing touches its memory any more."""
        with self._condition:
            self._is_quiesced = True
            self._condition.notify_all()
