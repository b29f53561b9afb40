"""What a Python service would write without kvx: blocks through aiofiles, no checksums."""

from __future__ import annotations

import asyncio
import os
from importlib import import_module
from typing import TYPE_CHECKING

from kvx_bench.row import Sample, timed

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

_TASKS = 8


class AiofilesPeer:
    """One file, written and read block by block by a few tasks."""

    def __init__(self, path: Path) -> None:
        """Use a file that does not exist yet."""
        self._path = path
        self._open = import_module("aiofiles").open
        path.touch(mode=0o600)

    def put(self, source: npt.NDArray[np.uint8]) -> Sample:
        """Write (n, block_bytes) uint8 and sync."""

        async def share(first: int) -> None:
            async with self._open(self._path, "r+b", buffering=0) as file:
                for row in range(first, len(source), _TASKS):
                    await file.seek(row * source.shape[1])
                    await file.write(source[row].data)

        async def everything() -> None:
            await asyncio.gather(*(share(first) for first in range(_TASKS)))

        def work() -> None:
            asyncio.run(everything())
            self._sync()

        return timed(work)

    def get(self, target: npt.NDArray[np.uint8]) -> Sample:
        """Read (n, block_bytes) uint8 that are not in the page cache."""
        self._sync(is_dropped=True)

        async def share(first: int) -> None:
            async with self._open(self._path, "rb", buffering=0) as file:
                for row in range(first, len(target), _TASKS):
                    await file.seek(row * target.shape[1])
                    await file.readinto(target[row].data)

        async def everything() -> None:
            await asyncio.gather(*(share(first) for first in range(_TASKS)))

        return timed(lambda: asyncio.run(everything()))

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink()

    def _sync(self, *, is_dropped: bool = False) -> None:
        fd = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(fd)
            if is_dropped:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
