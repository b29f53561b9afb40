"""Blocks into and out of the DRAM tier, checksums on, beside a plain streaming copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import kvx
from kvx_bench.copying import prefaulted, streaming_copy
from kvx_bench.row import Row, paired, throughput_row, timed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx_bench.case import Options
    from kvx_bench.row import Sample

_SIZES = {"2MiB": 2 << 20, "64KiB": 64 << 10, "4KiB": 4 << 10}
_SLACK_BYTES = 64 << 20
_DEADLINE_S = 60.0


class DramCase:
    """Put and get of whole batches between prefaulted memory and a prefaulted tier."""

    name = "dram"
    description = "offload to and onboard from DRAM"

    def why_not(self, _options: Options) -> str:
        """It runs everywhere."""
        return ""

    def run(self, options: Options) -> Iterator[Row]:
        """512 x 2 MiB, and as many bytes of smaller blocks."""
        total_bytes = (64 if options.is_quick else 512) * _SIZES["2MiB"]
        source = prefaulted(total_bytes, fill=3)
        target = prefaulted(total_bytes, fill=0)
        limit_target = prefaulted(total_bytes, fill=0)
        for name, block_bytes in _SIZES.items():
            size_bytes = total_bytes if name != "4KiB" else total_bytes // 4
            bench = _Bench(
                source[:size_bytes], target[:size_bytes], limit_target[:size_bytes], block_bytes,
                options,
            )  # fmt: skip
            yield from bench.rows(name)


class _Bench:
    """One block size: a cache, its source and its target."""

    def __init__(
        self,
        source: npt.NDArray[np.uint8],
        target: npt.NDArray[np.uint8],
        limit_target: npt.NDArray[np.uint8],
        block_bytes: int,
        options: Options,
    ) -> None:
        self._source = source.reshape(-1, block_bytes)
        self._target = target.reshape(-1, block_bytes)
        self._limit_target = limit_target
        self._options = options
        count = len(self._source)
        self._hashes = np.random.default_rng(block_bytes).integers(
            0, 256, (count, 32), dtype=np.uint8
        )

    def rows(self, name: str) -> Iterator[Row]:
        """Warm put and get against the copy, then the first put against the warm one."""
        num_bytes = self._source.nbytes
        repeats = self._options.repeats
        with self._open() as cache:
            space = self._space(cache)
            puts = paired(lambda: self._put(cache, space), self._copy, repeats=repeats)
            yield throughput_row(f"dram.put.{name}", num_bytes, puts)
            gets = paired(lambda: self._get(space), self._copy, repeats=repeats)
            yield throughput_row(f"dram.get.{name}", num_bytes, gets)
            assert (self._target == self._source).all(), "what came back is what went in"
            if name == "2MiB":
                yield self._first_put(name, cache, space)

    def _first_put(self, name: str, warm: kvx.TieredCache, space: kvx.CacheSpace) -> Row:
        def first() -> Sample:
            with self._open() as fresh:
                fresh_space = self._space(fresh)
                return timed(lambda: self._offload(fresh_space))

        pairs = paired(first, lambda: self._put(warm, space), repeats=3)
        return throughput_row(
            f"dram.put-first.{name}", self._source.nbytes, pairs,
            note="into a tier just opened and prefaulted; limit: the warm put",
        )  # fmt: skip

    def _open(self) -> kvx.TieredCache:
        return kvx.TieredCache.open(
            {
                "tiers": [
                    {
                        "kind": "dram",
                        "capacity": self._source.nbytes + _SLACK_BYTES,
                        "prefault": "eager",
                    }
                ],
                "copy_threads": self._options.threads,
            }
        )

    def _space(self, cache: kvx.TieredCache) -> kvx.CacheSpace:
        return cache.namespace(model="bench", dtype="uint8", block_bytes=self._source.shape[1])

    def _put(self, cache: kvx.TieredCache, space: kvx.CacheSpace) -> Sample:
        cache.clear()
        return timed(lambda: self._offload(space))

    def _offload(self, space: kvx.CacheSpace) -> None:
        result = space.offload(self._hashes, self._source, deadline_s=_DEADLINE_S).wait()
        assert result.num_blocks == len(self._source), "everything fits"

    def _get(self, space: kvx.CacheSpace) -> Sample:
        def onboard() -> None:
            result = space.onboard(self._hashes, self._target, deadline_s=_DEADLINE_S).wait()
            assert result.num_blocks == len(self._source), "everything is there"

        return timed(onboard)

    def _copy(self) -> Sample:
        flat = self._source.reshape(-1)
        return timed(lambda: streaming_copy(self._limit_target, flat, self._options.threads))
