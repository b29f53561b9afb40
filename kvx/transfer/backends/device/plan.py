"""What one transfer copies out of memory of a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.backend import Memory, PeerSight
    from kvx.transfer.core import LeaseRef
    from kvx_ext import _core


@dataclass(frozen=True, slots=True, eq=False)
class PullPlan:
    """What a pull copies.

    Attributes:
        target: Memory of ours.
        local: (n, 4) int64 rows in it; no two overlap.
        remote: (n, 4) int64 rows in the peer's region.
        checksums: (n,) uint64 that the blocks must have; None when they are not known.
        keys: (n, 16) uint8 that checksums are computed under; None for zeros.
        lease: Of the peer, that the memory is read under.
        sight: Shows whether it is live; None where somebody else sees to that.
        after: A point in a stream of ours that is waited for; None for none.
        may_write: Whether our own memory may still be written.
        reads_back: Whether what was copied to a device is verified all the same.
    """

    target: Memory
    local: npt.NDArray[np.int64]
    remote: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint64] | None
    keys: npt.NDArray[np.uint8] | None
    lease: LeaseRef
    sight: PeerSight | None
    after: _core.StreamMark | None = None
    may_write: Callable[[], bool] = lambda: True
    reads_back: bool = False

    def look(self) -> Code:
        """Return whether bytes may be taken from there to here."""
        if not self.may_write():
            return Code.STALE
        if self.sight is None:
            return Code.OK
        return Code(self.sight.look(self.lease.slot, self.lease.generation))
