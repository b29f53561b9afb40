"""cuda-ipc and what memory it is: streams that produce it, other devices, what cannot be shared."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvx.errors import TransferTimeout, UnavailableError, UsageError
from kvx.transfer.agents.agent import Agent
from kvx.transfer.backends.device import driver as cuda_driver
from kvx.transfer.conformance import WRITE, Rig
from kvx.transfer.handle import TransferState
from kvx.transfer.memory import MemoryRegion
from kvx.transfer.owner import pattern
from kvx_ext import _core
from tests.gpu.ipc_rig import BLOCK_BYTES, NUM_BLOCKS, open_ipc
from tests.gpu.rig import Gpu
from tests.sim.cuda_calls import GRANULARITY, AllocationProperties, DriverCalls, MemLocation
from tests.sim.cuda_driver import Engine, SimulatedDriver

INVALID_VALUE = 1


@pytest.fixture
def agent(sim: Gpu) -> Iterator[Agent]:  # noqa: ARG001 - closed before the device is
    with Agent("alone", config={"backends": ["cuda-ipc"]}) as opened:
        yield opened


class Memory:
    """Device memory by its address, as any library would hand it over."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None,
            "version": 3,
        }  # fmt: skip


@pytest.mark.parametrize("here", ["host", "plain"])
def test_nothing_is_read_before_it_was_made(sim: Gpu, here: str) -> None:
    with open_ipc(sim, here=here) as rig:
        stream = rig.ask("make_stream")
        rig.ask("freeze_engine", int(Engine.ON_DEVICE))
        rig.ask("fill_in_stream", stream, 0x42)
        token = rig.ask("lease_after", [0, 1, 2], stream)
        transfer = rig.agent.read(rig.local([0, 1, 2]), rig.peer.blocks(lease=token))
        time.sleep(0.2)
        assert transfer.poll() is TransferState.PENDING
        rig.ask("thaw_engine", int(Engine.ON_DEVICE))
        transfer.wait()
        assert (rig.blocks[:3] == 0x42).all()
        # Once it was made nobody waits again.
        rig.agent.read(rig.local([0, 1, 2]), rig.peer.blocks(lease=token)).wait()


def test_who_waits_for_a_stream_keeps_its_deadline(sim: Gpu) -> None:
    with open_ipc(sim) as rig:
        stream = rig.ask("make_stream")
        rig.ask("freeze_engine", int(Engine.ON_DEVICE))
        rig.ask("fill_in_stream", stream, 0x42)
        token = rig.ask("lease_after", [0], stream)
        transfer = rig.agent.read(rig.local([0]), rig.peer.blocks(lease=token), deadline_s=0.2)
        with pytest.raises(TransferTimeout):
            transfer.wait()
        assert transfer.wait_quiesced(1.0), "nothing of it was with a device"
        rig.ask("thaw_engine", int(Engine.ON_DEVICE))


def _fill_late(rig: Rig, sim: Gpu, driver: SimulatedDriver, value: int) -> int:
    stream = sim.stream()
    driver.freeze(Engine.ON_DEVICE)
    blocks: Any = rig.blocks
    sim.device.fill(blocks.memory.address, value, NUM_BLOCKS * BLOCK_BYTES, stream)
    return stream


def test_nothing_is_written_before_it_was_made(sim: Gpu, driver: SimulatedDriver) -> None:
    with open_ipc(sim) as rig:
        token = rig.lease(rights=WRITE)
        before = rig.ask("content", 1)
        stream = _fill_late(rig, sim, driver, 0x17)
        local = rig.registration.blocks([0, 1], BLOCK_BYTES, after=stream)
        transfer = rig.agent.write(local, rig.peer.blocks([0, 1], lease=token))
        time.sleep(0.2)
        assert transfer.poll() is TransferState.PENDING
        assert rig.ask("content", 1) == before
        driver.thaw(Engine.ON_DEVICE)
        transfer.wait()
        assert rig.ask("content", 1) == bytes([0x17]) * BLOCK_BYTES


def test_a_target_is_written_after_its_stream(sim: Gpu, driver: SimulatedDriver) -> None:
    with open_ipc(sim) as rig:
        remote = rig.peer.blocks([0], lease=rig.lease())
        stream = _fill_late(rig, sim, driver, 0x17)
        local = rig.registration.blocks([0], BLOCK_BYTES, after=stream)
        transfer = rig.agent.read(local, remote)
        time.sleep(0.1)
        driver.thaw(Engine.ON_DEVICE)
        transfer.wait()
        sim.device.stream_synchronize(stream)
        assert (rig.blocks[0] == pattern(1, NUM_BLOCKS, BLOCK_BYTES)[0]).all()
        assert (rig.blocks[1] == 0x17).all()


def test_streams_are_for_device_memory(agent: Agent) -> None:
    registration = agent.register(MemoryRegion(4096))
    with pytest.raises(UsageError, match="streams are for blocks in device memory"):
        registration.blocks([0], 4096, after=7)


def test_the_default_stream_is_refused(sim: Gpu, agent: Agent) -> None:
    registration = agent.register(sim.memory(4096))
    with pytest.raises(UsageError, match="legacy default stream"):
        registration.blocks([0], 4096, after=1)
    registration.close()


def test_from_one_device_to_another(sim: Gpu, driver: SimulatedDriver) -> None:
    driver.set_devices(2)
    with open_ipc(sim, devices=2, ordinal=1) as rig:
        rig.agent.read(rig.local(), rig.peer.blocks(lease=rig.lease())).wait()
        assert (rig.blocks == pattern(1, NUM_BLOCKS, BLOCK_BYTES)).all()


def test_devices_that_do_not_reach_each_other(sim: Gpu, driver: SimulatedDriver) -> None:
    driver.set_devices(2)
    driver.set_has_peer_access(has_peer_access=False)
    with open_ipc(sim, devices=2, ordinal=1) as rig:
        remote = rig.peer.blocks(lease=rig.lease())
        with pytest.raises(
            UnavailableError, match=r"device 0 cannot reach the memory of device 1.*host memory"
        ):
            rig.agent.read(rig.local(), remote)


def test_a_device_that_is_not_visible_here(sim: Gpu) -> None:
    with open_ipc(sim, here="host", devices=2, ordinal=1) as rig:
        transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=rig.lease()))
        with pytest.raises(UnavailableError, match=r"not visible.*CUDA_VISIBLE_DEVICES"):
            transfer.wait()


@pytest.fixture
def calls(sim: Gpu, simulated_driver: SimulatedDriver) -> DriverCalls:  # noqa: ARG001 - first
    return DriverCalls(simulated_driver)


def mapped_range(calls: DriverCalls, pieces: int, *, handle_types: int) -> int:
    """Return the address of memory that was put together of pieces."""
    address = calls.number("cuMemAddressReserve", pieces * GRANULARITY, 0, 0, 0)
    for piece in range(pieces):
        properties = AllocationProperties(
            type=1, handle_types=handle_types, location=MemLocation(1, 0)
        )
        handle = calls.number("cuMemCreate", GRANULARITY, ctypes.byref(properties), 0)
        at = address + piece * GRANULARITY
        calls.call("cuMemMap", at, GRANULARITY, 0, handle, 0)
        calls.set_access(at)
        calls.call("cuMemRelease", handle)
    return address


def free_range(calls: DriverCalls, address: int, pieces: int) -> None:
    for piece in range(pieces):
        calls.call("cuMemUnmap", address + piece * GRANULARITY, GRANULARITY)
    calls.call("cuMemAddressFree", address, pieces * GRANULARITY)


@pytest.mark.parametrize(
    ("pieces", "handle_types", "why"),
    [(2, 1, "several allocations, as expandable segments"), (1, 0, "without a descriptor")],
)
def test_memory_that_cannot_be_shared(
    agent: Agent, calls: DriverCalls, pieces: int, handle_types: int, why: str
) -> None:
    address = mapped_range(calls, pieces, handle_types=handle_types)
    with pytest.raises(UsageError, match=f"{why}.*staged=True"):
        agent.register(Memory(address, pieces * GRANULARITY))
    free_range(calls, address, pieces)


def test_memory_of_a_pool_cannot_be_shared(
    agent: Agent, calls: DriverCalls, driver: SimulatedDriver
) -> None:
    address = mapped_range(calls, 1, handle_types=1)
    # The simulation has no pools; this is what a driver says of their memory.
    driver.inject("cuMemRetainAllocationHandle", INVALID_VALUE)
    with pytest.raises(UsageError, match=r"stream-ordered pool.*staged=True"):
        agent.register(Memory(address, GRANULARITY))
    free_range(calls, address, 1)


def test_it_says_why_memory_of_a_peer_is_not_to_be_had(sim: Gpu) -> None:
    with open_ipc(sim, here="host", fails="cuIpcGetMemHandle") as rig:
        token = rig.lease()
        transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=token))
        with pytest.raises(UnavailableError, match="cuIpcGetMemHandle"):
            transfer.wait()
        # Host memory is the way out.
        staged = rig.peer.blocks(lease=rig.ask("lease_staged", [4]))
        rig.agent.read(rig.local([0]), staged).wait()
        assert (rig.blocks[0] == pattern(1, NUM_BLOCKS, BLOCK_BYTES)[4]).all()


def test_a_part_of_what_others_mapped_is_shared(calls: DriverCalls, sim: Gpu) -> None:
    address = mapped_range(calls, 2, handle_types=1)
    encoded, fd, size_bytes, offset = sim.device.share_at(address + GRANULARITY + 4096, 4096)
    ctypes.CDLL(None).close(fd)
    assert (encoded, size_bytes, offset) == (b"", GRANULARITY, 4096)
    free_range(calls, address, 2)


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> ctypes.CDLL:
        return ctypes.CDLL("libcuda-of-nobody.so.1")

    monkeypatch.setattr(cuda_driver, "_loaded", no_driver)
    with Agent("alone") as agent, pytest.raises(UsageError, match="there is no CUDA driver"):
        agent.register(Memory(1 << 40, 4096))


def test_overlaps_are_found() -> None:
    rows = np.array([[0, 0, 1, 10], [20, 100, 3, 10], [125, 0, 1, 10]], np.int64)
    assert _core.find_overlap(rows) == 2
    rows[2, 0] = 130
    assert _core.find_overlap(rows) == -1
