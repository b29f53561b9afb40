"""One ranged read of blocks from an object, as a job that a cache's steps can wait for."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import numpy as np

from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

# Below zero, where the engine has no jobs, and apart from those of peers.
_ids = itertools.count(-(1 << 40), -1)
_STATES = {Code.TIMEOUT: "timed_out", Code.CANCELLED: "cancelled"}


class ObjectRead:
    """Blocks on their way from an object into DRAM slots; see `MovingJob`. Thread-safe.

    It touches the slots only between `begin_landing` and `finish`, so one that was cancelled before
    has quiesced at once: a late answer lands nowhere. The memory of whoever uses the cache it never
    touches: what has landed is copied there by a job of the engine.

    Attributes:
        id: Number of the job.
    """

    def __init__(
        self, num_blocks: int, stop: Callable[[int], None], when_over: Callable[[int], None]
    ) -> None:
        """Make it; whoever makes it starts the request.

        Args:
            num_blocks: How many blocks it brings.
            stop: Ends the request of the job of a number; called on any thread.
            when_over: Called with the number once nothing touches the slots any more.
        """
        self.id = next(_ids)
        self._stop = stop
        self._when_over = when_over
        self._changed = threading.Condition()
        self._codes = np.full(num_blocks, -1, np.int32)
        self._checksums = np.zeros(num_blocks, np.uint64)
        self._state = "running"
        self._is_landing = False

    def begin_landing(self) -> bool:
        """Begin to write the slots; False when the read was ended, and they may not be touched."""
        with self._changed:
            self._is_landing = self._state == "running"
            return self._is_landing

    def finish(self, codes: npt.NDArray[np.int32], checksums: npt.NDArray[np.uint64]) -> None:
        """Say how it ended; after a cancel only that the slots are not touched any more."""
        with self._changed:
            self._is_landing = False
            if self._state == "running":
                self._codes, self._checksums = codes, checksums
                worst = Code(int(codes.max()))
                self._state = "done" if worst is Code.OK else _STATES.get(worst, "failed")
            self._changed.notify_all()
        self._when_over(self.id)

    def fail(self, code: Code) -> None:
        """Say that no block has come."""
        self.finish(np.full(len(self._codes), int(code), np.int32), np.zeros_like(self._checksums))

    def state(self) -> str:
        """See `MovingJob`."""
        return self._state

    def is_terminal(self) -> bool:
        """See `MovingJob`."""
        return self._state != "running"

    def is_quiesced(self) -> bool:
        """See `MovingJob`."""
        return self._state != "running" and not self._is_landing

    def wait(self, timeout_s: float) -> bool:
        """See `MovingJob`."""
        with self._changed:
            return self._changed.wait_for(self.is_terminal, timeout_s)

    def wait_at_rest(self, timeout_s: float) -> bool:
        """See `MovingJob`; it only ever lands in slots."""
        return self.wait(timeout_s)

    def cancel(self) -> bool:
        """See `MovingJob`."""
        with self._changed:
            if self._state != "running":
                return False
            self._state = "cancelled"
            self._codes = np.full(len(self._codes), int(Code.CANCELLED), np.int32)
            is_quiet = not self._is_landing
            self._changed.notify_all()
        self._stop(self.id)
        if is_quiet:
            self._when_over(self.id)
        return True

    def codes(self) -> npt.NDArray[np.int32]:
        """See `MovingJob`."""
        return self._codes

    def errnos(self) -> npt.NDArray[np.int32]:
        """See `MovingJob`."""
        return np.zeros(len(self._codes), np.int32)

    def checksums(self) -> npt.NDArray[np.uint64]:
        """Return the checksums of the blocks that have arrived, (n,) uint64."""
        return self._checksums
