"""Record pages on their way to the files: what the engine is to write, and its outcome.

The pages are copied when they are taken. The mirror may go on changing while the device reads
the copy, so no write is torn by our own hand, and what an in-flight write reads is never unmapped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk.extent import Extent
from kvx.cache.disk.files import aligned_empty
from kvx.cache.disk.format import BLOCK_ALIGNMENT, HEADER_BYTES

# Neighbouring pages make one write, up to the size from which devices gain nothing more.
_WRITE_PAGES_MAX: Final = (1 << 20) // BLOCK_ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordWrites:
    """Writes of record pages for the engine; each moves `bytes` from `addresses` to `offsets`.

    Keep the object until all of them have ended: it owns the memory at the addresses. Then hand it
    to `DiskStore.record_writes_done`.

    Attributes:
        extents: (n,) int32, extent numbers.
        fds: (n,) int32, open files of the extents.
        offsets: (n,) int64, byte offsets in the files, 4096-aligned.
        addresses: (n,) int64, host addresses, 4096-aligned.
        bytes: (n,) int64, multiples of 4096.
    """

    extents: NDArray[np.int32]
    fds: NDArray[np.int32]
    offsets: NDArray[np.int64]
    addresses: NDArray[np.int64]
    bytes: NDArray[np.int64]
    _buffer: NDArray[np.uint8]
    _runs: Sequence[tuple[Extent, NDArray[np.int64]]]

    def __len__(self) -> int:
        """Return the number of writes."""
        return len(self.offsets)

    @property
    def num_pages(self) -> int:
        """Record pages that these writes cover."""
        return len(self._buffer) // BLOCK_ALIGNMENT

    def end(self, is_failed: NDArray[np.bool_]) -> None:
        """Tell the extents the outcome of each write; see `DiskStore.record_writes_done`."""
        for (extent, pages), failed in zip(self._runs, is_failed, strict=True):
            extent.end_write(pages, is_failed=bool(failed))


def take_record_writes(extents: Sequence[Extent], pages_max: int) -> RecordWrites:
    """Take up to `pages_max` dirty pages of some extents and make writes of them."""
    runs: list[tuple[Extent, NDArray[np.int64]]] = []
    for extent in extents:
        pages = extent.begin_write(pages_max)
        pages_max -= len(pages)
        runs.extend((extent, run) for run in _runs_of(pages))
    lengths = np.array([len(pages) for _, pages in runs], dtype=np.int64)
    buffer = aligned_empty(int(lengths.sum()) * BLOCK_ALIGNMENT)
    starts = (np.cumsum(lengths) - lengths) * BLOCK_ALIGNMENT
    for (extent, pages), start, length in zip(runs, starts, lengths, strict=True):
        target = buffer[start : start + length * BLOCK_ALIGNMENT]
        target[:] = extent.page_bytes(pages).reshape(-1)
    return RecordWrites(
        extents=np.array([extent.number for extent, _ in runs], dtype=np.int32),
        fds=np.array([extent.fd for extent, _ in runs], dtype=np.int32),
        offsets=np.array(
            [HEADER_BYTES + int(pages[0]) * BLOCK_ALIGNMENT for _, pages in runs], dtype=np.int64
        ),
        addresses=buffer.ctypes.data + starts,
        bytes=lengths * BLOCK_ALIGNMENT,
        _buffer=buffer,
        _runs=runs,
    )


def _runs_of(pages: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut ascending pages into runs of neighbours of at most 1 MiB."""
    if len(pages) == 0:
        return []
    runs = np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1)
    return [
        run[start : start + _WRITE_PAGES_MAX]
        for run in runs
        for start in range(0, len(run), _WRITE_PAGES_MAX)
    ]
