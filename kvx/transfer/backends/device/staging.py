"""Device memory brought into host memory for whoever cannot reach the device."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvx.errors import TransferError, TransferTimeout
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.staged import back_to_back
from kvx.transfer.backends.device.pinned import PinnedRegion
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.backend import Memory
    from kvx.transfer.backends.device.desk import Desk
    from kvx.transfer.memory import MemoryRegion
    from kvx_ext import _core


def stage(
    desk: Desk, memory: Memory, rows: npt.NDArray[np.int64], mark: _core.StreamMark | None,
    timeout_s: float,
) -> MemoryRegion:  # fmt: skip
    """Return a shared host region with the bytes of blocks, one behind the other.

    Raises:
        CapacityError: There is no host memory for it.
        TransferTimeout: The copies did not end in time; what they write is kept until they have.
        TransferError: The device failed.
    """
    places = back_to_back(rows)
    pinned = PinnedRegion(desk.device, int(descriptors.totals(rows).sum()))
    outcome: list[tuple[Code, int]] = []
    has_landed = threading.Event()

    def landed(code: Code, error: int) -> None:
        # Also when nobody waits any more: this keeps the region until here.
        desk.device.note_host_access(pinned.address, places, is_write=False)
        pinned.close()
        outcome.append((code, error))
        has_landed.set()

    def begin() -> None:
        desk.copy("d2h", (pinned.address, places), (memory.address, rows), mark, landed)

    desk.do(begin)
    if not has_landed.wait(timeout_s):
        raise TransferTimeout(
            f"{len(rows)} blocks were not copied into host memory within {timeout_s:g} s"
        )
    code, error = outcome[0]
    if code is not Code.OK:
        raise TransferError(
            f"device {desk.ordinal} did not copy blocks into host memory: {code.name.lower()} "
            f"{error}"
        )
    return pinned.region
