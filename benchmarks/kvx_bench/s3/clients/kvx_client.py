"""kvx: a cache over DRAM and a bucket, its DRAM empty whenever something is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import kvx

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx_bench.s3.clients.client import Place

_DEADLINE_S = 120.0
_LOOK_UP_S = 30.0
_HASH_BYTES = 32


class KvxClient:
    """Groups of blocks as objects; every block verified twice on its way up."""

    description = "blocks offloaded, flushed, found and onboarded, each verified"

    def __init__(self, place: Place) -> None:
        """Open the cache; its memory is populated."""
        tiers: list[dict[str, object]] = [
            {"kind": "dram", "capacity": place.capacity_bytes, "prefault": "eager"}
        ]
        if place.folder:
            tiers.append(
                {"kind": "nvme", "path": place.folder, "capacity": 8 * place.capacity_bytes}
            )
        tiers.append(
            {
                "kind": "s3", "bucket": place.bucket, "endpoint": place.url,
                "region": place.region, "prefix": f"{place.prefix}/kvx",
                "max_in_flight": place.concurrency, "deadline_s": place.deadline_s,
                "max_pending": 4 * place.capacity_bytes,
            }
        )  # fmt: skip
        self.cache = kvx.TieredCache.open(
            {"tiers": tiers, "breaker": {"failures": place.breaker_failures}}
        )
        self.space = self.cache.namespace(
            model="bench", dtype="uint8", block_bytes=place.block_bytes
        )

    def prepare(self) -> None:
        """Empty everything but the bucket."""
        self.cache.clear()

    def put(self, prompt: int, source: npt.NDArray[np.uint8]) -> None:
        """Offload, and wait until the bucket has it."""
        hashes = hashes_of(prompt, len(source))
        result = self.space.offload(hashes, source, deadline_s=_DEADLINE_S).wait()
        assert result.num_blocks == len(source), "everything was taken"
        assert self.cache.flush(_DEADLINE_S), "everything was stored"

    def get(self, prompt: int, target: npt.NDArray[np.uint8]) -> None:
        """Look the prompt up, and onboard it."""
        hashes = hashes_of(prompt, len(target))
        found = self.space.match(hashes, wait_s=_LOOK_UP_S)
        assert found.num_blocks == len(target), f"{found} of {len(target)} blocks"
        result = self.space.onboard(hashes, target, deadline_s=_DEADLINE_S).wait()
        assert result.num_blocks == len(target), f"{result.num_blocks} of {len(target)} arrived"

    def close(self) -> None:
        """Close the cache."""
        self.cache.close(0.0)


def hashes_of(prompt: int, num_blocks: int) -> npt.NDArray[np.uint8]:
    """Return (num_blocks, 32) uint8: those of a longer prompt begin with those of a shorter one."""
    return np.random.default_rng(prompt).integers(0, 256, (num_blocks, _HASH_BYTES), dtype=np.uint8)
