"""Small caches for tests, and blocks whose bytes tell which block they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.cache.assembly import FaultInjection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

BLOCK_BYTES = 16 << 10

Opener = Callable[..., kvx.TieredCache]


def make_hashes(count: int, *, first: int = 0) -> npt.NDArray[np.uint8]:
    """Return (count, 32) uint8 hashes, different for different numbers."""
    numbers = np.arange(first, first + count, dtype=np.uint64)
    hashes = np.zeros((count, 4), np.uint64)
    hashes[:, 0] = numbers * np.uint64(0x9E3779B97F4A7C15)
    hashes[:, 3] = numbers
    return hashes.view(np.uint8)


def make_blocks(
    count: int, *, first: int = 0, block_bytes: int = BLOCK_BYTES
) -> npt.NDArray[np.uint8]:
    """Return (count, block_bytes) uint8 blocks; number `first + i` always has the same bytes."""
    blocks = np.empty((count, block_bytes), np.uint8)
    for row in range(count):
        blocks[row] = np.random.default_rng(first + row).integers(0, 256, block_bytes, np.uint8)
    return blocks


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[Opener]:
    """Open caches of 2 MiB DRAM, over NVMe unless `has_nvme` is False; closed after the test."""
    opened: list[kvx.TieredCache] = []

    def opener(
        *,
        has_nvme: bool = True,
        dram: dict[str, object] | None = None,
        nvme: dict[str, object] | None = None,
        faults: FaultInjection | None = None,
        clock: Callable[[], float] = time.time,
        **settings: object,
    ) -> kvx.TieredCache:
        tiers: list[dict[str, object]] = [{"kind": "dram", "capacity": "2MiB", **(dram or {})}]
        if has_nvme:
            tier = {
                "kind": "nvme",
                "path": str(tmp_path / "tier"),
                "capacity": "16MiB",
                "extent": "4MiB",
                "durability": "none",
                "rewarm": False,
            }
            tiers.append({**tier, **(nvme or {})})
        cache = kvx.TieredCache.open({"tiers": tiers, **settings}, faults=faults, clock=clock)
        opened.append(cache)
        return cache

    yield opener
    for cache in opened:
        cache.close(timeout_s=2.0)


def open_space(
    cache: kvx.TieredCache, *, block_bytes: int = BLOCK_BYTES, tenant: str = "", **facts: object
) -> kvx.CacheSpace:
    """Open a namespace of a test model."""
    return cache.namespace(
        model="test", dtype="float16", block_bytes=block_bytes, tenant=tenant, **facts
    )
