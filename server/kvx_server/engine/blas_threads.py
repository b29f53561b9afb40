"""How many threads NumPy's matrix products use, changed while the process runs.

One thread is what a worker wants. On a machine whose cores are busy, BLAS threads wait for one
another: on two cores with five other processes, prefill of 4,096 tokens with the tiny model took
1.9 seconds with one thread and 6 to 40 seconds with two, while on idle cores the second thread
saves a sixth of the time. Besides, the number of threads may decide how a product is split and
thereby its last bits. (One and two gave the same bits with the tiny model; no one promises it.)
"""

from __future__ import annotations

import ctypes
from pathlib import Path

_MAPS = Path("/proc/self/maps")
# NumPy's own wheels carry the first spelling, distributions the others.
_SPELLINGS = (
    "scipy_openblas_{}_num_threads64_",
    "openblas_{}_num_threads64_",
    "scipy_openblas_{}_num_threads",
    "openblas_{}_num_threads",
)


def set_blas_threads(count: int) -> int | None:
    """Set the number of threads of the OpenBLAS that NumPy has loaded, for the whole process.

    Args:
        count: Threads, at least 1.

    Returns:
        The number before, or None where it cannot be set: NumPy uses another BLAS, or the system is
        not Linux. Start the process with OPENBLAS_NUM_THREADS or its like there.

    Raises:
        ValueError: `count` is not positive.
    """
    if count < 1:
        message = f"count must be at least 1, found {count}"
        raise ValueError(message)
    for path in _loaded_openblas():
        library = ctypes.CDLL(path)
        for spelling in _SPELLINGS:
            if hasattr(library, spelling.format("set")):
                before = int(getattr(library, spelling.format("get"))())
                getattr(library, spelling.format("set"))(ctypes.c_int(count))
                return before
    return None


def _loaded_openblas() -> list[str]:
    """Return the paths of the OpenBLAS libraries mapped into this process."""
    if not _MAPS.exists():
        return []
    lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    # address, permissions, offset, device, inode, path: the path may hold spaces.
    paths = {line.split(maxsplit=5)[5] for line in lines if "openblas" in line.rsplit("/", 1)[-1]}
    return sorted(paths)
