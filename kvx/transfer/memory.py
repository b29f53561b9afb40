"""Host memory that is fit for fast copies: aligned, on huge pages, prefaulted.

A page's first touch is many times slower than copying into it. A region therefore populates its
pages once, on several threads, before or while it is used.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kvx.errors import CapacityError
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt


_log = logging.getLogger(__name__)
_PROGRESS_EVERY_S = 0.1
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class MemoryRegion:
    """Contiguous host memory of fixed size; freed when the last array on it dies.

    Use it for buffers that blocks are offloaded from or onboarded to: kvx reaches its full speed
    only on prefaulted memory.
    """

    def __init__(self, size_bytes: int, *, is_shared: bool = False, numa_node: int = -1) -> None:
        """Map the memory; no page is populated yet.

        Args:
            size_bytes: Rounded up to 4096.
            is_shared: Back it with a memfd that another process can map.
            numa_node: Where its pages should lie; -1 leaves it to the kernel.

        Raises:
            CapacityError: The kernel refuses.
        """
        self._region = _core.HostRegion(size_bytes, is_shared, numa_node)
        self._stop = _core.StopFlag()
        self._thread: threading.Thread | None = None
        self._error: CapacityError | None = None

    @property
    def address(self) -> int:
        """Address of the first byte; a multiple of 4096, of 2 MiB from 2 MiB on."""
        return self._region.address

    @property
    def size_bytes(self) -> int:
        """Size after rounding up."""
        return self._region.bytes

    @property
    def fd(self) -> int:
        """File descriptor of a shared region, else -1."""
        return self._region.fd

    @property
    def prefaulted_bytes(self) -> int:
        """How far `prefault` has come."""
        return self._region.prefaulted_bytes

    def array(self) -> npt.NDArray[np.uint8]:
        """Return the whole region as a writable (size_bytes,) uint8 array that keeps it alive."""
        return self._region.array()

    def prefault(self, *, threads: int = 0) -> bool:
        """Populate all pages now; other threads run meanwhile.

        Args:
            threads: 0 for one a CPU.

        Returns:
            False when `stop_prefault` cut it short.

        Raises:
            CapacityError: There is not that much memory.
        """
        return self._region.prefault(threads or os.cpu_count() or 1, self._stop)

    def prefault_in_background(self, *, threads: int = 0) -> None:
        """Start `prefault` on a thread of its own; `prefaulted_bytes` tells the progress."""
        self._thread = threading.Thread(
            target=self._prefault_logged, args=(threads,), name="kvx-prefault", daemon=True
        )
        self._thread.start()

    def wait_prefaulted(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Wait for a background prefault.

        Args:
            progress: Called ten times a second with (bytes done, bytes in all).

        Raises:
            CapacityError: There is not that much memory.
        """
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_PROGRESS_EVERY_S)
            if progress is not None:
                progress(self.prefaulted_bytes, self.size_bytes)
        if self._error is not None:
            raise self._error

    def _prefault_logged(self, threads: int) -> None:
        try:
            self.prefault(threads=threads)
        except CapacityError as error:
            self._error = error
            _log.warning("memory could not be populated ahead of its use: %s", error)

    def stop_prefault(self) -> None:
        """End a background prefault and wait for its thread (at most one 32 MiB step)."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def memory_limit_bytes() -> int:
    """Return how much memory this process may have: the machine's, or its control group's."""
    texts = [path.read_text().strip() for path in _CGROUP_LIMITS if path.exists()]
    limits = [int(text) for text in texts if text.isdigit()]  # "max" where there is none
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])
