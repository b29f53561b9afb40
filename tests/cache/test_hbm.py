"""The HBM tier: what it keeps, for how long, and that its bytes are verified on their way out."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING

import pytest

import kvx
from kvx.cache.events import BlockRemoved, BlockStored
from tests.cache.conftest import BLOCK_BYTES, Opener, make_blocks, make_hashes
from tests.cache.engine_memory import (
    EngineMemory,
    empty,
    fetch,
    hbm_addresses,
    held,
    plain_space,
    store,
)
from tests.cache.faults import sample, wait_until
from tests.sim.cuda_driver import Engine

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tests.cache.on_device import Gpu

COUNT = 48
SMALL_DRAM: dict[str, object] = {"capacity": "256KiB"}  # 16 blocks
SMALL_HBM: dict[str, object] = {"capacity": "256KiB"}
WIDE_HBM: dict[str, object] = {"capacity": "1MiB"}  # 64 blocks
HBM, DRAM, NVME = kvx.TierKind.HBM, kvx.TierKind.DRAM, kvx.TierKind.NVME

on_gpu = pytest.mark.parametrize("gpu", ["device, seed 1"], indirect=True)
on_both = pytest.mark.parametrize("gpu", ["device, seed 1", "host"], indirect=True)


@on_both
def test_what_dram_evicted_is_served_from_hbm(open_cache: Opener, gpu: Gpu | None) -> None:
    cache = open_cache(has_nvme=False, dram=SMALL_DRAM, hbm=WIDE_HBM)
    space = plain_space(cache)
    store(space, gpu, COUNT)
    assert len(held(cache, "dram")) <= 16
    match = space.match(make_hashes(COUNT + 1))
    assert (match.num_blocks, match.reason) == (COUNT, kvx.MissReason.NEVER_STORED)
    assert match.blocks_in(HBM) == COUNT
    result = fetch(space, gpu, COUNT)
    assert result.num_blocks == COUNT
    assert (result.tiers == HBM).all()
    assert result.bytes_done == COUNT * BLOCK_BYTES
    assert sample(cache, "kvx_blocks_total", verb="onboard", tier="hbm") == COUNT
    assert sample(cache, "kvx_match_blocks_total", tier="hbm") == COUNT


@on_gpu
def test_what_only_hbm_has_reaches_host_memory(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False, dram=SMALL_DRAM)
    space = plain_space(cache)
    store(space, gpu, COUNT)
    result = fetch(space, None, 8)
    assert result.num_blocks == 8
    assert (result.tiers == HBM).all()
    # It came through DRAM, and stays there.
    assert held(cache, "dram") >= _keys(space, make_hashes(8))
    assert (fetch(space, None, 8).tiers == DRAM).all()
    assert fetch(space, None, COUNT).num_blocks == COUNT  # three times what DRAM holds
    cache.check_integrity()


@on_gpu
def test_damage_in_hbm_is_found_on_the_way_to_host_memory(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False, dram=SMALL_DRAM)
    space = plain_space(cache)
    store(space, gpu, COUNT)
    hashes = make_hashes(COUNT)
    (address,) = hbm_addresses(space, hashes[5:6])
    gpu.driver.write(address + 1000, b"\x01wrong")
    result = fetch(space, None, COUNT)
    assert result.reasons[5] == kvx.MissReason.CORRUPT
    assert result.num_blocks == COUNT - 1
    assert result.prefix_blocks == 5
    assert sample(cache, "kvx_corrupt_blocks_total", tier="hbm") == 1
    key = space.namespace.keys(hashes[5:6]).tobytes()
    assert key not in held(cache, "hbm") | held(cache, "dram")
    match = space.match(hashes)
    assert (match.num_blocks, match.reason) == (5, kvx.MissReason.CORRUPT)


@on_gpu
def test_what_is_damaged_in_hbm_is_looked_for_on_nvme(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(dram=SMALL_DRAM)
    space = plain_space(cache)
    store(space, gpu, COUNT)
    assert cache.flush(10.0)
    for address in hbm_addresses(space, make_hashes(COUNT)[5:7]):
        gpu.driver.write(address, b"wrong")
    result = fetch(space, None, COUNT)
    assert result.num_blocks == COUNT
    assert result.tiers[5:7].tolist() == [NVME, NVME]
    assert sample(cache, "kvx_corrupt_blocks_total", tier="hbm") == 2


@on_gpu
@pytest.mark.parametrize("promote", [True, False])
def test_blocks_are_promoted_from_dram(open_cache: Opener, gpu: Gpu, promote: bool) -> None:
    cache = open_cache(has_nvme=False, hbm={"promote": promote})
    space = plain_space(cache)
    store(space, None, 16)  # from host memory, which HBM has no way from
    assert not held(cache, "hbm")
    first = fetch(space, gpu, 16)
    assert (first.tiers == DRAM).all()
    assert len(held(cache, "hbm")) == (16 if promote else 0)
    second = fetch(space, gpu, 16)
    assert (second.tiers == (HBM if promote else DRAM)).all()


@on_both
@pytest.mark.parametrize("promote", [True, False])
def test_blocks_are_promoted_from_nvme_after_a_restart(
    open_cache: Opener, gpu: Gpu | None, promote: bool
) -> None:
    hbm: dict[str, object] = {"promote": promote}
    before = open_cache(hbm=hbm)
    store(plain_space(before), gpu, 16)
    before.close()
    cache = open_cache(hbm=hbm)
    space = plain_space(cache)
    assert not held(cache, "hbm")
    assert space.match(make_hashes(16)).blocks_in(NVME) == 16
    first = fetch(space, gpu, 16)
    assert first.num_blocks == 16
    assert (first.tiers == NVME).all()
    assert len(held(cache, "hbm")) == (16 if promote else 0)
    assert (fetch(space, gpu, 16).tiers == (HBM if promote else DRAM)).all()


@on_both
def test_the_capacity_is_kept_by_eviction(open_cache: Opener, gpu: Gpu | None) -> None:
    cache = open_cache(has_nvme=False, hbm=SMALL_HBM)
    space = plain_space(cache)
    most = 0
    for first in range(0, COUNT, 8):
        store(space, gpu, 8, first=first)
        most = max(most, len(held(cache, "hbm")))
    assert most == 16
    assert sample(cache, "kvx_evicted_blocks_total", tier="hbm") == COUNT - 16
    assert held(cache, "hbm") == _keys(space, make_hashes(16, first=COUNT - 16))
    match = space.match(make_hashes(COUNT))
    assert (match.blocks_in(DRAM), match.blocks_in(HBM)) == (COUNT - 16, 16)
    result = fetch(space, gpu, COUNT)  # three times what HBM holds, promoted as it goes
    assert result.num_blocks == COUNT
    assert len(held(cache, "hbm")) <= 16
    cache.check_integrity()


@on_gpu
def test_hbm_takes_no_more_of_the_device_than_its_capacity(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(
        has_nvme=False,
        hbm=SMALL_HBM,
        gpu={"driver": str(gpu.driver.path), "calibrate": False, "staging": 0},
    )
    gc.collect()
    free_bytes = gpu.device.memory_bytes()[0]
    store(plain_space(cache), gpu, COUNT)
    fetch(plain_space(cache), gpu, COUNT)

    def is_as_before() -> bool:
        gc.collect()  # the engine's own blocks
        return gpu.device.memory_bytes()[0] == free_bytes

    wait_until(is_as_before)


@on_both
def test_a_tenant_keeps_to_its_quota(open_cache: Opener, gpu: Gpu | None) -> None:
    cache = open_cache(
        has_nvme=False, hbm=WIDE_HBM, tenants=[{"name": "a", "hbm_quota": 4 * BLOCK_BYTES}]
    )
    held_to_it, other = plain_space(cache, tenant="a"), plain_space(cache, tenant="b")
    store(held_to_it, gpu, 16)
    assert len(held(cache, "hbm")) == 4
    store(other, gpu, 16)
    assert len(held(cache, "hbm")) == 20
    assert fetch(held_to_it, gpu, 16).num_blocks == 16
    assert held_to_it.match(make_hashes(16)).blocks_in(HBM) <= 4


@on_both
def test_blocks_expire_in_hbm_too(open_cache: Opener, gpu: Gpu | None) -> None:
    now = [1_000_000.0]
    cache = open_cache(has_nvme=False, hbm=WIDE_HBM, clock=lambda: now[0])
    space = plain_space(cache)
    store(space, gpu, 8, ttl_s=10)
    store(space, None, 8, first=8, ttl_s=20)
    fetch(space, gpu, 16)  # what came from host memory is promoted
    assert space.match(make_hashes(16)).blocks_in(HBM) == 16
    now[0] += 11
    match = space.match(make_hashes(16))
    assert (match.num_blocks, match.reason) == (0, kvx.MissReason.EXPIRED)
    result = fetch(space, gpu, 16)
    assert (result.reasons[:8] == kvx.MissReason.EXPIRED).all()
    assert (result.reasons[8:] == kvx.MissReason.HIT).all()
    now[0] += 10
    assert (fetch(space, gpu, 16).reasons == kvx.MissReason.EXPIRED).all()
    wait_until(lambda: not held(cache, "hbm"))


@on_both
def test_drop_and_clear_reach_hbm(open_cache: Opener, gpu: Gpu | None) -> None:
    cache = open_cache(hbm=WIDE_HBM)
    space = plain_space(cache)
    store(space, gpu, 16)
    assert space.drop(make_hashes(4)) == 4
    assert len(held(cache, "hbm")) == 12
    assert (fetch(space, gpu, 4).reasons == kvx.MissReason.DROPPED).all()
    cache.clear()
    assert not held(cache, "hbm") | held(cache, "dram") | held(cache, "nvme")
    assert (fetch(space, gpu, 16).reasons == kvx.MissReason.DROPPED).all()


@on_gpu
@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("verb", ["offload", "onboard"])
def test_what_is_dropped_on_its_way_into_hbm_does_not_arrive(
    open_cache: Opener, gpu: Gpu, verb: str, clears: bool
) -> None:
    cache = open_cache(has_nvme=False)
    space = plain_space(cache)
    hashes = make_hashes(8)
    memory = EngineMemory(gpu, make_blocks(8))
    if verb == "onboard":
        store(space, None, 8)
    gpu.driver.freeze(Engine.ON_DEVICE)
    try:
        move = space.offload if verb == "offload" else space.onboard
        transfer = move(hashes, memory.blocks)
        wait_until(lambda: _num_writing(space) == 8)
        assert transfer.poll() is kvx.TransferState.PENDING
        assert cache.clear() if clears else space.drop(hashes[:4]) == 4
    finally:
        gpu.driver.thaw(Engine.ON_DEVICE)
    assert transfer.wait(5.0).num_blocks == 8
    assert transfer.wait_quiesced(5.0)
    assert len(held(cache, "hbm")) == (0 if clears else 4)
    assert space.match(hashes).num_blocks == 0
    cache.check_integrity()


def _num_writing(space: kvx.CacheSpace) -> int:
    """Return how many of the first eight blocks are being written into HBM."""
    assert space.hbm_pool is not None
    conditions = space.hbm_pool.index.inspect(space.namespace.keys(make_hashes(8)), 0)
    return int((conditions == 3).sum())


@on_gpu
def test_what_is_dropped_on_its_way_out_of_hbm_does_not_come_back(
    open_cache: Opener, gpu: Gpu
) -> None:
    cache = open_cache(has_nvme=False, dram=SMALL_DRAM)
    space = plain_space(cache)
    store(space, gpu, COUNT)
    hashes = make_hashes(2)
    target = empty(None, 2)
    gpu.driver.freeze(Engine.DEVICE_TO_HOST)
    try:
        transfer = space.onboard(hashes, target.blocks)
        assert transfer.poll() is kvx.TransferState.PENDING
        assert space.drop(hashes) == 2
    finally:
        gpu.driver.thaw(Engine.DEVICE_TO_HOST)
    result = transfer.wait(5.0)
    served = result.reasons == kvx.MissReason.HIT
    assert (target.read()[served] == make_blocks(2)[served]).all()
    match = space.match(hashes)
    assert (match.num_blocks, match.reason) == (0, kvx.MissReason.DROPPED)
    assert not _keys(space, hashes) & (held(cache, "hbm") | held(cache, "dram"))
    store(space, gpu, 2)
    assert fetch(space, gpu, 2).num_blocks == 2
    cache.check_integrity()


def _keys(space: kvx.CacheSpace, hashes: npt.NDArray[np.uint8]) -> set[bytes]:
    return {key.tobytes() for key in space.namespace.keys(hashes)}


@on_gpu
def test_a_damaged_copy_in_dram_is_served_by_nvme(open_cache: Opener, gpu: Gpu) -> None:
    """On its way to the device: found before it is sent, and what comes instead is promoted."""
    cache = open_cache()
    space = plain_space(cache)
    store(space, None, 8)
    assert cache.flush(10.0)
    with space.lease(make_hashes(8)) as lease:
        ctypes.memset(int(lease.addresses[3]), int(lease.view(3)[0]) ^ 1, 1)
    result = fetch(space, gpu, 8)
    assert result.num_blocks == 8
    assert result.tiers[3] == NVME
    assert sample(cache, "kvx_corrupt_blocks_total", tier="dram") == 1
    assert space.match(make_hashes(8)).blocks_in(HBM) == 8
    assert (fetch(space, gpu, 8).tiers == HBM).all()


@on_gpu
def test_a_promotion_that_hangs_costs_no_block(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False)
    space = plain_space(cache)
    memory = EngineMemory(gpu, make_blocks(8))
    gpu.driver.freeze(Engine.ON_DEVICE)
    try:
        transfer = space.offload(make_hashes(8), memory.blocks, deadline_s=0.3)
        result = transfer.wait(5.0)
        assert result.num_blocks == 8
        assert not transfer.wait_quiesced(0.05), "the engine's blocks are still being read"
    finally:
        gpu.driver.thaw(Engine.ON_DEVICE)
    assert transfer.wait_quiesced(5.0)
    wait_until(lambda: _num_writing(space) == 0)
    assert not held(cache, "hbm")  # too late to count
    assert fetch(space, gpu, 8).num_blocks == 8


@on_both
def test_events_name_the_tier(open_cache: Opener, gpu: Gpu | None) -> None:
    cache = open_cache(has_nvme=False, hbm=SMALL_HBM)
    space = plain_space(cache)
    store(space, gpu, 24)
    space.drop(make_hashes(1, first=23))
    counted = {"stored": 0, "evicted": 0, "dropped": 0}
    standing: set[bytes] = set()
    for event in cache.events.replay(1):
        if not isinstance(event, BlockStored | BlockRemoved) or event.tier != "hbm":
            continue
        keys = {event.keys[at : at + 16] for at in range(0, len(event.keys), 16)}
        is_stored = isinstance(event, BlockStored)
        counted["stored" if isinstance(event, BlockStored) else event.reason] += len(keys)
        standing = standing | keys if is_stored else standing - keys
    assert counted == {"stored": 24, "evicted": 8, "dropped": 1}
    assert standing == held(cache, "hbm")
    assert {key.tobytes() for key in cache.events.snapshot().keys["hbm"]} == standing
    assert cache.stats()["hbm"]["committed"] == len(standing)


@on_gpu
def test_a_mixed_prefix_names_the_highest_tier(open_cache: Opener, gpu: Gpu) -> None:
    """Blocks 0 to 8 in HBM, 8 to 16 in DRAM alone, 16 to 24 on NVMe alone."""
    before = open_cache()
    store(plain_space(before), None, 8, first=16)
    before.close()
    cache = open_cache()
    space = plain_space(cache)
    store(space, gpu, 8)
    store(space, None, 8, first=8)
    match = space.match(make_hashes(25))
    assert match.tiers.tolist() == [HBM] * 8 + [DRAM] * 8 + [NVME] * 8
    result = fetch(space, gpu, 24)
    assert result.tiers.tolist() == match.tiers.tolist()
    assert space.match(make_hashes(24)).blocks_in(HBM) == 24


@on_gpu
def test_blocks_of_several_sizes_share_hbm(open_cache: Opener, gpu: Gpu) -> None:
    extents = {"extent": "64KiB"}
    cache = open_cache(has_nvme=False, dram=extents, hbm={**SMALL_HBM, **extents})
    large = plain_space(cache, block_bytes=2 * BLOCK_BYTES)
    small = plain_space(cache)
    store(small, gpu, 16)
    rows = make_blocks(4, block_bytes=2 * BLOCK_BYTES)
    large.offload(make_hashes(4), EngineMemory(gpu, rows).blocks).wait()
    target = empty(gpu, 4, 2 * BLOCK_BYTES)
    assert large.onboard(make_hashes(4), target.blocks).wait().num_blocks == 4
    assert (target.read() == rows).all()
    assert fetch(small, gpu, 16).num_blocks == 16
    used_bytes = [
        len(pool.index.snapshot()["keys"]) * pool.slot_bytes
        for pool in (small.hbm_pool, large.hbm_pool)
        if pool is not None
    ]
    assert sum(used_bytes) <= 256 << 10
    cache.check_integrity()
