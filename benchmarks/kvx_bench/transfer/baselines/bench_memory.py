"""Memory on both sides of the baselines: the second process's is a memfd that this one maps."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Self

import numpy as np

from kvx_bench.copying import prefaulted
from kvx_bench.transfer.child import Child

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx_bench.transfer.baselines.work import Work

_FILL, _OTHER = 0x5A, 0xA5


class TwoMemories:
    """A second process with as much memory as this one, all of it populated.

    Attributes:
        child: The second process.
        ours: (num_bytes,) uint8 of this process alone.
        shared: (num_bytes,) uint8 of a memfd that the second process made, mapped here.
        their_address: Where the second process has as many bytes of its own.
    """

    def __init__(self, num_bytes: int) -> None:
        with contextlib.ExitStack() as made:
            self.child = made.enter_context(Child.of_module("kvx_bench.transfer.baselines.peer"))
            fd, answer = self.child.ask_for_fd(do="map", num_bytes=num_bytes)
            try:
                mapped = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(fd)
            self.their_address = int(answer["address"])
            self.shared: npt.NDArray[np.uint8] = np.frombuffer(mapped, np.uint8)
            self.ours = prefaulted(num_bytes, fill=0)
            self._made = made.pop_all()

    def __enter__(self) -> Self:
        """Nothing but the memory."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the second process."""
        self._made.close()

    def sides(self, work: Work) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Return (target, source) of a batch between this process's and the shared memory."""
        ours, shared = self.ours[: work.num_bytes], self.shared[: work.num_bytes]
        return (shared, ours) if work.is_write else (ours, shared)

    def arrives(self, work: Work, move: Callable[[], object]) -> bool:
        """Return whether `move` fills the target with what is in the source, in shared memory."""
        target, source = self.sides(work)
        source[:] = _FILL
        target[:] = _OTHER
        move()
        return bool((target == _FILL).all())

    def arrives_apart(self, work: Work, move: Callable[[], object]) -> bool:
        """Do the same where the second process uses memory of its own."""
        ours = self.ours[: work.num_bytes]
        ours[:] = _FILL if work.is_write else _OTHER
        theirs = _OTHER if work.is_write else _FILL
        self.child.ask(do="fill", num_bytes=work.num_bytes, fill=theirs)
        move()
        if not work.is_write:
            return bool((ours == _FILL).all())
        seen = self.child.ask(do="look", num_bytes=work.num_bytes)
        return bool(seen["lowest"] == seen["highest"] == _FILL)
