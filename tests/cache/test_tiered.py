"""The verbs of the cache, on real memory and real files."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import kvx
from tests.cache.conftest import BLOCK_BYTES, Opener, make_blocks, make_hashes, open_space
from tests.cache.on_device import Gpu


def test_what_was_offloaded_comes_back(open_cache: Opener, gpu: Gpu | None) -> None:
    """The bytes, the count and the tier are right; the source may change afterwards."""
    space = open_space(open_cache(has_nvme=False))
    blocks = make_blocks(20)
    source = blocks.copy()
    stored = space.offload(make_hashes(20), source).wait()
    source[:] = 0
    assert stored.num_blocks == 20
    assert stored.bytes_done == 20 * BLOCK_BYTES
    target = np.zeros_like(blocks)
    found = space.onboard(make_hashes(20), target).wait()
    assert (target == blocks).all()
    assert (found.tiers == (kvx.TierKind.DRAM if gpu is None else kvx.TierKind.HBM)).all()
    assert found.prefix_blocks == 20


def test_hashes_may_be_a_list_of_bytes(open_cache: Opener) -> None:
    """Both spellings of a hash name the same block."""
    space = open_space(open_cache(has_nvme=False))
    hashes = make_hashes(3)
    space.offload([row.tobytes() for row in hashes], make_blocks(3)).wait()
    assert space.match(hashes).num_blocks == 3


def test_match_ends_at_the_first_missing_block(open_cache: Opener) -> None:
    """A prefix match stops where the prefix does, and says why."""
    space = open_space(open_cache(has_nvme=False, has_hbm=False))
    hashes = make_hashes(10)
    space.offload(np.delete(hashes, 6, axis=0), make_blocks(9)).wait()
    match = space.match(hashes)
    assert (match.num_blocks, match.reason) == (6, kvx.MissReason.NEVER_STORED)
    assert match.blocks_in(kvx.TierKind.DRAM) == 6


def test_blocks_are_located_one_by_one(open_cache: Opener) -> None:
    """Holes are no end to what is known, unlike for a match; the reason is that of the first."""
    space = open_space(open_cache(has_hbm=False))
    hashes = make_hashes(10)
    space.offload(np.delete(hashes, (3, 6), axis=0), make_blocks(8)).wait()
    space.drop(hashes[8:9])
    found = space.locate(hashes)
    held = found.tiers == kvx.TierKind.DRAM
    assert np.flatnonzero(~held).tolist() == [3, 6, 8]
    assert found.reason is kvx.MissReason.NEVER_STORED
    assert found.is_final
    rest = space.locate(hashes, first=7)
    assert (rest.tiers == found.tiers[7:]).all()
    assert rest.reason is kvx.MissReason.DROPPED
    assert space.locate(hashes, first=9).reason is kvx.MissReason.HIT


def test_a_partial_hit_fills_what_is_there_and_leaves_the_rest(open_cache: Opener) -> None:
    """Blocks that miss are not touched and carry their reason."""
    space = open_space(open_cache(has_nvme=False))
    space.offload(make_hashes(4), make_blocks(4)).wait()
    target = np.full((6, BLOCK_BYTES), 7, np.uint8)
    result = space.onboard(make_hashes(6), target).wait()
    assert (target[:4] == make_blocks(4)).all()
    assert (target[4:] == 7).all()
    assert result.reasons.tolist() == [0] * 4 + [kvx.MissReason.NEVER_STORED] * 2


def test_await_works(open_cache: Opener) -> None:
    """A transfer can be awaited, several at once."""
    space = open_space(open_cache())

    async def main() -> list[kvx.TransferResult]:
        return await asyncio.gather(
            *(
                _awaited(space.offload(make_hashes(8, first=i * 8), make_blocks(8, first=i * 8)))
                for i in range(4)
            )
        )

    async def _awaited(transfer: kvx.Transfer[kvx.TransferResult]) -> kvx.TransferResult:
        return await transfer

    assert [result.num_blocks for result in asyncio.run(main())] == [8, 8, 8, 8]
    assert space.match(make_hashes(32)).num_blocks == 32


def test_more_blocks_than_dram_go_through_to_nvme(open_cache: Opener) -> None:
    """4 MiB through 2 MiB of DRAM, and back again, from both tiers at once."""
    cache = open_cache()
    space = open_space(cache)
    hashes, blocks = make_hashes(256), make_blocks(256)
    assert space.offload(hashes, blocks).wait().num_blocks == 256
    assert cache.flush(10.0)
    match = space.match(hashes)
    assert match.num_blocks == 256
    assert 0 < match.blocks_in(kvx.TierKind.DRAM) <= 128
    target = np.zeros_like(blocks)
    result = space.onboard(hashes, target).wait()
    assert result.num_blocks == 256
    assert (target == blocks).all()
    assert {kvx.TierKind.DRAM, kvx.TierKind.NVME} >= set(result.tiers.tolist())
    cache.check_integrity()


def test_blocks_survive_a_restart(open_cache: Opener) -> None:
    """A second cache on the same directory serves what the first one stored."""
    first = open_cache()
    open_space(first).offload(make_hashes(50), make_blocks(50)).wait()
    assert first.close() == kvx.CloseReport(0, 0, 0)
    space = open_space(open_cache())
    target = np.zeros((50, BLOCK_BYTES), np.uint8)
    result = space.onboard(make_hashes(50), target).wait()
    assert (result.tiers == kvx.TierKind.NVME).all()
    assert (target == make_blocks(50)).all()


def test_restart_warms_dram_with_the_hottest(open_cache: Opener) -> None:
    """With re-warm on, DRAM is filled in the background, hottest blocks first."""
    first = open_cache()
    space = open_space(first)
    space.offload(make_hashes(256), make_blocks(256)).wait()
    first.flush()
    hot = make_hashes(20, first=100)
    for _ in range(5):
        space.onboard(hot, np.zeros((20, BLOCK_BYTES), np.uint8)).wait()
    first.close()
    second = open_cache(nvme={"rewarm": True})
    space = open_space(second)
    for _ in range(1000):
        if second.stats()["rewarm"]["is_done"]:
            break
        space.prefetch(hot[:1]).wait()
    assert second.stats()["rewarm"]["blocks_warmed"] > 0
    assert space.match(hot).blocks_in(kvx.TierKind.DRAM) == 20


def test_prefetch_moves_blocks_up(open_cache: Opener) -> None:
    """After a prefetch the blocks are in DRAM and can be leased."""
    open_space(first := open_cache()).offload(make_hashes(10), make_blocks(10)).wait()
    first.close()
    space = open_space(open_cache())
    with space.lease(make_hashes(10)) as lease:
        assert len(lease) == 0
    assert space.prefetch(make_hashes(10)).wait().num_blocks == 10
    assert space.match(make_hashes(10)).blocks_in(kvx.TierKind.DRAM) == 10


def test_lease_gives_views_that_stay(open_cache: Opener) -> None:
    """Leased blocks are not evicted by a flood of others."""
    space = open_space(open_cache(has_nvme=False))
    blocks = make_blocks(5)
    space.offload(make_hashes(5), blocks).wait()
    with space.lease(make_hashes(7)) as lease:
        assert len(lease) == 5
        for start in range(0, 400, 50):
            space.offload(make_hashes(50, first=1000 + start), make_blocks(50)).wait()
        lease.check()
        assert all((lease.view(i) == blocks[i]).all() for i in range(5))
        assert not lease.view(0).flags.writeable
    with pytest.raises(kvx.StaleReference):
        lease.view(0)


def test_pinned_blocks_stay_until_unpinned(open_cache: Opener) -> None:
    """Pins are counted and end with as many unpins."""
    space = open_space(open_cache(has_nvme=False))
    space.offload(make_hashes(5), make_blocks(5)).wait()
    assert space.pin(make_hashes(6)) == 5
    for start in range(0, 300, 50):
        space.offload(make_hashes(50, first=1000 + start), make_blocks(50)).wait()
    assert space.match(make_hashes(5)).num_blocks == 5
    assert space.unpin(make_hashes(5)) == 5
    assert space.unpin(make_hashes(5)) == 0
    for start in range(0, 300, 50):
        space.offload(make_hashes(50, first=2000 + start), make_blocks(50)).wait()
    assert space.match(make_hashes(5)).reason is kvx.MissReason.EVICTED


def test_dropped_blocks_stay_away_after_a_restart(open_cache: Opener) -> None:
    """What was dropped is gone from every tier, for good."""
    first = open_cache()
    space = open_space(first)
    space.offload(make_hashes(10), make_blocks(10)).wait()
    first.flush()
    assert space.drop(make_hashes(4)) == 4
    assert space.match(make_hashes(10)).reason is kvx.MissReason.DROPPED
    first.close()
    space = open_space(open_cache())
    assert space.match(make_hashes(10)).num_blocks == 0
    assert space.match(make_hashes(6, first=4)).num_blocks == 6


def test_clear_empties_every_tier(open_cache: Opener, gpu: Gpu | None) -> None:
    """Nothing is left, and the slots can be used again."""
    cache = open_cache()
    space = open_space(cache)
    space.offload(make_hashes(30), make_blocks(30)).wait()
    cache.flush()
    assert cache.clear() == (60 if gpu is None else 90)
    assert space.match(make_hashes(30)).num_blocks == 0
    assert space.offload(make_hashes(30), make_blocks(30)).wait().num_blocks == 30


def test_blocks_expire(open_cache: Opener) -> None:
    """After its time to live a block is a miss that says so."""
    now = [1_000_000.0]
    space = open_space(open_cache(has_nvme=False, clock=lambda: now[0]))
    space.offload(make_hashes(3), make_blocks(3), ttl_s=10).wait()
    assert space.match(make_hashes(3)).num_blocks == 3
    now[0] += 12
    match = space.match(make_hashes(3))
    assert (match.num_blocks, match.reason) == (0, kvx.MissReason.EXPIRED)


def test_sizes_and_namespaces_share_one_cache(open_cache: Opener) -> None:
    """Several block sizes live side by side and give each other memory."""
    cache = open_cache(
        dram={"capacity": "8MiB", "extent": "1MiB"},
        nvme={"capacity": "64MiB", "extent": "4MiB"},
    )
    sizes = [4096, 5000, 65536, 1 << 20]
    for size in sizes:
        space = open_space(cache, block_bytes=size)
        assert (
            space.offload(make_hashes(4), make_blocks(4, block_bytes=size)).wait().num_blocks == 4
        )
    for size in sizes:
        target = np.zeros((4, size), np.uint8)
        space = open_space(cache, block_bytes=size)
        assert space.onboard(make_hashes(4), target).wait().num_blocks == 4
        assert (target == make_blocks(4, block_bytes=size)).all()
    cache.check_integrity()


def test_another_salt_or_model_is_another_cache(open_cache: Opener) -> None:
    """The same hash in another namespace is a miss, and the reason names the difference."""
    cache = open_cache(has_nvme=False)
    open_space(cache, salt="a").offload(make_hashes(2), make_blocks(2)).wait()
    assert open_space(cache, salt="b").match(make_hashes(2)).reason is kvx.MissReason.SALT
    other = cache.namespace(model="other", dtype="float16", block_bytes=BLOCK_BYTES)
    assert other.match(make_hashes(2)).reason is kvx.MissReason.NAMESPACE_MISMATCH
    stranger = open_space(cache, tenant="stranger")
    assert stranger.match(make_hashes(2)).reason is kvx.MissReason.NEVER_STORED


def test_arguments_that_do_not_fit_are_refused(open_cache: Opener) -> None:
    """Nothing is done, and the message carries both numbers."""
    space = open_space(open_cache(has_nvme=False))
    with pytest.raises(kvx.UsageError, match=r"3 hashes but 2 blocks"):
        space.offload(make_hashes(3), make_blocks(2))
    with pytest.raises(kvx.UsageError, match="4096"):
        space.offload(make_hashes(2), make_blocks(2, block_bytes=4096))
    frozen = make_blocks(2)
    frozen.flags.writeable = False
    with pytest.raises(kvx.UsageError, match="read-only"):
        space.onboard(make_hashes(2), frozen)
    assert space.match(make_hashes(3)).num_blocks == 0


def test_a_closed_cache_says_so(open_cache: Opener) -> None:
    """Verbs of a closed cache raise instead of crashing."""
    cache = open_cache(has_nvme=False)
    space = open_space(cache)
    cache.close()
    with pytest.raises(kvx.KvxError, match="closed"):
        space.offload(make_hashes(1), make_blocks(1))
    with pytest.raises(kvx.UsageError, match="closed"):
        open_space(cache)


def test_write_back_waits_until_dram_needs_room(open_cache: Opener) -> None:
    """With write: back nothing is written before half of DRAM is dirty; close writes the rest."""
    cache = open_cache(nvme={"write": "back"})
    space = open_space(cache)
    space.offload(make_hashes(20), make_blocks(20)).wait()
    assert cache.stats()["dram"]["dirty"] == 20
    space.offload(make_hashes(100, first=100), make_blocks(100, first=100)).wait()
    assert cache.flush(10.0)
    assert cache.stats()["dram"]["dirty"] == 0
    space.offload(make_hashes(5, first=500), make_blocks(5, first=500)).wait()
    cache.close()
    assert open_space(open_cache()).match(make_hashes(5, first=500)).num_blocks == 5


def test_durability_each_ends_when_the_blocks_are_on_disk(open_cache: Opener) -> None:
    """When the transfer is done a new process would find the blocks."""
    cache = open_cache(nvme={"durability": "each"})
    space = open_space(cache)
    assert space.offload(make_hashes(40), make_blocks(40)).wait().num_blocks == 40
    assert cache.stats()["nvme"]["committed"] == 40
    assert space.offload(make_hashes(40), make_blocks(40)).wait().num_blocks == 40


def test_a_tenant_keeps_to_its_quota(open_cache: Opener) -> None:
    """A tenant at its quota evicts its own blocks, never those of others."""
    cache = open_cache(
        has_nvme=False, tenants=[{"name": "a", "salt": "s", "dram_quota": 10 * BLOCK_BYTES}]
    )
    other = open_space(cache, tenant="b")
    other.offload(make_hashes(50), make_blocks(50)).wait()
    space = open_space(cache, tenant="a")
    for start in range(0, 100, 5):
        space.offload(make_hashes(5, first=start), make_blocks(5, first=start)).wait()
    assert space.match(make_hashes(10, first=90)).num_blocks == 10
    assert space.match(make_hashes(1)).reason is kvx.MissReason.EVICTED
    assert other.match(make_hashes(50)).num_blocks == 50
    assert cache.stats()["dram"]["committed"] == 60


def test_an_expiry_survives_the_way_down_and_up_again(open_cache: Opener) -> None:
    """A block that expires does so in every tier, also after a restart and after a prefetch."""
    now = [1_000_000.0]
    first = open_cache(clock=lambda: now[0])
    space = open_space(first)
    space.offload(make_hashes(4), make_blocks(4), ttl_s=100).wait()
    space.offload(make_hashes(4, first=10), make_blocks(4, first=10)).wait()
    first.close()
    second = open_cache(clock=lambda: now[0])
    space = open_space(second)
    both = np.concatenate([make_hashes(4), make_hashes(4, first=10)])
    assert space.prefetch(both).wait().num_blocks == 8
    now[0] += 101
    assert space.match(make_hashes(4)).reason is kvx.MissReason.EXPIRED
    assert space.match(make_hashes(4, first=10)).num_blocks == 4


def test_the_thread_pool_takes_over_where_io_uring_is_not_wanted(open_cache: Opener) -> None:
    """The same verbs on the other backend."""
    first = open_cache(io_backend="posix")
    open_space(first).offload(make_hashes(200), make_blocks(200)).wait()
    first.close()
    target = np.zeros((200, BLOCK_BYTES), np.uint8)
    second = open_cache(io_backend="posix")
    assert open_space(second).onboard(make_hashes(200), target).wait().num_blocks == 200
    assert (target == make_blocks(200)).all()


def test_a_forgotten_cache_warns_and_closes(tmp_path: Path) -> None:
    """Dropping the last reference closes the cache, so that its directory can be opened again."""
    config = {
        "tiers": [
            {"kind": "dram", "capacity": "1MiB"},
            {"kind": "nvme", "path": str(tmp_path / "t"), "capacity": "8MiB", "extent": "1MiB"},
        ]
    }
    space = open_space(kvx.TieredCache.open(config))
    space.offload(make_hashes(3), make_blocks(3)).wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del space
        for _ in range(100):  # the reactor may still be about to forget the last transfer
            gc.collect()
            if caught:
                break
            time.sleep(0.01)
    assert "not closed" in str(caught[0].message)
    with kvx.TieredCache.open(config) as cache:
        assert open_space(cache).match(make_hashes(3)).num_blocks == 3


def test_more_dram_than_there_is_is_refused(open_cache: Opener) -> None:
    """Before anything is mapped, with both numbers."""
    with pytest.raises(kvx.CapacityError, match="lower its capacity") as caught:
        open_cache(has_nvme=False, dram={"capacity": "100TiB"})
    assert caught.value.needed_bytes == 100 << 40
    assert 0 < caught.value.available_bytes < 100 << 40
