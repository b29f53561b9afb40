"""The S3 tier of a cache: what one stores another serves, verified, without a word between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.cache.s3.store import ObjectFault
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes
from tests.cache.s3.memory.conftest import WIDTH
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cache.s3.memory.conftest import Opener
    from tests.cache.s3.memory_store import Bucket

    Onboarding = tuple[kvx.Transfer[kvx.TransferResult], np.ndarray]


def store(cache: kvx.TieredCache, space: kvx.CacheSpace, count: int, first: int = 0) -> None:
    """Offload blocks of a prompt and wait until what makes whole groups is stored."""
    space.offload(make_hashes(count, first=first), make_blocks(count, first=first)).wait()
    assert cache.flush(10.0)


def bring(space: kvx.CacheSpace, count: int, first: int = 0) -> kvx.TransferResult:
    """Onboard blocks and look at every byte of what arrived."""
    target = np.zeros((count, BLOCK_BYTES), np.uint8)
    result = space.onboard(make_hashes(count, first=first), target).wait()
    arrived = result.reasons == kvx.MissReason.HIT
    assert (target[arrived] == make_blocks(count, first=first)[arrived]).all()
    return result


def test_another_cache_finds_and_brings_what_was_stored(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 18)
    assert len(bucket.names()) == 4, "the tail of 2 stays local"
    assert all(name.startswith("kvx/v1/") for name in bucket.names())

    theirs, other = open_s3_cache()
    match = other.match(make_hashes(18), wait_s=5.0)
    assert match.is_final
    assert match.num_blocks == 16
    assert match.blocks_in(kvx.TierKind.S3) == 16
    assert match.reason is kvx.MissReason.NEVER_STORED
    result = bring(other, 18)
    assert result.num_blocks == 16
    assert (result.tiers[:16] == kvx.TierKind.S3).all()
    assert (result.reasons[16:] == kvx.MissReason.NEVER_STORED).all()
    assert (bring(other, 16).tiers == kvx.TierKind.DRAM).all(), "from now on they are here"
    assert 'kvx_blocks_total{verb="onboard",tier="s3"} 16' in theirs.metrics.render()
    theirs.check_integrity()


def test_a_match_does_not_wait_unless_it_is_asked_to(bucket: Bucket, open_s3_cache: Opener) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 8)
    _, other = open_s3_cache()
    bucket.latency_s = 0.02
    first = other.match(make_hashes(8))
    assert (first.num_blocks, first.is_final) == (0, False)
    assert eventually(lambda: other.match(make_hashes(8)).num_blocks == 8)
    assert other.match(make_hashes(8)).is_final


def test_an_unknown_prompt_takes_one_look_and_is_remembered(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    _, space = open_s3_cache()
    assert space.match(make_hashes(64), wait_s=5.0).num_blocks == 0
    asked = bucket.calls["head"]
    assert asked <= 4
    for _ in range(5):
        assert space.match(make_hashes(64), wait_s=5.0).is_final
    assert bucket.calls["head"] == asked


def test_groups_go_on_across_offloads(bucket: Bucket, open_s3_cache: Opener) -> None:
    cache, space = open_s3_cache()
    hashes, blocks = make_hashes(16), make_blocks(16)
    for begin, end in ((0, 3), (3, 6), (6, 13), (13, 16)):
        space.offload(
            hashes[begin:end], blocks[begin:end], prefix=hashes[:begin]
        ).wait()  # fmt: skip
    assert cache.flush(10.0)
    assert len(bucket.names()) == 4
    _, other = open_s3_cache()
    assert other.match(hashes, wait_s=5.0).num_blocks == 16
    assert bring(other, 16).num_blocks == 16


def test_a_prefetch_looks_for_objects_by_itself(bucket: Bucket, open_s3_cache: Opener) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 8)
    _, other = open_s3_cache()
    bucket.latency_s = 0.01
    assert other.prefetch(make_hashes(11)).wait().num_blocks == 8
    assert (bring(other, 8).tiers == kvx.TierKind.DRAM).all()


def test_tenants_share_nothing(open_s3_cache: Opener) -> None:
    cache, space = open_s3_cache()
    store(cache, space, 8)
    _, stranger = open_s3_cache(tenant="b")
    assert stranger.match(make_hashes(8), wait_s=5.0).num_blocks == 0
    assert bring(stranger, 8).num_blocks == 0


def test_a_damaged_object_is_a_miss_and_deleted_the_second_time(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 4)
    name = bucket.names()[0]
    bucket.alter(name, 128 + 64 + 100)
    cache, other = open_s3_cache(absent_s=0.0)
    for _ in range(2):
        assert name in bucket.names()
        assert other.match(make_hashes(4), wait_s=5.0).num_blocks == 4
        result = bring(other, 4)
        assert result.reasons[0] == kvx.MissReason.CORRUPT
        assert result.num_blocks == 3, "the others of the object are whole"
        cache.clear()
    assert eventually(lambda: name not in bucket.names())
    # Stored again, it is good again.
    store(cache, other, 4)
    assert name in bucket.names()
    assert 'kvx_corrupt_blocks_total{tier="s3"} 2' in cache.metrics.render()


def test_only_the_newest_damaged_objects_are_remembered(
    bucket: Bucket, open_s3_cache: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvx.cache.s3.reads._SUSPECTS_MAX", 2)
    ours, space = open_s3_cache()
    names = []
    for first in (0, 100, 200):
        store(ours, space, 4, first)
        names += [name for name in bucket.names() if name not in names]
        bucket.alter(names[-1], 128 + 64 + 100)
    cache, other = open_s3_cache(absent_s=0.0)
    # The first one is forgotten when the third is met, and takes the place of the second.
    for first in (0, 100, 200, 0, 200):
        assert other.match(make_hashes(4, first=first), wait_s=5.0).num_blocks == 4
        assert bring(other, 4, first).reasons[0] == kvx.MissReason.CORRUPT
        cache.clear()
    assert eventually(lambda: names[2] not in bucket.names())
    assert bucket.names() == sorted(names[:2])


def test_an_object_that_was_deleted_meanwhile_is_a_miss(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 8)
    _, other = open_s3_cache()
    assert other.match(make_hashes(8), wait_s=5.0).num_blocks == 8
    del bucket.objects[bucket.names()[0]]
    assert bring(other, 8).num_blocks == 4


def test_a_frozen_service_ends_by_its_deadline_and_serving_goes_on(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 8)
    cache, other = open_s3_cache(deadline_s=0.2, breaker={"failures": 1, "reset_s": 60.0})
    assert other.match(make_hashes(8), wait_s=5.0).num_blocks == 8
    other.offload(make_hashes(4, first=100), make_blocks(4, first=100)).wait()
    bucket.is_frozen = True
    result = bring(other, 8)
    assert (result.reasons == kvx.MissReason.DEADLINE).all()
    assert bring(other, 4, first=100).num_blocks == 4
    # The breaker leaves it alone now, and says so.
    match = other.match(make_hashes(8))
    assert (match.num_blocks, match.reason) == (0, kvx.MissReason.TIER_DOWN)
    result = bring(other, 8)
    assert (result.reasons == kvx.MissReason.TIER_DOWN).all()
    bucket.is_frozen = False
    cache.check_integrity()


def test_a_deadline_of_the_caller_leaves_nothing_behind(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 8)
    cache, other = open_s3_cache()
    assert other.match(make_hashes(8), wait_s=5.0).num_blocks == 8
    bucket.latency_s = 0.3
    target = np.zeros((8, BLOCK_BYTES), np.uint8)
    transfer = other.onboard(make_hashes(8), target, deadline_s=0.05)
    with pytest.raises(kvx.TransferTimeout):
        transfer.wait()
    assert transfer.wait_quiesced(5.0)
    assert not target.any()
    assert eventually(lambda: cache.stats()["dram"]["reserved"] == 0)
    bucket.latency_s = 0.0
    assert bring(other, 8).num_blocks == 8


def begin_frozen(bucket: Bucket, space: kvx.CacheSpace, count: int) -> Onboarding:
    """Begin to onboard blocks that only the bucket has, which answers nothing."""
    assert space.match(make_hashes(count), wait_s=5.0).num_blocks == count
    bucket.is_frozen = True
    target = np.zeros((count, BLOCK_BYTES), np.uint8)
    return space.onboard(make_hashes(count), target), target


def thaw(bucket: Bucket, onboarding: Onboarding) -> None:
    """Let the bucket answer, and look at every byte that comes."""
    bucket.is_frozen = False
    transfer, target = onboarding
    assert transfer.wait().num_blocks == len(target)
    assert (target == make_blocks(len(target))).all()


def test_of_many_blocks_the_first_comes_before_all_others(
    bucket: Bucket, open_s3_cache: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvx.cache.s3.fetching._ALONE_BYTES", 8 * BLOCK_BYTES)
    monkeypatch.setattr("kvx.cache.s3.fetching._ALONE_S", 60.0)
    ours, space = open_s3_cache()
    store(ours, space, 32)
    _, other = open_s3_cache()
    onboarding = begin_frozen(bucket, other, 32)
    assert eventually(lambda: bucket.calls["get"] > 0)
    assert not onboarding[0].wait_finished(0.05)
    assert bucket.calls["get"] == 1
    thaw(bucket, onboarding)


def test_a_first_block_that_takes_long_is_not_waited_for(
    bucket: Bucket, open_s3_cache: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvx.cache.s3.fetching._ALONE_BYTES", 8 * BLOCK_BYTES)
    ours, space = open_s3_cache()
    store(ours, space, 32)
    _, other = open_s3_cache()
    onboarding = begin_frozen(bucket, other, 32)
    assert eventually(lambda: bucket.calls["get"] == 9), "the first, and the rest of 8 objects"
    thaw(bucket, onboarding)


def test_reads_begin_without_waiting_for_those_before(
    bucket: Bucket, open_s3_cache: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows of the operation end within objects, but reads do not.
    monkeypatch.setattr("kvx.cache.onboard._WINDOW_BYTES", 6 * BLOCK_BYTES)
    ours, space = open_s3_cache()
    store(ours, space, 48)
    _, other = open_s3_cache(max_in_flight=10)
    onboarding = begin_frozen(bucket, other, 48)
    assert eventually(lambda: bucket.calls["get"] == 10)
    thaw(bucket, onboarding)
    assert bucket.calls["get"] == 12, "one an object"


def test_reads_under_way_leave_half_of_the_room_to_others(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 48)
    cache, other = open_s3_cache(dram="512KiB")
    onboarding = begin_frozen(bucket, other, 48)
    assert eventually(lambda: bucket.calls["get"] == 4)
    assert not onboarding[0].wait_finished(0.05)
    assert cache.stats()["dram"]["reserved"] == 16, "of 32 slots"
    thaw(bucket, onboarding)
    cache.check_integrity()


def test_a_read_that_finds_little_room_is_a_small_one(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    ours, space = open_s3_cache()
    cache, other = open_s3_cache(dram=str(22 * BLOCK_BYTES))
    counts = {0: 12, 100: 8, 200: 8}  # by their first blocks; the last finds two slots
    for first, count in counts.items():
        store(ours, space, count, first)
        assert other.match(make_hashes(count, first=first), wait_s=5.0).num_blocks == count
    bucket.is_frozen = True
    transfers = []
    for first, count in counts.items():
        target = np.zeros((count, BLOCK_BYTES), np.uint8)
        transfers.append((other.onboard(make_hashes(count, first=first), target), target, first))
    assert eventually(lambda: cache.stats()["dram"]["reserved"] == 22)
    bucket.is_frozen = False
    for transfer, target, first in transfers:
        assert transfer.wait().num_blocks == len(target)
        assert (target == make_blocks(len(target), first=first)).all()
    cache.check_integrity()


def test_closing_ends_what_is_under_way(bucket: Bucket, open_s3_cache: Opener) -> None:
    ours, space = open_s3_cache()
    store(ours, space, 8)
    cache, other = open_s3_cache(deadline_s=60.0)
    assert other.match(make_hashes(8), wait_s=5.0).num_blocks == 8
    bucket.is_frozen = True
    target = np.zeros((8, BLOCK_BYTES), np.uint8)
    transfer = other.onboard(make_hashes(8), target, deadline_s=60.0)
    other.offload(make_hashes(4, first=50), make_blocks(4, first=50)).wait()
    report = cache.close(1.0)
    assert report.unstored_blocks == 4
    with pytest.raises(kvx.TransferCancelled):
        transfer.wait(5.0)
    assert not target.any()
    bucket.is_frozen = False


def test_what_left_dram_is_read_back_from_nvme_to_be_stored(
    open_s3_cache: Opener, tmp_path: Path
) -> None:
    nvme = {"kind": "nvme", "path": str(tmp_path), "capacity": "16MiB"}
    cache, space = open_s3_cache(above=(nvme,), dram="1MiB")
    hashes, blocks = make_hashes(48), make_blocks(48)
    space.offload(hashes[:3], blocks[:3]).wait()
    space.offload(make_hashes(100, first=1000), make_blocks(100, first=1000)).wait()
    assert cache.flush(10.0)
    assert space.match(hashes[:3]).blocks_in(kvx.TierKind.NVME) == 3
    space.offload(hashes[3:4], blocks[3:4], prefix=hashes[:3]).wait()
    assert cache.flush(10.0)
    _, other = open_s3_cache()
    assert other.match(hashes[:4], wait_s=5.0).num_blocks == WIDTH


def test_capacity_is_kept_by_deleting_the_coldest(bucket: Bucket, open_s3_cache: Opener) -> None:
    cache, space = open_s3_cache(capacity=6 * (WIDTH * BLOCK_BYTES + 1024))
    store(cache, space, 10 * WIDTH)
    assert eventually(lambda: len(bucket.names()) <= 6)
    assert eventually(lambda: cache.stats()["s3"]["used_bytes"] <= 6 * (WIDTH * BLOCK_BYTES + 1024))


def test_drop_deletes_objects(bucket: Bucket, open_s3_cache: Opener) -> None:
    cache, space = open_s3_cache()
    store(cache, space, 8)
    assert space.drop(make_hashes(1)) == 1
    assert eventually(lambda: len(bucket.names()) == 1)
    _, other = open_s3_cache()
    assert other.match(make_hashes(8), wait_s=5.0).num_blocks == 0


def test_a_failing_service_costs_nothing_but_misses(bucket: Bucket, open_s3_cache: Opener) -> None:
    cache, space = open_s3_cache()
    bucket.fault = lambda _verb, _name: ObjectFault.SERVER
    store(cache, space, 16)
    assert not bucket.names()
    assert bring(space, 16).num_blocks == 16
    bucket.fault = lambda _verb, _name: None
    # One call at a time is let through until one succeeds.
    assert eventually(
        lambda: (
            space.match(make_hashes(8, first=500), wait_s=1.0).is_final
            and cache.stats()["s3"]["breaker"] == "closed"
        )
    )
    cache.clear()
    store(cache, space, 16)
    assert len(bucket.names()) == 4
