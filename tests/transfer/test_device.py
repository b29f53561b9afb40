"""Devices as Python sees them, on the emulated one."""

import os

import numpy as np
import pytest

import kvx
from kvx_ext import _core

BYTES = 1 << 20
OK, CANCELLED = 0, 9


def addresses(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_bytes_go_there_and_back() -> None:
    device = _core.open_emulated_device(4 * BYTES)
    memory, host = device.allocate(BYTES), _core.HostRegion(BYTES)
    bytes_of = host.array()
    bytes_of[:] = np.arange(BYTES) % 251
    stream = device.create_stream()
    with device.pin(host.address, BYTES) as pinned, _core.Copies(device, sm="never") as copies:
        assert pinned.wait(1.0)
        assert pinned.pinned_bytes == BYTES
        runs = addresses(memory.address), addresses(host.address), addresses(BYTES)
        ticket = copies.submit("h2d", *runs)
        assert copies.wait(ticket, 5.0) == OK
        with pytest.raises(kvx.UsageError, match="ticket"):
            copies.wait(ticket, 0.0)
        device.fill(memory.address, 7, 10, stream)
        ticket = copies.submit("d2h", runs[1], runs[0], runs[2], device.mark(stream))
        assert copies.wait(ticket, 5.0) == OK
        assert copies.stats()["bytes_d2h"] == BYTES
    assert (bytes_of[:10] == 7).all()
    assert (bytes_of[10:] == np.arange(10, BYTES) % 251).all()
    memory.close()
    with pytest.raises(kvx.UsageError, match="closed"):
        _ = memory.address
    assert device.memory_bytes() == (4 * BYTES, 4 * BYTES)


def test_copies_that_are_closed_cancel() -> None:
    device = _core.open_emulated_device(BYTES)
    copies = _core.Copies(device)
    assert copies.close(1.0) == 0
    ticket = copies.submit("h2d", addresses(), addresses(), addresses())
    assert copies.wait(ticket, 1.0) == CANCELLED
    assert copies.close(1.0) == 0


def test_copies_that_leak_warn() -> None:
    device = _core.open_emulated_device(BYTES)
    with pytest.warns(ResourceWarning, match="not closed"):
        _core.Copies(device)


def test_memory_is_shared() -> None:
    device, other = _core.open_emulated_device(BYTES), _core.open_emulated_device(BYTES)
    memory = device.allocate(5000, is_exportable=True)
    handle, fd, size_bytes = device.share(memory)
    mapped = other.open_shared(handle, fd, size_bytes)
    os.close(fd)
    assert mapped.bytes == memory.bytes == 8192
    assert other.check_address(mapped.address) == 8192


def test_what_is_wrong_is_said() -> None:
    device = _core.open_emulated_device(BYTES)
    with pytest.raises(kvx.CapacityError):
        device.allocate(BYTES + 1)
    with pytest.raises(kvx.UsageError, match="device memory"):
        device.check_address(4096)
    with pytest.raises(kvx.UsageError, match="direction"), _core.Copies(device) as copies:
        copies.submit("up", addresses(), addresses(), addresses())
    with pytest.raises(kvx.UsageError, match="sm is"):
        _core.Copies(device, sm="always")
    with pytest.raises(kvx.UnavailableError, match="libnosuch"):
        _core.open_cuda_device("libnosuch.so.1")
    with pytest.raises(kvx.UnavailableError, match="libnosuch"):
        _core.list_cuda_devices("libnosuch.so.1")


def test_gates_grow() -> None:
    gate = _core.open_emulated_device(BYTES).make_gate()
    gate.advance(3)
    gate.advance(2)
    assert gate.value == 3
    assert "CPU" in gate.wait_on(2, 3)
