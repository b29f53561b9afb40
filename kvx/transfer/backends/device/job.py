"""The handle of one transfer of device memory: what copies decide of its blocks.

It quiesces when no copy of it is with a device any more, and a receiver has said so; a copy that a
device has begun cannot be stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.errors import (
    CapacityError,
    KvxError,
    PeerLost,
    StaleReference,
    TransferTimeout,
    UnavailableError,
    UsageError,
)
from kvx.transfer.backends.job import Job
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

_CODES = (
    (PeerLost, Code.PEER_LOST),
    (StaleReference, Code.STALE),
    (UsageError, Code.USAGE),
    (CapacityError, Code.CAPACITY),
    (TransferTimeout, Code.TIMEOUT),
    (UnavailableError, Code.UNAVAILABLE),
)


def code_of(error: KvxError) -> Code:
    """Return the code that stands for an error; DEVICE for those of a device."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Code.DEVICE)


class DeviceJob(Job):
    """A job whose blocks get their outcomes one copy after the other.

    Attributes:
        ask_cancel: Asks somebody else to end it, where its end is not ours to say; None where it
            is.
    """

    ask_cancel: Callable[[], None] | None = None

    def cancel(self) -> bool:
        """End it, or ask its receiver to; False when it had ended."""
        if self.is_terminal():
            return False
        ask = self.ask_cancel
        if ask is None:
            return super().cancel()
        ask()
        return True

    # What follows is for the endpoint.

    def expire_cancelled(self) -> None:
        """End it as cancelled: its receiver has not said in time how far it came."""
        self.end(Code.CANCELLED)

    def decide(
        self,
        first: int,
        codes: npt.NDArray[np.int32],
        sums: npt.NDArray[np.uint64] | None = None,
        *,
        error: int = 0,
    ) -> None:
        """Give some blocks their outcome, unless the job has ended."""
        part = slice(first, first + len(codes))
        with self._changed:
            if self._state != "running":
                return
            self._codes[part] = codes
            self._errors[part] = error
            if sums is not None:
                self._sums[part] = sums

    def conclude(self, *, is_cancelled: bool = False) -> None:
        """End it with what was decided of its blocks.

        Args:
            is_cancelled: Whether blocks that were cancelled were so because this job was.
        """
        codes = self.codes()
        if (codes == Code.TIMEOUT).any():
            self.end(Code.TIMEOUT)
        elif is_cancelled and (codes == Code.CANCELLED).any():
            self.end(Code.CANCELLED)
        else:
            self.end(Code.SKIPPED)

    def explain(self, reason: str) -> None:
        """Keep the first reason that is told."""
        with self._changed:
            self._reason = self._reason or reason

    def settle(self) -> None:
        """Say that nothing touches its memory any more."""
        self.ask_cancel = None  # it knows the job
        super().settle()
