"""The simulated CUDA driver between two processes: memory and events that both have."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

import pytest

from tests.sim.cuda_calls import GRANULARITY, DriverCalls, IpcHandle
from tests.sim.cuda_driver import SimulatedDriver


class Peer:
    """Asks the process of `cuda_peer`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.sim.cuda_peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str, *arguments: object) -> Any:
        requests = cast("IO[str]", self._process.stdin)
        requests.write(json.dumps([name, *arguments]) + "\n")
        requests.flush()
        return json.loads(cast("IO[str]", self._process.stdout).readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture
def calls(simulated_driver: SimulatedDriver) -> DriverCalls:
    return DriverCalls(simulated_driver)


@pytest.fixture
def peer(loaded_driver: SimulatedDriver) -> Iterator[Peer]:
    assert loaded_driver.path.exists()
    started = Peer()
    yield started
    started.close()


def open_memory(calls: DriverCalls, handle: str) -> int:
    # The flag asks for access between peers, without which a driver refuses.
    ticket = IpcHandle.from_buffer_copy(bytes.fromhex(handle))
    return calls.number("cuIpcOpenMemHandle", ticket, ctypes.c_uint(1))


def test_memory_of_another_process(calls: DriverCalls, peer: Peer) -> None:
    theirs, handle = peer.ask("export_memory", "from the peer")
    address = open_memory(calls, handle)
    assert calls.driver.read(address, 13) == b"from the peer"
    host, stream = calls.pinned(4096), calls.stream()
    host.data[:6] = b"to it!"
    calls.copy(address, host.address, 6, stream)
    calls.synchronize(stream)
    assert peer.ask("read", theirs, 6) == "to it!"
    # Opened twice it is one memory, closed twice it is gone.
    assert open_memory(calls, handle) == address
    for _ in range(2):
        calls.call("cuIpcCloseMemHandle", address)
    assert calls.result("cuIpcCloseMemHandle", address) == 1


def test_memory_of_this_process_is_not_opened(calls: DriverCalls) -> None:
    handle = IpcHandle()
    calls.call("cuIpcGetMemHandle", ctypes.byref(handle), calls.allocate(64))
    opened = ctypes.c_uint64()
    refused = calls.result("cuIpcOpenMemHandle", ctypes.byref(opened), handle, ctypes.c_uint(1))
    assert refused == 201


def test_mapped_memory_has_no_such_handle(calls: DriverCalls) -> None:
    address = calls.number("cuMemAddressReserve", GRANULARITY, 0, 0, 0)
    calls.call("cuMemMap", address, GRANULARITY, 0, calls.create_memory(), 0)
    assert calls.result("cuIpcGetMemHandle", ctypes.byref(IpcHandle()), address) == 1


def test_mapped_memory_travels_as_a_descriptor(calls: DriverCalls, peer: Peer) -> None:
    process, descriptor = peer.ask("export_mapped", "mapped")
    received = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    kind = ctypes.c_int(1)
    memory = calls.number("cuMemImportFromShareableHandle", ctypes.c_void_p(received), kind)
    os.close(received)
    address = calls.number("cuMemAddressReserve", GRANULARITY, 0, 0, 0)
    calls.call("cuMemMap", address, GRANULARITY, 0, memory, 0)
    calls.set_access(address)
    assert calls.driver.read(address, 6) == b"mapped"


def test_an_event_of_another_process(calls: DriverCalls, peer: Peer) -> None:
    handle = IpcHandle.from_buffer_copy(bytes.fromhex(peer.ask("export_event")))
    event = calls.number("cuIpcOpenEventHandle", handle)
    stream = calls.stream()
    calls.wait_event(stream, event)
    assert not calls.is_ready("cuEventQuery", event)
    assert not calls.is_ready("cuStreamQuery", stream)
    peer.ask("open_gate")
    calls.call("cuEventSynchronize", event)
    calls.synchronize(stream)
    assert calls.is_ready("cuEventQuery", event)
