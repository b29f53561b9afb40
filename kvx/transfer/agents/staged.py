"""Blocks of device memory in host memory: to be leased to peers elsewhere, or to be checksummed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.transfer.agents import descriptors
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.agents.descriptors import Rows
    from kvx.transfer.backend import DeviceEndpoint, Memory
    from kvx.transfer.memory import MemoryRegion

# Of device memory that is brought into host memory at a time to be checksummed.
_STEP_BYTES = 64 << 20


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
