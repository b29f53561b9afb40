"""The handle of one transfer by NIXL: what is verified counts when the owner has agreed.

It quiesces when NIXL has reported the end of every request and nobody reads the memory any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.transfer.backends.job import Job
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvx.transfer.backends.nixl.rows import Int64s


class NixlJob(Job):
    """A job whose blocks arrive all at once, when the owner has confirmed its lease."""

    def __init__(
        self,
        number: int,
        block_bytes: Int64s,
        deadline_s: float,
        *,
        ended: Callable[[int], None],
        wake: Callable[[], None],
    ) -> None:
        """Start the clock; `wake` is called at the end, for the rest see `Job`."""
        super().__init__(number, block_bytes, deadline_s, ended=ended)
        self.when_ended = wake
        self._is_corrupt = np.zeros(len(block_bytes), np.bool_)

    # What follows is for the endpoint.

    def note_checksums(
        self, first: int, sums: npt.NDArray[np.uint64], expected: npt.NDArray[np.uint64] | None
    ) -> None:
        """Keep what was computed of some blocks, and whether it is what was expected."""
        part = slice(first, first + len(sums))
        with self._changed:
            if self._state == "running":
                self._sums[part] = sums
                self._is_corrupt[part] = expected is not None and sums != expected

    def conclude(self, code: Code, failures: Sequence[int]) -> None:
        """End it with what the owner says of the whole, and of blocks that did not agree.

        The owner is asked when all has moved and was verified: nothing touches the memory now.
        """
        with self._changed:
            self._is_quiesced = True
            self._changed.notify_all()
            if code is Code.OK and self._state == "running":
                self._is_corrupt[list(failures)] = True
                self._codes[self._is_corrupt] = Code.CORRUPT
            self.end(code)
