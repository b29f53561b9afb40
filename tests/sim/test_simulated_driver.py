"""What the simulated CUDA driver does when it is used as it should be, and what it refuses."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time

import pytest

from tests.sim.cuda_calls import (
    ANY,
    DURING_CALL,
    GRANULARITY,
    STREAM,
    Copy2D,
    DriverCalls,
    DriverError,
    until,
)
from tests.sim.cuda_driver import Engine, SimulatedDriver

KIB = 1 << 10
POISON = 0xCB
DEVICE_NAME_BYTES = 64


@pytest.fixture
def calls(simulated_driver: SimulatedDriver) -> DriverCalls:
    return DriverCalls(simulated_driver)


def entry_point(driver: SimulatedDriver, symbol: str, version: int) -> tuple[int | None, int]:
    function, status = ctypes.c_void_p(), ctypes.c_int(-1)
    code = driver.library.cuGetProcAddress_v2(
        symbol.encode(), ctypes.byref(function), version, ctypes.c_uint64(0), ctypes.byref(status)
    )
    assert code == 0
    return function.value, status.value


def test_entry_points_have_versions(simulated_driver: SimulatedDriver) -> None:
    driver = simulated_driver
    assert entry_point(driver, "cuMemAlloc", 12080)[1] == 0
    assert entry_point(driver, "cuNoSuchThing", 12080) == (None, 1)
    assert entry_point(driver, "cuMemcpyBatchAsync", 12070) == (None, 2)
    old, new = (entry_point(driver, "cuMemcpyBatchAsync", v)[0] for v in (12080, 13000))
    assert None not in {old, new}
    assert old != new
    driver.set_driver_version(12080)
    assert entry_point(driver, "cuMemcpyBatchAsync", 13000) == (old, 0)
    driver.set_has_batch_copy(has_batch_copy=False)
    assert entry_point(driver, "cuMemcpyBatchAsync", 13000) == (None, 1)
    driver.set_has_stream_values(has_stream_values=False)
    assert entry_point(driver, "cuStreamWaitValue32", 13000) == (None, 1)


def test_devices(simulated_driver: SimulatedDriver) -> None:
    simulated_driver.set_devices(2)
    calls = DriverCalls(simulated_driver, device=1)
    count, value = ctypes.c_int(), ctypes.c_int()
    calls.call("cuDeviceGetCount", ctypes.byref(count))
    assert count.value == 2
    name = ctypes.create_string_buffer(DEVICE_NAME_BYTES)
    calls.call("cuDeviceGetName", name, ctypes.c_int(DEVICE_NAME_BYTES), ctypes.c_int(1))
    assert name.value == b"kvx simulated device 1"
    calls.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(75), ctypes.c_int(1))
    assert value.value == 9
    simulated_driver.set_attribute(75, 8)
    calls.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(75), ctypes.c_int(1))
    assert value.value == 8
    assert calls.result("cuDeviceGet", ctypes.byref(value), ctypes.c_int(2)) == 101
    calls.call("cuDeviceCanAccessPeer", ctypes.byref(value), ctypes.c_int(0), ctypes.c_int(1))
    assert value.value == 1


def test_peers(simulated_driver: SimulatedDriver) -> None:
    simulated_driver.set_devices(2)
    theirs = DriverCalls(simulated_driver, device=1)
    target = theirs.allocate(64)
    ours = DriverCalls(simulated_driver, device=0)
    source, stream = ours.allocate(64), ours.stream()
    simulated_driver.write(source, b"across")
    contexts = theirs.context, ours.context
    ours.call("cuMemcpyPeerAsync", target, contexts[0], source, contexts[1], 6, stream)
    ours.synchronize(stream)
    assert simulated_driver.read(target, 6) == b"across"
    enable = "cuCtxEnablePeerAccess"
    results = [ours.result(enable, context, ctypes.c_uint(0)) for context in contexts]
    assert results == [0, 201]
    assert ours.result(enable, theirs.context, ctypes.c_uint(0)) == 704
    assert ours.result("cuMemcpyPeerAsync", target, 1, source, contexts[1], 6, stream) == 201


def test_a_call_needs_its_context(calls: DriverCalls) -> None:
    results = []

    def run() -> None:
        results.append(calls.result("cuMemAlloc", ctypes.byref(ctypes.c_uint64()), 1))
        calls.call("cuCtxPushCurrent", calls.context)
        results.append(calls.result("cuMemAlloc", ctypes.byref(ctypes.c_uint64()), 1))
        calls.call("cuCtxPopCurrent", ctypes.byref(ctypes.c_void_p()))
        results.append(calls.result("cuCtxPopCurrent", ctypes.byref(ctypes.c_void_p())))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [201, 0, 201]


def test_the_host_cannot_touch_device_memory(calls: DriverCalls) -> None:
    # In a process of its own, which this ends.
    program = (
        "import ctypes; from tests.sim.cuda_driver import SimulatedDriver\n"
        "from tests.sim.cuda_calls import DriverCalls\n"
        "memory = DriverCalls(SimulatedDriver()).allocate(4096)\n"
        "print(memory, flush=True); ctypes.string_at(memory, 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -11
    assert int(done.stdout) > 0
    assert calls.allocate(1) > 0


def test_memory_is_bounded(calls: DriverCalls) -> None:
    calls.driver.set_total_memory(8 * KIB)
    first = calls.allocate(6 * KIB)
    with pytest.raises(DriverError) as caught:
        calls.allocate(3 * KIB)
    assert caught.value.result == 2
    free = ctypes.c_size_t()
    calls.call("cuMemGetInfo", ctypes.byref(free), ctypes.byref(ctypes.c_size_t()))
    assert free.value == 2 * KIB
    calls.call("cuMemFree", first)
    assert calls.allocate(8 * KIB) != first
    assert calls.driver.count("live_allocations") == 1


def test_pointers_are_described(calls: DriverCalls) -> None:
    device, host = calls.allocate(5 * KIB), calls.pinned(4 * KIB)
    value, kind = ctypes.c_uint64(0), ctypes.c_uint32()
    kinds = []
    for address in (device + 9, host.address + 9):
        calls.call("cuPointerGetAttribute", ctypes.byref(kind), ctypes.c_int(2), address)
        kinds.append(kind.value)
        calls.call("cuPointerGetAttribute", ctypes.byref(value), ctypes.c_int(11), address)
        assert value.value == address - 9
    assert kinds == [2, 1]
    calls.call("cuPointerGetAttribute", ctypes.byref(value), ctypes.c_int(12), device)
    assert value.value == 5 * KIB
    assert calls.result("cuPointerGetAttribute", ctypes.byref(value), ctypes.c_int(2), 4096) == 1


def test_registrations(calls: DriverCalls) -> None:
    host = calls.pinned(8 * KIB)
    for address in (host.address, host.address + 4 * KIB):
        with pytest.raises(DriverError) as caught:
            calls.register(address, 4 * KIB)
        assert caught.value.result == 712
    with pytest.raises(DriverError) as caught:
        calls.register(host.address, 512 << 30)
    assert caught.value.result == 1
    assert calls.result("cuMemHostUnregister", host.address + 4 * KIB) == 713
    calls.call("cuMemHostUnregister", host.address)
    assert calls.result("cuMemHostUnregister", host.address) == 713
    assert calls.driver.count("live_registrations") == 0


def test_copies_and_counts(calls: DriverCalls) -> None:
    device, other, stream = calls.allocate(4 * KIB), calls.allocate(4 * KIB), calls.stream()
    source, target = calls.pinned(4 * KIB), bytearray(4 * KIB)
    source.data[:] = bytes(range(256)) * 16
    address = ctypes.addressof(ctypes.c_char.from_buffer(target))
    calls.copy(device, source.address, 4 * KIB, stream)
    calls.copy(other, device, 4 * KIB, stream)
    calls.copy(address, other, 4 * KIB, stream)
    calls.synchronize(stream)
    assert bytes(target) == source.data[:]
    counts = ("copies", "pageable_copies", "bytes_h2d", "bytes_d2d", "bytes_d2h")
    assert [calls.driver.count(name) for name in counts] == [3, 1, 4 * KIB, 4 * KIB, 4 * KIB]
    calls.call("cuMemsetD8Async", device, ctypes.c_uint8(7), 4 * KIB, stream)
    calls.synchronize(stream)
    assert calls.driver.read(device, 4 * KIB) == b"\7" * 4 * KIB


def test_a_copy_of_rows(calls: DriverCalls) -> None:
    device, host, stream = calls.allocate(4 * KIB), calls.pinned(4 * KIB), calls.stream()
    host.data[:] = bytes(range(256)) * 16
    copy = Copy2D(
        source_type=1, source_host=host.address, source_pitch=64, source_x_bytes=8,
        target_type=2, target_device=device, target_pitch=32, width_bytes=16, height=3,
    )  # fmt: skip
    calls.call("cuMemcpy2DAsync", ctypes.byref(copy), stream)
    calls.synchronize(stream)
    for row in range(3):
        assert calls.driver.read(device + 32 * row, 16) == host.data[64 * row + 8 :][:16]


def test_targets_are_poisoned_until_the_copy_ends(calls: DriverCalls) -> None:
    device, host, stream = calls.allocate(64), calls.pinned(4 * KIB), calls.stream()
    calls.driver.freeze(Engine.DEVICE_TO_HOST)
    calls.copy(host.address, device, 64, stream)
    until(lambda: host.data[0] == POISON)
    assert host.data[:64] == bytes([POISON]) * 64
    assert not calls.is_ready("cuStreamQuery", stream)
    calls.driver.thaw(Engine.DEVICE_TO_HOST)
    calls.synchronize(stream)
    assert host.data[:64] == bytes(64)


@pytest.mark.parametrize(
    ("order", "seen"), [(STREAM, b"new"), (DURING_CALL, b"old"), (ANY, b"old")]
)
def test_when_a_source_is_read(calls: DriverCalls, order: int, seen: bytes) -> None:
    device, host, stream = calls.allocate(64), calls.pinned(4 * KIB), calls.stream()
    host.data[:3] = b"old"
    calls.driver.freeze(Engine.HOST_TO_DEVICE)
    calls.copy_batch([(device, host.address, 3)], stream, order=order)
    host.data[:3] = b"new"
    calls.driver.thaw(Engine.HOST_TO_DEVICE)
    calls.synchronize(stream)
    assert calls.driver.read(device, 3) == seen


def test_the_order_of_a_batch_comes_from_the_seed(calls: DriverCalls) -> None:
    orders = set()
    for seed in range(8):
        calls.driver.reset()
        calls = DriverCalls(calls.driver)
        calls.driver.set_shuffle_seed(seed)
        device, host, stream = calls.allocate(64), calls.pinned(4 * KIB), calls.stream()
        # Frozen one copy before the last: what was written until then is the order.
        copies = [(device + i, host.address + i, 1) for i in range(2)]
        copies.append((host.address + 64, device + 32, 1))
        calls.driver.freeze(Engine.DEVICE_TO_HOST)
        calls.copy_batch(copies, stream)
        deadline = time.monotonic() + 0.05
        while time.monotonic() < deadline and calls.driver.count("bytes_h2d") < 2:
            time.sleep(0.001)
        orders.add(calls.driver.count("bytes_h2d"))
        calls.driver.thaw(Engine.DEVICE_TO_HOST)
        calls.synchronize(stream)
    assert orders == {0, 1, 2}


def test_a_batch_says_which_copy_is_wrong(calls: DriverCalls) -> None:
    device, host, stream = calls.allocate(64), calls.pinned(4 * KIB), calls.stream()
    with pytest.raises(DriverError) as caught:
        calls.copy_batch([(device, host.address, 8), (device + 8, host.address, 0)], stream)
    assert (caught.value.result, caught.value.failed_index) == (1, 1)
    with pytest.raises(DriverError) as caught:
        calls.copy_batch([(device, host.address, 8)], stream, order=4)
    assert (caught.value.result, caught.value.failed_index) == (1, (1 << 64) - 1)
    assert calls.driver.count("copies") == 0


def test_streams_share_an_engine(calls: DriverCalls) -> None:
    # 20 ms each: two in one direction need 40 together, two in both directions do not.
    calls.driver.set_bandwidth(Engine.HOST_TO_DEVICE, 50 * 4 * KIB)
    calls.driver.set_latency(Engine.DEVICE_TO_HOST, 0.02)
    device, host = calls.allocate(16 * KIB), calls.pinned(16 * KIB)
    streams = [calls.stream() for _ in range(3)]
    start = time.monotonic()
    for i in range(2):
        calls.copy(device + 4 * KIB * i, host.address + 4 * KIB * i, 4 * KIB, streams[i])
    calls.copy(host.address + 8 * KIB, device + 8 * KIB, 4 * KIB, streams[2])
    for stream in streams:
        calls.synchronize(stream)
    assert time.monotonic() - start > 0.039


def test_events(calls: DriverCalls) -> None:
    device, host, stream = calls.allocate(64), calls.pinned(4 * KIB), calls.stream()
    assert calls.is_ready("cuEventQuery", calls.event())
    start = calls.record(stream, flags=0)
    calls.driver.freeze(Engine.HOST_TO_DEVICE)
    calls.copy(device, host.address, 64, stream)
    end = calls.record(stream, flags=0)
    milliseconds = ctypes.c_float()
    assert calls.result("cuEventElapsedTime", ctypes.byref(milliseconds), start, end) == 600
    assert not calls.is_ready("cuEventQuery", end)
    threading.Timer(0.02, calls.driver.thaw, [Engine.HOST_TO_DEVICE]).start()
    calls.call("cuEventSynchronize", end)
    calls.call("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
    assert milliseconds.value > 0
    calls.call("cuEventDestroy", end)
    assert calls.result("cuEventQuery", end) == 400
    assert calls.driver.count("live_events") == 2


def test_a_destroyed_stream_finishes_its_work(calls: DriverCalls) -> None:
    device, host, stream = calls.allocate(64), calls.pinned(4 * KIB), calls.stream()
    host.data[:3] = b"kvx"
    calls.driver.freeze(Engine.HOST_TO_DEVICE)
    calls.copy(device, host.address, 3, stream)
    end = calls.record(stream)
    calls.call("cuStreamDestroy", stream)
    assert calls.result("cuStreamQuery", stream) == 400
    calls.driver.thaw(Engine.HOST_TO_DEVICE)
    calls.call("cuEventSynchronize", end)
    assert calls.driver.read(device, 3) == b"kvx"
    assert calls.driver.count("live_streams") == 0


def test_values_hold_and_release_streams(calls: DriverCalls) -> None:
    words, stream, other = calls.pinned(4 * KIB), calls.stream(), calls.stream()
    calls.wait_value(stream, words.address, 3)
    calls.write_value(stream, words.address + 4, 9)
    words.data[0] = 2
    time.sleep(0.01)
    assert not calls.is_ready("cuStreamQuery", stream)
    assert words.data[4] == 0
    calls.write_value(other, words.address, 4)
    calls.synchronize(stream)
    assert words.data[4] == 9


def test_failures_on_order(calls: DriverCalls) -> None:
    calls.driver.inject("cuMemAlloc", 2, nth=2)
    results = [calls.result("cuMemAlloc", ctypes.byref(ctypes.c_uint64()), 1) for _ in range(3)]
    assert results == [0, 2, 0]
    stream = calls.stream()
    calls.driver.inject("cuStreamQuery", 719, is_sticky=True)
    assert [calls.result("cuStreamQuery", stream) for _ in range(2)] == [719, 719]
    assert calls.result("cuMemAlloc", ctypes.byref(ctypes.c_uint64()), 1) == 719
    calls.call("cuDevicePrimaryCtxRelease", ctypes.c_int(0))
    DriverCalls(calls.driver).allocate(1)


def test_who_waits_learns_of_a_lost_context(calls: DriverCalls) -> None:
    device, host, stream = calls.allocate(64), calls.pinned(4 * KIB), calls.stream()
    calls.driver.freeze(Engine.HOST_TO_DEVICE)
    calls.copy(device, host.address, 64, stream)
    threading.Timer(0.02, calls.driver.fail_context, [214]).start()
    with pytest.raises(DriverError) as caught:
        calls.synchronize(stream)
    assert caught.value.result == 214


def test_calls_can_be_delayed(calls: DriverCalls) -> None:
    calls.driver.delay("cuMemGetInfo", 0.02)
    start = time.monotonic()
    calls.call("cuMemGetInfo", ctypes.byref(ctypes.c_size_t()), ctypes.byref(ctypes.c_size_t()))
    assert time.monotonic() - start > 0.019


def test_virtual_memory(calls: DriverCalls) -> None:
    size = 2 * GRANULARITY
    address = calls.number("cuMemAddressReserve", size, 0, 0, 0)
    handles = [calls.create_memory() for _ in range(2)]
    for i, handle in enumerate(handles):
        calls.call("cuMemMap", address + i * GRANULARITY, GRANULARITY, 0, handle, 0)
        calls.call("cuMemRelease", handle)
    calls.set_access(address, size)
    host, stream = calls.pinned(4 * KIB), calls.stream()
    host.data[:8] = b"straddle"
    calls.copy(address + GRANULARITY - 4, host.address, 8, stream)
    calls.synchronize(stream)
    assert calls.driver.read(address + GRANULARITY - 4, 8) == b"straddle"
    assert calls.result("cuMemAddressFree", address, size) == 1
    calls.call("cuMemUnmap", address, size)
    calls.call("cuMemAddressFree", address, size)
    assert calls.driver.count("live_allocations") == 0


def test_a_reset_ends_everything(calls: DriverCalls) -> None:
    device, host, stream = calls.allocate(64), calls.pinned(4 * KIB), calls.stream()
    calls.wait_value(stream, host.address, 1)
    calls.copy(device, host.address, 64, stream)
    calls.driver.reset()
    names = ("live_streams", "live_events", "live_allocations", "live_registrations", "copies")
    assert [calls.driver.count(name) for name in names] == [0] * 5
    assert DriverCalls(calls.driver).result("cuStreamQuery", stream) == 400
