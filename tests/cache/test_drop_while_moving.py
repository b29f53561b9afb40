"""A block dropped while it is on its way stays dropped: in the index, in the events, on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kvx
from tests.cache.conftest import make_blocks, make_hashes, open_space

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_block_dropped_while_it_is_flushed_stays_away(
    open_cache: Callable[..., kvx.TieredCache],
) -> None:
    cache = open_cache()
    space = open_space(cache)
    for start in range(0, 200, 20):
        space.offload(make_hashes(20, first=start), make_blocks(20, first=start)).wait()
        assert space.drop(make_hashes(10, first=start)) > 0
    assert cache.flush(10.0)
    cache.close()
    reopened = open_space(open_cache())
    for start in range(0, 200, 20):
        assert reopened.match(make_hashes(1, first=start)).num_blocks == 0
        assert reopened.match(make_hashes(10, first=start + 10)).num_blocks == 10


def test_a_block_dropped_while_it_is_offloaded_is_not_announced(
    open_cache: Callable[..., kvx.TieredCache],
) -> None:
    cache = open_cache(has_nvme=False)
    space = open_space(cache)
    hashes, blocks = make_hashes(100), make_blocks(100)
    for _ in range(10):
        transfer = space.offload(hashes, blocks)
        space.drop(hashes)
        transfer.wait()
        held = {key.tobytes() for key in cache.snapshot()["dram"]}
        announced: set[bytes] = set()
        for event in cache.events.replay(1):
            assert isinstance(event, kvx.BlockStored | kvx.BlockRemoved)
            keys = {event.keys[at : at + 16] for at in range(0, len(event.keys), 16)}
            announced = announced | keys if isinstance(event, kvx.BlockStored) else announced - keys
        assert announced == held
        space.drop(hashes)
