"""Blocks to and from files, beside the same direct I/O without a cache."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

import kvx
from kvx_bench.aiofiles_peer import AiofilesPeer
from kvx_bench.copying import prefaulted
from kvx_bench.raw_file import DEPTH, RawFile
from kvx_bench.row import Row, paired, throughput_row, timed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx_bench.case import Options
    from kvx_bench.row import Sample

_SIZES = {"2MiB": 2 << 20, "16KiB": 16 << 10}
_DEADLINE_S = 300.0
_SPARE_BYTES = 256 << 20


class NvmeCase:
    """Put with flush, and get from a cache that was just opened: nothing is in its DRAM."""

    name = "nvme"
    description = "offload to and onboard from NVMe"

    def why_not(self, options: Options) -> str:
        """Say when the disk has too little room."""
        needed = 3 * _total_bytes(options) + _SPARE_BYTES
        free = shutil.disk_usage(options.path).free
        return "" if free > needed else f"{options.path} has {free} bytes free of {needed} needed"

    def run(self, options: Options) -> Iterator[Row]:
        """1024 x 2 MiB, and a quarter of the bytes in 16 KiB blocks."""
        total_bytes = _total_bytes(options)
        source = prefaulted(total_bytes, fill=5)
        source[::4096] = np.random.default_rng(3).integers(0, 256, len(source[::4096]), np.uint8)
        target = prefaulted(total_bytes, fill=0)
        for name, block_bytes in _SIZES.items():
            size_bytes = total_bytes if name == "2MiB" else total_bytes // 4
            bench = _Bench(
                options, name, source[:size_bytes].reshape(-1, block_bytes),
                target[:size_bytes].reshape(-1, block_bytes),
            )  # fmt: skip
            yield from bench.rows()


class _Bench:
    """One block size: a directory for the cache and a file for the raw loop."""

    def __init__(
        self,
        options: Options,
        name: str,
        source: npt.NDArray[np.uint8],
        target: npt.NDArray[np.uint8],
    ) -> None:
        self._options = options
        self._name = name
        self._source = source
        self._target = target
        self._path = options.path / f"tier-{name}"
        self._raw = RawFile(options.path / f"raw-{name}", source, target)
        self._hashes = np.random.default_rng(len(source)).integers(
            0, 256, (len(source), 32), dtype=np.uint8
        )

    def rows(self) -> Iterator[Row]:
        """Put, then get."""
        num_bytes = self._source.nbytes
        repeats = min(5, self._options.repeats)
        with self._open() as cache:
            space = self._space(cache)
            puts = paired(lambda: self._put(cache, space), self._raw.write, repeats=repeats)
            yield throughput_row(
                f"nvme.put.{self._name}", num_bytes, puts,
                note=f"until on disk; limit: {self._raw.tool}, depth {DEPTH}",
            )  # fmt: skip
        gets = paired(self._get_cold, self._raw.read, repeats=repeats)
        yield throughput_row(
            f"nvme.get-cold.{self._name}", num_bytes, gets,
            note=f"verified; limit: {self._raw.tool}, depth {DEPTH}",
        )  # fmt: skip
        assert (self._target == self._source).all(), "what came back is what went in"
        if find_spec("aiofiles"):
            yield from self._peer_rows(AiofilesPeer(self._path.with_suffix(".peer")))
        shutil.rmtree(self._path)
        self._raw.close()

    def _peer_rows(self, peer: AiofilesPeer) -> Iterator[Row]:
        num_bytes = self._source.nbytes
        puts = paired(lambda: peer.put(self._source), self._raw.write, repeats=1)
        yield throughput_row(
            f"nvme.put.{self._name}.aiofiles", num_bytes, puts, note="buffered, then fsync"
        )
        gets = paired(lambda: peer.get(self._target), self._raw.read, repeats=1)
        yield throughput_row(
            f"nvme.get-cold.{self._name}.aiofiles", num_bytes, gets, note="page cache dropped"
        )
        peer.close()

    def _open(self) -> kvx.TieredCache:
        return kvx.TieredCache.open(
            {
                "tiers": [
                    {"kind": "dram", "capacity": self._dram_bytes(), "prefault": "eager"},
                    {
                        "kind": "nvme",
                        "path": str(self._path),
                        "capacity": self._source.nbytes + _SPARE_BYTES,
                        "queue_depth": DEPTH,
                        "rewarm": False,
                    },
                ],
                "copy_threads": self._options.threads,
            }
        )

    def _dram_bytes(self) -> int:
        return max(64 << 20, self._source.nbytes // 4)

    def _space(self, cache: kvx.TieredCache) -> kvx.CacheSpace:
        return cache.namespace(model="bench", dtype="uint8", block_bytes=self._source.shape[1])

    def _put(self, cache: kvx.TieredCache, space: kvx.CacheSpace) -> Sample:
        cache.clear()
        cache.flush()

        def put() -> None:
            result = space.offload(self._hashes, self._source, deadline_s=_DEADLINE_S).wait()
            assert result.num_blocks == len(self._source), "everything was taken"
            assert cache.flush(_DEADLINE_S), "everything was written"

        return timed(put)

    def _get_cold(self) -> Sample:
        with self._open() as cache:
            space = self._space(cache)

            def get() -> None:
                result = space.onboard(self._hashes, self._target, deadline_s=_DEADLINE_S).wait()
                assert result.num_blocks == len(self._source), "everything is on disk"

            return timed(get)


def _total_bytes(options: Options) -> int:
    return (128 if options.is_quick else 1024) * _SIZES["2MiB"]
