"""The limit line of disk benchmarks: the same direct I/O by fio, or by plain threads without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kvx_bench.row import Sample, timed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

DEPTH = 32
_THREADS = 8


class RawFile:
    """A preallocated file that is written and read whole, block by block."""

    def __init__(
        self, path: Path, source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]
    ) -> None:
        """Make the file; (n, block_bytes) uint8 page-aligned source and target."""
        self._path = path
        self._source = source
        self._target = target
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, source.nbytes)
        self.tool = "fio" if shutil.which("fio") else "pwrite and pread threads (no fio here)"

    def write(self) -> Sample:
        """Write everything once."""
        if self.tool == "fio":
            return self._fio("write")
        return timed(lambda: self._each(self._write_block))

    def read(self) -> Sample:
        """Read everything once."""
        if self.tool == "fio":
            return self._fio("read")
        return timed(lambda: self._each(self._read_block))

    def close(self) -> None:
        """Remove the file."""
        os.close(self._fd)
        self._path.unlink()

    def _write_block(self, block: int) -> int:
        return os.pwritev(self._fd, [self._source[block]], block * self._source.shape[1])

    def _read_block(self, block: int) -> int:
        return os.preadv(self._fd, [self._target[block]], block * self._source.shape[1])

    def _each(self, move: Callable[[int], int]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            moved = sum(pool.map(move, range(len(self._source))))
        assert moved == self._source.nbytes, "direct I/O moves whole blocks"

    def _fio(self, operation: str) -> Sample:
        command = [
            "fio", "--name=raw", f"--filename={self._path}", f"--rw={operation}", "--direct=1",
            f"--bs={self._source.shape[1]}", f"--size={self._source.nbytes}",
            f"--iodepth={DEPTH}", "--ioengine=io_uring", "--output-format=json",
        ]  # fmt: skip
        report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        job = report["jobs"][0]
        wall_s = job[operation]["runtime"] / 1000
        return Sample(wall_s, wall_s * (job["usr_cpu"] + job["sys_cpu"]) / 100)
