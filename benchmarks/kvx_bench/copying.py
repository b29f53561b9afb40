"""The limit line of memory benchmarks: a plain copy with streaming stores on several threads."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvx import MemoryRegion
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def prefaulted(num_bytes: int, *, fill: int | None = None) -> npt.NDArray[np.uint8]:
    """Return (num_bytes,) uint8 memory whose pages are all there."""
    region = MemoryRegion(num_bytes)
    region.prefault()
    array: npt.NDArray[np.uint8] = region.array()[:num_bytes]
    if fill is not None:
        array[:] = fill
    return array


def streaming_copy(
    target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8], threads: int
) -> None:
    """Copy equal arrays, each thread a contiguous share: no checksum, no bookkeeping."""
    size = len(target)
    share = -(-size // threads // 4096) * 4096
    spans = [slice(start, min(start + share, size)) for start in range(0, size, share)]
    workers = [
        threading.Thread(target=_core.copy_only, args=(target[span], source[span]))
        for span in spans[1:]
    ]
    for worker in workers:
        worker.start()
    _core.copy_only(target[spans[0]], source[spans[0]])
    for worker in workers:
        worker.join()
