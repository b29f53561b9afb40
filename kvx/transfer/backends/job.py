"""The handle of one transfer that a backend does in Python: its outcome, and who waits for it.

It ends twice. *Terminal* at its deadline at the latest, whoever looks first: a thread that watches
over deadlines, or a caller that asks. *Quiesced* when nothing of it moves any more, which the
backend says; what is on its way by then cannot always be stopped, so until then the memory is
quarantined.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

_UNDECIDED = -1
_STATES = {Code.TIMEOUT: "timed_out", Code.CANCELLED: "cancelled"}


def _nothing() -> None:
    return


class Job:
    """One read or write on its way; see `kvx.transfer.core.LinkJob`. Thread-safe.

    Attributes:
        deadline: When it ends at the latest, of the monotonic clock.
        when_ended: Called once when it has become terminal.
        when_quiet: Called once when it has quiesced.
    """

    def __init__(
        self,
        number: int,
        block_bytes: npt.NDArray[np.int64],
        deadline_s: float,
        *,
        ended: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Start the clock.

        Args:
            number: Of the job.
            block_bytes: (n,) bytes of each block.
            deadline_s: Seconds from now.
            ended: Called with the number at the end of a job that is watched.
        """
        self.deadline = time.monotonic() + deadline_s
        self.when_ended: Callable[[], None] = _nothing
        self.when_quiet: Callable[[], None] = _nothing
        self._id = number
        self._block_bytes = block_bytes
        self._ended = ended
        self._begun_ns = time.monotonic_ns()
        self._latency_ns = 0
        self._changed = threading.Condition()
        self._codes = np.full(len(block_bytes), _UNDECIDED, np.int32)
        self._sums = np.zeros(len(block_bytes), np.uint64)
        self._errors = np.zeros(len(block_bytes), np.int32)
        self._state = "running"
        self._reason = ""
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
        """Blocks that have arrived and count."""
        return int(np.count_nonzero(self._codes == Code.OK))

    @property
    def bytes_done(self) -> int:
        """Their bytes."""
        return int(self._block_bytes[self._codes == Code.OK].sum())

    @property
    def latency_ns(self) -> int:
        """Nanoseconds from submission to the end, or to now."""
        return self._latency_ns or time.monotonic_ns() - self._begun_ns

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

    def reason(self) -> str:
        """Return why it failed, for people; empty where the codes say it all."""
        return self._reason

    def wait(self, timeout_s: float) -> bool:
        """Wait until terminal; False when time was up first."""
        end = time.monotonic() + timeout_s
        while not self.is_terminal():
            now = time.monotonic()
            if now >= end:
                return False
            with self._changed:
                if self._state == "running":
                    self._changed.wait(max(0.0, min(end, self.deadline) - now))
        return True

    def wait_quiesced(self, timeout_s: float) -> bool:
        """Wait until quiesced; False when time was up first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_quiesced, timeout_s)

    def cancel(self) -> bool:
        """End it now; False when it had ended. Its memory stays quarantined until it quiesces."""
        return self.end(Code.CANCELLED)

    def watch(self) -> bool:
        """Ask to be told of the end; True when it has ended already, and nobody will tell."""
        with self._changed:
            self._is_watched = True
            return self._state != "running"

    def codes(self) -> npt.NDArray[np.int32]:
        """Return the outcome of every block, of `kvx.transfer.codes.Code`; -1 while open."""
        with self._changed:
            return self._codes.copy()

    def errnos(self) -> npt.NDArray[np.int32]:
        """Return the driver's error behind every block that failed in one, else zeros."""
        with self._changed:
            return self._errors.copy()

    def checksums(self) -> npt.NDArray[np.uint64]:
        """Return the checksum computed of every block; 0 where none was."""
        with self._changed:
            return self._sums.copy()

    # What follows is for the endpoint.

    @property
    def ended_ns(self) -> int:
        """When it became terminal, by time.monotonic_ns(); now when it has not."""
        return self._begun_ns + self.latency_ns

    def expire(self) -> None:
        """End it if its deadline has passed."""
        if self._state == "running" and time.monotonic() >= self.deadline:
            self.end(Code.TIMEOUT)

    def end(self, code: Code, reason: str = "") -> bool:
        """Give all open blocks this outcome; False when the job had ended."""
        with self._changed:
            if self._state != "running":
                return False
            self._codes[self._codes == _UNDECIDED] = code
            self._reason = self._reason or reason
            is_done = bool((self._codes == Code.OK).all())
            self._latency_ns = max(1, time.monotonic_ns() - self._begun_ns)
            self._state = "done" if is_done else _STATES.get(code, "failed")
            self._changed.notify_all()
            is_watched = self._is_watched
        self.when_ended()
        if is_watched:
            self._ended(self._id)
        return True

    def settle(self) -> None:
        """Say that nothing touches its memory any more."""
        with self._changed:
            if self._is_quiesced:
                return
            self._is_quiesced = True
            self._changed.notify_all()
        then, self.when_quiet = self.when_quiet, _nothing
        # Who was called knows the job: let go of each other, or all of it stays until a collection.
        self.when_ended = _nothing
        then()
