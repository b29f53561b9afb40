"""Caches over a bucket in memory: each with DRAM of its own, as if on machines of their own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import kvx
from kvx.cache.assembly import FaultInjection
from tests.cache.conftest import BLOCK_BYTES
from tests.cache.s3.memory_store import Bucket, MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Opener = Callable[..., tuple[kvx.TieredCache, kvx.CacheSpace]]

WIDTH = 4


@pytest.fixture
def open_s3_cache(bucket: Bucket) -> Iterator[Opener]:
    """Open caches of 4 MiB DRAM over S3, and a namespace of 16 KiB blocks; 4 blocks an object."""
    with ExitStack() as opened:

        def opener(
            *, above: tuple[dict[str, object], ...] = (), dram: str = "4MiB", tenant: str = "a",
            breaker: dict[str, object] | None = None, **settings: object,
        ) -> tuple[kvx.TieredCache, kvx.CacheSpace]:  # fmt: skip
            tier = {"kind": "s3", "bucket": "b", "blocks_per_object": WIDTH, **settings}
            config = {
                "tiers": [{"kind": "dram", "capacity": dram}, *above, tier],
                "breaker": breaker or {"failures": 3, "reset_s": 0.05},
            }
            cache = kvx.TieredCache.open(config, faults=FaultInjection(bucket=MemoryStore(bucket)))
            opened.callback(cache.close, 2.0)
            space = cache.namespace(model="m", dtype="bf16", block_bytes=BLOCK_BYTES, tenant=tenant)
            return cache, space

        yield opener
