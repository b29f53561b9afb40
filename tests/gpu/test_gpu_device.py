"""What a device says of itself, its memory, and host memory pinned with it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kvx.errors import CapacityError, UnavailableError, UsageError
from kvx.transfer.memory import MemoryRegion
from kvx_ext import _core
from tests.gpu.rig import PATIENCE_S, Gpu, address_of, copy_one, random_bytes

MIB = 1 << 20
GIB = 1 << 30


def test_a_device_describes_itself(gpu: Gpu) -> None:
    info = gpu.device.info()
    assert info["ordinal"] == 0
    assert info["name"]
    assert re.fullmatch("[0-9a-f]{32}", str(info["uuid"]))
    assert re.fullmatch(
        r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9]", str(info["pci_bus_id"]).lower()
    )
    least = {
        "total_bytes": 64 * MIB, "copy_engines": 1, "multiprocessors": 1, "driver_version": 12000
    }  # fmt: skip
    for name, value in least.items():
        assert info[name] >= value, name
    assert not info["is_emulated"]
    listed = _core.list_cuda_devices(gpu.library)[0]
    differing = {name for name in info if info[name] != listed[name]}
    # Kernels are loaded on a device that was opened only.
    assert differing <= {"kernels"}


def test_memory_is_taken_and_given_back(gpu: Gpu) -> None:
    size = 64 * MIB
    before, total = gpu.device.memory_bytes()
    assert 0 < before <= total
    memory = gpu.device.allocate(size)
    assert memory.bytes == size
    assert not memory.is_exportable
    assert gpu.device.memory_bytes()[0] <= before - size
    there = gpu.device.check_address(memory.address)
    assert there >= size
    assert gpu.device.check_address(memory.address + 100) == there - 100
    memory.close()
    assert gpu.device.memory_bytes()[0] >= before - 4 * MIB
    with pytest.raises(UsageError):
        _ = memory.address


def test_more_memory_than_there_is_is_refused(gpu: Gpu) -> None:
    _, total = gpu.device.memory_bytes()
    with pytest.raises(CapacityError):
        gpu.device.allocate(total + GIB)
    assert not gpu.device.health()


def test_host_memory_is_no_device_memory(gpu: Gpu) -> None:
    with pytest.raises(UsageError):
        gpu.device.check_address(MemoryRegion(4096).address)


def test_what_is_written_is_read(gpu: Gpu) -> None:
    data = random_bytes(9 * MIB + 5, 1)
    memory = gpu.memory(10 * MIB)
    gpu.write(memory.address + 3, data)
    assert gpu.read(memory.address + 3, len(data)) == data.tobytes()


def test_exportable_memory_is_rounded_up(gpu: Gpu) -> None:
    if not gpu.device.info()["has_exportable_memory"]:
        pytest.skip("this device has no exportable memory")
    memory = gpu.memory(MIB, is_exportable=True)
    assert memory.is_exportable
    assert memory.bytes >= MIB
    assert gpu.device.check_address(memory.address) >= memory.bytes


def test_pinned_memory_is_pinned_whole(gpu: Gpu) -> None:
    region = MemoryRegion(8 * MIB)
    with gpu.device.pin(region.address, region.size_bytes) as pinned:
        assert pinned.wait(PATIENCE_S)
        assert pinned.pinned_bytes == pinned.bytes == region.size_bytes


def test_memory_that_is_not_aligned_is_not_pinned(gpu: Gpu) -> None:
    region = MemoryRegion(8192)
    with pytest.raises(UsageError):
        gpu.device.pin(region.address + 8, 4096)


def test_a_run_may_cross_from_piece_to_piece(gpu: Gpu) -> None:
    """The range is registered in two pieces, which no single copy may span."""
    host = gpu.host(GIB + GIB // 2)
    memory = gpu.memory(MIB)
    copies = gpu.copies(sm="never")
    data = random_bytes(MIB, 2)
    for start in (GIB - MIB // 2, GIB - 1, GIB + 4096, len(host) - MIB):
        window = host[start : start + MIB]
        window[:] = data
        copy_one(copies, "h2d", memory.address, address_of(window), MIB)
        assert gpu.read(memory.address, MIB) == data.tobytes()
        window[:] = 0
        copy_one(copies, "d2h", address_of(window), memory.address, MIB)
        np.testing.assert_array_equal(window, data)
    stats = copies.stats()
    assert stats["pageable_bytes"] == 0
    assert stats["bytes_h2d"] == stats["bytes_d2h"] == 4 * MIB


def test_pageable_memory_is_copied_and_counted(gpu: Gpu) -> None:
    region = MemoryRegion(MIB)
    memory = gpu.memory(MIB)
    data = random_bytes(MIB, 3)
    region.array()[:] = data
    copies = gpu.copies(sm="never")
    copy_one(copies, "h2d", memory.address, region.address, MIB)
    assert gpu.read(memory.address, MIB) == data.tobytes()
    assert copies.stats()["pageable_bytes"] == MIB


def test_there_is_no_device_of_that_number(gpu: Gpu) -> None:
    with pytest.raises(UnavailableError):
        _core.open_cuda_device(gpu.library, 63)
