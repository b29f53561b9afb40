"""A GPU that fails, is not there, or turns up late; and what a closed cache leaves on it."""

from __future__ import annotations

import gc
import logging
import time
from typing import TYPE_CHECKING

import pytest

import kvx
from kvx.errors import CapacityError, KvxError, UnavailableError, UsageError
from tests.cache.conftest import Opener, make_blocks, make_hashes
from tests.cache.engine_memory import EngineMemory, empty, fetch, held, plain_space, store
from tests.cache.faults import wait_until
from tests.cache.on_device import DeviceArray
from tests.sim.cuda_driver import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cache.on_device import Gpu
    from tests.sim.cuda_driver import SimulatedDriver

ECC, ILLEGAL_ADDRESS = 214, 700
COUNTED = ("live_allocations", "live_registrations", "live_streams", "live_events")
NO_DRIVER = {"driver": "libcuda-that-is-not-there.so"}
HBM = {"kind": "hbm", "capacity": "1MiB"}

on_gpu = pytest.mark.parametrize("gpu", ["device, seed 1"], indirect=True)
on_host = pytest.mark.parametrize("gpu", ["host"], indirect=True)


@pytest.fixture
def mortal(loaded_driver: SimulatedDriver) -> Iterator[SimulatedDriver]:
    """Hand out a driver whose device may be lost; all of it is new after the test.

    A process that lost its device gives nothing back to it, so registrations would stay. Tests name
    this fixture first, so that it ends last.
    """
    yield loaded_driver
    gc.collect()  # what is freed after a reset could be somebody else's by then
    loaded_driver.reset()


@on_gpu
@pytest.mark.parametrize("error", [ECC, ILLEGAL_ADDRESS])
def test_a_lost_device_takes_no_host_traffic_with_it(
    mortal: SimulatedDriver, open_cache: Opener, gpu: Gpu, error: int
) -> None:
    cache = open_cache()
    space = plain_space(cache)
    store(space, gpu, 8)
    source, target = EngineMemory(gpu, make_blocks(4)), empty(gpu, 8)
    hashes = make_hashes(8)
    known = kvx.BlockView.of_blocks(target.blocks).slots(range(8))
    assert space.onboard(hashes, known).wait().num_blocks == 8
    mortal.fail_context(error)
    result = space.onboard(hashes, known, deadline_s=2.0).wait()
    assert (result.reasons == kvx.MissReason.TIER_DOWN).all()
    result = space.onboard(hashes, target.blocks, deadline_s=2.0).wait()
    assert (result.reasons == kvx.MissReason.TIER_DOWN).all()
    result = space.offload(make_hashes(4, first=100), source.blocks, deadline_s=2.0).wait()
    assert (result.reasons == kvx.MissReason.TIER_DOWN).all()
    result = space.onboard(hashes, known, after=0x1234560, deadline_s=2.0).wait()
    assert (result.reasons == kvx.MissReason.TIER_DOWN).all()
    assert fetch(space, None, 8).num_blocks == 8
    store(space, None, 8, first=8)
    assert fetch(space, None, 16).num_blocks == 16
    assert cache.flush(10.0)
    cache.check_integrity()
    began = time.monotonic()
    cache.close(timeout_s=2.0)
    assert time.monotonic() - began < 4.0


@on_gpu
def test_host_traffic_gets_from_nvme_what_a_lost_device_had(
    mortal: SimulatedDriver, open_cache: Opener, gpu: Gpu
) -> None:
    """Blocks that HBM and NVMe have and DRAM has not, and one that only HBM has."""
    cache = open_cache(dram={"capacity": "256KiB"})
    space = plain_space(cache)
    store(space, gpu, 32)
    assert cache.flush(10.0)
    assert len(held(cache, "dram")) <= 16
    mortal.fail_context(ECC)
    result = fetch(space, None, 32)
    assert result.num_blocks == 32
    assert kvx.TierKind.NVME in result.tiers


@on_gpu
def test_what_only_a_lost_device_had_is_down(
    mortal: SimulatedDriver, open_cache: Opener, gpu: Gpu
) -> None:
    cache = open_cache(has_nvme=False, dram={"capacity": "256KiB"})
    space = plain_space(cache)
    store(space, gpu, 32)
    mortal.fail_context(ECC)
    result = fetch(space, None, 32)
    missed = result.reasons[result.reasons != kvx.MissReason.HIT]
    assert len(missed) >= 16
    assert (missed == kvx.MissReason.TIER_DOWN).all()


@on_gpu
def test_a_device_lost_while_bytes_move(
    mortal: SimulatedDriver, open_cache: Opener, gpu: Gpu
) -> None:
    cache = open_cache(has_nvme=False)
    space = plain_space(cache)
    store(space, None, 8)
    target = empty(gpu, 8)
    mortal.freeze(Engine.HOST_TO_DEVICE)
    transfer = space.onboard(make_hashes(8), target.blocks, deadline_s=5.0)
    assert transfer.poll() is kvx.TransferState.PENDING
    mortal.fail_context(ECC)
    result = transfer.wait(5.0)
    assert (result.reasons == kvx.MissReason.TIER_DOWN).all()
    assert fetch(space, None, 8).num_blocks == 8


@on_gpu
def test_a_copy_that_the_driver_refuses_is_no_lost_device(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False)
    space = plain_space(cache)
    store(space, None, 8)
    for symbol in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync", "cuMemcpyHtoDAsync_v2"):
        gpu.driver.inject(symbol, 1)
    target = empty(gpu, 8)
    result = space.onboard(make_hashes(8), target.blocks, deadline_s=2.0).wait()
    served = result.reasons == kvx.MissReason.HIT
    assert (target.read()[served] == make_blocks(8)[served]).all()
    for symbol in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync", "cuMemcpyHtoDAsync_v2"):
        gpu.driver.inject(symbol, 0)
    assert fetch(space, gpu, 8).num_blocks == 8


@on_gpu
def test_the_device_is_opened_when_its_memory_is_met(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False, has_hbm=False)
    space = plain_space(cache)
    gc.collect()
    before = _counts(gpu.driver)
    store(space, None, 8)
    assert _counts(gpu.driver) == before
    assert fetch(space, gpu, 8).num_blocks == 8
    store(space, gpu, 8, first=8)
    assert fetch(space, gpu, 16).num_blocks == 16
    assert "hbm" not in cache.snapshot()
    wait_until(lambda: "kvx_pinned_bytes 2097152" in cache.metrics.render().replace(".0", ""))


@on_gpu
def test_blocks_on_another_device_are_refused(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False)
    space = plain_space(cache)
    memory = EngineMemory(gpu, make_blocks(1))
    view = kvx.BlockView.of_blocks(memory.blocks)
    view.device_ordinal = 1
    with pytest.raises(UsageError, match="lie on device 1, the cache works with device 0"):
        space.offload(make_hashes(1), view.slots([0]))


@on_gpu
def test_a_closed_cache_leaves_nothing_on_the_device(open_cache: Opener, gpu: Gpu) -> None:
    gc.collect()
    before = _counts(gpu.driver)
    cache = open_cache()
    space = plain_space(cache)
    store(space, gpu, 32)
    stream = gpu.device.create_stream()
    target = empty(gpu, 32)
    transfer = space.onboard(make_hashes(32), target.blocks, after=stream)
    transfer.wait_on_stream(stream)
    transfer.wait()
    gpu.device.stream_synchronize(stream)
    gpu.device.destroy_stream(stream)
    assert _counts(gpu.driver) != before
    assert cache.close() == kvx.CloseReport(0, 0, 0)
    del target, transfer

    def is_clean() -> bool:
        gc.collect()
        return _counts(gpu.driver) == before

    wait_until(is_clean, 5.0)


@on_gpu
def test_a_cache_that_does_not_open_leaves_nothing(open_cache: Opener, gpu: Gpu) -> None:
    gc.collect()
    before = _counts(gpu.driver)
    with pytest.raises(CapacityError):
        open_cache(hbm={"capacity": "1TiB"})
    gc.collect()
    assert _counts(gpu.driver) == before
    open_cache().close()  # its directory is free


def _counts(driver: SimulatedDriver) -> dict[str, int]:
    return {name: driver.count(name) for name in COUNTED}


@on_host
def test_without_a_gpu_host_memory_plays_one(
    open_cache: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvx"):
        cache = open_cache(has_nvme=False, hbm={"emulation": "auto"}, gpu=NO_DRIVER)
    (record,) = caplog.records
    assert "plays a GPU" in record.getMessage()
    assert NO_DRIVER["driver"] in record.getMessage()
    space = plain_space(cache)
    store(space, None, 16)
    result = fetch(space, None, 16)
    assert (result.tiers == kvx.TierKind.HBM).all()


@on_host
def test_without_a_gpu_nothing_need_play_one(open_cache: Opener, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=NO_DRIVER["driver"]):
        open_cache(hbm={"emulation": "never"}, gpu=NO_DRIVER)
    cache = open_cache()  # its directory is free
    store(plain_space(cache), None, 4)
    assert (tmp_path / "tier").is_dir()


@on_gpu
def test_device_memory_without_its_driver_is_refused(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False, has_hbm=False, gpu=NO_DRIVER)
    space = plain_space(cache)
    memory = EngineMemory(gpu, make_blocks(2))
    for _ in range(2):
        with pytest.raises(UnavailableError, match=NO_DRIVER["driver"]):
            space.offload(make_hashes(2), memory.blocks)
    store(space, None, 2)
    assert fetch(space, None, 2).num_blocks == 2


@on_gpu
def test_a_device_that_hangs_does_not_hang_close(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False)
    space = plain_space(cache)
    store(space, None, 8)
    target = empty(gpu, 8)
    gpu.driver.freeze(Engine.HOST_TO_DEVICE)
    try:
        transfer = space.onboard(make_hashes(8), target.blocks)
        began = time.monotonic()
        report = cache.close(timeout_s=0.5)
        assert time.monotonic() - began < 3.0
        assert report.abandoned_jobs == 1
        with pytest.raises(KvxError):
            transfer.wait(1.0)
    finally:
        gpu.driver.thaw(Engine.HOST_TO_DEVICE)
    assert not transfer.wait_quiesced(0.05)  # who would have told it is closed
    time.sleep(0.1)  # the copies end before their target goes


@on_gpu
@pytest.mark.parametrize("frozen", [Engine.DEVICE_TO_HOST, Engine.ON_DEVICE])
@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_the_engine_writes_after_the_end_does_not_get_into_hbm(
    open_cache: Opener, gpu: Gpu, frozen: Engine, is_cancelled: bool
) -> None:
    """Also where a promotion was to begin, or went on, after the transfer had ended."""
    cache = open_cache(has_nvme=False)
    space = plain_space(cache)
    memory = EngineMemory(gpu, make_blocks(8))
    hashes = make_hashes(8)
    gpu.driver.freeze(frozen)
    try:
        transfer = space.offload(hashes, memory.blocks, deadline_s=60.0 if is_cancelled else 0.3)
        time.sleep(0.1)
        if is_cancelled:
            transfer.cancel()
        wait_until(lambda: transfer.poll() is not kvx.TransferState.PENDING, 5.0)
    finally:
        gpu.driver.thaw(frozen)
    # A promotion that hangs is no failure of the transfer.
    assert (transfer.error is None) == (frozen is Engine.ON_DEVICE and not is_cancelled)
    assert transfer.wait_quiesced(5.0)
    assert isinstance(memory.blocks, DeviceArray)
    memory.blocks.upload(gpu.driver, make_blocks(8, first=500))  # the engine goes on
    wait_until(lambda: "kvx_unsettled_jobs 0" in cache.metrics.render())
    assert not held(cache, "hbm")
    fetch(space, gpu, 8)
    cache.check_integrity()
