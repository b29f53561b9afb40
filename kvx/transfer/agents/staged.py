"""Blocks of device memory in host memory: to be leased to peers elsewhere, or to be checksummed."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import TransferTimeout
from kvx.transfer.agents import descriptors
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.agents.descriptors import Rows
    from kvx.transfer.agents.lease import BlockLease
    from kvx.transfer.backend import DeviceEndpoint, Memory
    from kvx.transfer.memory import MemoryRegion

# Of device memory that is brought into host memory at a time to be checksummed.
_STEP_BYTES = 64 << 20


class StagedLeases:
    """Staged leases of one registration: each has host memory that goes with it."""

    def __init__(self) -> None:
        """Start empty."""
        self._leases: list[BlockLease] = []

    def keep(self, lease: BlockLease) -> BlockLease:
        """Keep a lease; those that have expired, which nobody may ever revoke, go."""
        for old in [one for one in self._leases if not one.remaining_s]:
            with contextlib.suppress(TransferTimeout):  # somebody is at it still: next time
                old.revoke(0.0)
                self._leases.remove(old)
        self._leases.append(lease)
        return lease

    def revoke(self, end: float) -> None:
        """Revoke them all, until a time of the monotonic clock; TransferTimeout: not all yet."""
        while self._leases:
            self._leases[-1].revoke(max(0.0, end - time.monotonic()))
            self._leases.pop()


def stage(
    endpoint: DeviceEndpoint, memory: Memory, rows: Rows, after: _core.StreamMark | None,
    timeout_s: float,
) -> tuple[MemoryRegion, Rows]:  # fmt: skip
    """Return a host region with the bytes of blocks, and the rows that they have there."""
    region = endpoint.stage(memory, rows, after, timeout_s)
    return region, back_to_back(rows)


def back_to_back(rows: Rows) -> Rows:
    """Return the rows of blocks of the same sizes that follow each other from 0 on."""
    sizes = descriptors.totals(rows)
    return descriptors.contiguous(sizes.cumsum() - sizes, sizes)


def staged_checksums(
    endpoint: DeviceEndpoint, memory: Memory, rows: Rows, keys: npt.NDArray[np.uint8] | None,
    timeout_s: float,
) -> npt.NDArray[np.uint64]:  # fmt: skip
    """Return the checksums of blocks in device memory.

    None comes out of a copy engine, so the bytes are looked at in host memory, some at a time.
    """
    found = np.empty(len(rows), np.uint64)
    for start, stop in spans(rows, _STEP_BYTES):
        region, places = stage(endpoint, memory, rows[start:stop], None, timeout_s)
        seeds = None if keys is None else keys[start:stop]
        found[start:stop] = _core.row_checksums(region.array(), places, seeds)
    return found


def spans(rows: Rows, bytes_max: int, blocks_max: int = 4096) -> list[tuple[int, int]]:
    """Return (start, stop) of neighbouring blocks of so many bytes together; one block at least."""
    ends = descriptors.totals(rows).cumsum()
    found, start = [], 0
    while start < len(rows):
        before = int(ends[start - 1]) if start else 0
        fits = int(np.searchsorted(ends, before + bytes_max, "right"))
        stop = min(max(start + 1, fits), start + blocks_max)
        found.append((start, stop))
        start = stop
    return found
