"""Every cause of a miss, a hundred times: at least 99 are named right, and the metrics agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.errors import TransferCancelled, TransferTimeout
from tests.cache.conftest import BLOCK_BYTES, Opener, make_blocks, make_hashes, open_space
from tests.cache.faults import DRAM_BLOCKS, flood, injected, onboard, put_on_nvme, sample

if TYPE_CHECKING:
    import numpy.typing as npt

COUNT = 100
HASHES = make_hashes(COUNT)
BLOCKS = make_blocks(COUNT)
RIGHT_MIN = 99


def expect(
    cache: kvx.TieredCache, verb: str, reasons: npt.NDArray[np.uint8], wanted: kvx.MissReason
) -> None:
    """Require the reason of at least 99 of 100, and as many in the metrics."""
    right = int((reasons == wanted).sum())
    assert len(reasons) == COUNT
    assert right >= RIGHT_MIN, [kvx.MissReason(int(one)).name for one in np.unique(reasons)]
    name = wanted.name.lower()
    assert sample(cache, "kvx_misses_total", verb=verb, reason=name) == right


def expect_of_match(cache: kvx.TieredCache, space: kvx.CacheSpace, wanted: kvx.MissReason) -> None:
    """Match every block on its own and judge the reasons."""
    found = [space.match(HASHES[row : row + 1]) for row in range(COUNT)]
    assert all(match.num_blocks == 0 for match in found)
    expect(cache, "match", np.array([match.reason for match in found], np.uint8), wanted)


def expect_of_both(cache: kvx.TieredCache, space: kvx.CacheSpace, wanted: kvx.MissReason) -> None:
    """Judge what match says, and what onboard says."""
    expect_of_match(cache, space, wanted)
    expect(cache, "onboard", onboard(space, HASHES).reasons, wanted)


@pytest.mark.parametrize("has_nvme", [False, True])
def test_never_stored(open_cache: Opener, has_nvme: bool) -> None:
    space = open_space(cache := open_cache(has_nvme=has_nvme))
    expect_of_both(cache, space, kvx.MissReason.NEVER_STORED)


def test_evicted(open_cache: Opener) -> None:
    space = open_space(cache := open_cache(has_nvme=False))
    space.offload(HASHES, BLOCKS).wait()
    flood(space)
    expect_of_both(cache, space, kvx.MissReason.EVICTED)


def test_evicted_from_both_tiers(open_cache: Opener) -> None:
    cache = open_cache(nvme={"capacity": "4MiB", "extent": "1MiB", "eviction": "lru"})
    space = open_space(cache)
    space.offload(HASHES, BLOCKS).wait()
    cache.flush()
    flood(space, 512)
    cache.flush()
    expect_of_both(cache, space, kvx.MissReason.EVICTED)


@pytest.mark.parametrize("has_nvme", [False, True])
def test_expired(open_cache: Opener, has_nvme: bool) -> None:
    now = [1_000_000.0]
    space = open_space(cache := open_cache(has_nvme=has_nvme, clock=lambda: now[0]))
    space.offload(HASHES, BLOCKS, ttl_s=5).wait()
    cache.flush()
    now[0] += 7
    expect_of_both(cache, space, kvx.MissReason.EXPIRED)


@pytest.mark.parametrize("has_nvme", [False, True])
@pytest.mark.parametrize("verb", ["drop", "clear"])
def test_dropped(open_cache: Opener, has_nvme: bool, verb: str) -> None:
    space = open_space(cache := open_cache(has_nvme=has_nvme))
    space.offload(HASHES, BLOCKS).wait()
    cache.flush()
    assert (space.drop(HASHES) if verb == "drop" else cache.clear()) >= COUNT
    expect_of_both(cache, space, kvx.MissReason.DROPPED)


def test_admission_rejected(open_cache: Opener) -> None:
    space = open_space(cache := open_cache(nvme={"admission": {"min_frequency": 2}}))
    space.offload(HASHES, BLOCKS).wait()
    cache.flush()
    flood(space)
    cache.flush()
    assert sample(cache, "kvx_flushed_blocks_total", outcome="admission_rejected") >= COUNT
    expect_of_both(cache, space, kvx.MissReason.ADMISSION_REJECTED)


def test_what_is_accepted_later_is_not_called_rejected(open_cache: Opener) -> None:
    space = open_space(cache := open_cache(nvme={"admission": {"min_frequency": 2}}))
    for _ in range(2):
        space.offload(HASHES, BLOCKS).wait()
        cache.flush()
        flood(space)
    assert space.match(HASHES).blocks_in(kvx.TierKind.NVME) == COUNT
    assert cache._shared.nvme is not None
    nvme = cache._shared.nvme
    assert nvme is not None
    cache._shared.remove(  # as an eviction does, which cannot be aimed
        nvme.pool_for(BLOCK_BYTES),
        kvx.TierKind.NVME,
        space.namespace.keys(HASHES),
        kvx.MissReason.EVICTED,
    )
    expect_of_both(cache, space, kvx.MissReason.EVICTED)


def test_namespace_mismatch(open_cache: Opener) -> None:
    open_space(cache := open_cache(has_nvme=False)).offload(HASHES, BLOCKS).wait()
    other = cache.namespace(model="other", dtype="float16", block_bytes=BLOCK_BYTES)
    expect_of_both(cache, other, kvx.MissReason.NAMESPACE_MISMATCH)


def test_salt(open_cache: Opener) -> None:
    cache = open_cache(has_nvme=False)
    open_space(cache, salt="a").offload(HASHES, BLOCKS).wait()
    expect_of_both(cache, open_space(cache, salt="b"), kvx.MissReason.SALT)


def test_corrupt_on_nvme(open_cache: Opener) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "flip", seed=1)
    expect(cache, "onboard", onboard(space, HASHES).reasons, kvx.MissReason.CORRUPT)
    expect_of_match(cache, space, kvx.MissReason.CORRUPT)
    assert sample(cache, "kvx_corrupt_blocks_total", tier="nvme") == COUNT


def test_corrupt_in_dram(open_cache: Opener) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(has_nvme=False, has_hbm=False, faults=faults))
    space.offload(HASHES, BLOCKS).wait()
    failpoints.set("copy", "flip", seed=1)
    expect(cache, "onboard", onboard(space, HASHES).reasons, kvx.MissReason.CORRUPT)
    expect_of_match(cache, space, kvx.MissReason.CORRUPT)
    assert sample(cache, "kvx_corrupt_blocks_total", tier="dram") == COUNT


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (kvx.MissReason.DEADLINE, TransferTimeout),
        (kvx.MissReason.CANCELLED, TransferCancelled),
    ],
)
def test_deadline_and_cancel(
    open_cache: Opener, wanted: kvx.MissReason, error: type[Exception]
) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker={"failures": 1000}))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "hang")
    is_cancel = wanted is kvx.MissReason.CANCELLED
    targets = np.zeros((COUNT, 1, BLOCK_BYTES), np.uint8)
    transfers = [
        space.onboard(HASHES[i : i + 1], targets[i], deadline_s=10.0 if is_cancel else 0.1)
        for i in range(COUNT)
    ]
    reasons = []
    for transfer in transfers:
        assert not is_cancel or transfer.cancel()
        with pytest.raises(error):
            transfer.wait()
        assert transfer.result is not None
        reasons.append(transfer.result.reasons)
    failpoints.clear()
    expect(cache, "onboard", np.concatenate(reasons), wanted)


def test_tier_down(open_cache: Opener) -> None:
    failpoints, faults = injected()
    breaker = {"failures": 1, "reset_s": 60.0}
    space = open_space(cache := open_cache(faults=faults, breaker=breaker))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "eio")
    expect(cache, "onboard", onboard(space, HASHES).reasons, kvx.MissReason.TIER_DOWN)
    failpoints.clear()
    expect_of_match(cache, space, kvx.MissReason.TIER_DOWN)


def test_evicted_because_nvme_was_down(open_cache: Opener) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults))
    failpoints.set("write", "eio")
    space.offload(HASHES, BLOCKS).wait()
    cache.flush()
    flood(space)
    expect_of_both(cache, space, kvx.MissReason.TIER_DOWN)


def test_quota(open_cache: Opener) -> None:
    tenant = {"name": "small", "dram_quota_bytes": 10 * BLOCK_BYTES}
    cache = open_cache(has_nvme=False, tenants=[tenant])
    space = open_space(cache, tenant="small")
    held = make_hashes(10, first=500)
    space.offload(held, make_blocks(10)).wait()
    assert space.pin(held) == 10
    expect(cache, "offload", space.offload(HASHES, BLOCKS).wait().reasons, kvx.MissReason.QUOTA)
    assert space.unpin(held) == 10


def test_no_room(open_cache: Opener) -> None:
    space = open_space(cache := open_cache(has_nvme=False))
    held = make_hashes(DRAM_BLOCKS, first=500)
    space.offload(held, make_blocks(DRAM_BLOCKS)).wait()
    assert space.pin(held) == DRAM_BLOCKS
    expect(cache, "offload", space.offload(HASHES, BLOCKS).wait().reasons, kvx.MissReason.NO_ROOM)
    assert space.unpin(held) == DRAM_BLOCKS


def test_no_room_for_what_comes_from_nvme(open_cache: Opener) -> None:
    """The transfer runs into its deadline, but the deadline is not what has to be raised."""
    space = open_space(cache := open_cache())
    put_on_nvme(cache, space, COUNT)
    held = make_hashes(DRAM_BLOCKS, first=5000)
    space.offload(held, make_blocks(DRAM_BLOCKS)).wait()
    cache.flush()
    assert space.pin(held) == DRAM_BLOCKS
    transfer = space.onboard(HASHES, np.zeros_like(BLOCKS), deadline_s=0.1)
    with pytest.raises(TransferTimeout):
        transfer.wait()
    assert transfer.result is not None
    expect(cache, "onboard", transfer.result.reasons, kvx.MissReason.NO_ROOM)
    assert space.unpin(held) == DRAM_BLOCKS
    assert onboard(space, HASHES).num_blocks == COUNT


def test_in_flight(open_cache: Opener) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(has_nvme=False, faults=faults))
    failpoints.set("copy", "hang")
    first = space.offload(HASHES, BLOCKS)
    expect_of_both(cache, space, kvx.MissReason.IN_FLIGHT)
    second = space.offload(HASHES, BLOCKS).wait()
    expect(cache, "offload", second.reasons, kvx.MissReason.IN_FLIGHT)
    failpoints.clear()
    assert first.wait().num_blocks == COUNT
