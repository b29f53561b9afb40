"""The other process of the sharing tests: reads one request a line, answers one a line."""

from __future__ import annotations

import ctypes
import json
import os
import sys

from tests.sim.cuda_calls import GRANULARITY, DriverCalls, IpcHandle
from tests.sim.cuda_driver import SimulatedDriver


class Peer:
    """What a peer can be asked for; methods take and return what JSON can carry."""

    def __init__(self) -> None:
        self.driver = SimulatedDriver()
        self.calls = DriverCalls(self.driver)
        self.stream = self.calls.stream()
        self.event = self.calls.event(2 | 4)

    def export_memory(self, text: str) -> list[object]:
        address = self.calls.allocate(64)
        self.driver.write(address, text.encode())
        handle = IpcHandle()
        self.calls.call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return [address, bytes(handle).hex()]

    def export_event(self) -> str:
        """Record an event that only `open_gate` lets happen."""
        self.gate = self.calls.pinned(4096)
        self.calls.wait_value(self.stream, self.gate.address, 1)
        self.calls.call("cuEventRecord", self.event, self.stream)
        handle = IpcHandle()
        self.calls.call("cuIpcGetEventHandle", ctypes.byref(handle), self.event)
        return bytes(handle).hex()

    def open_gate(self) -> None:
        self.gate.data[0] = 1

    def export_mapped(self, text: str) -> list[int]:
        memory = self.calls.create_memory()
        address = self.calls.number("cuMemAddressReserve", GRANULARITY, 0, 0, 0)
        self.calls.call("cuMemMap", address, GRANULARITY, 0, memory, 0)
        self.calls.set_access(address)
        self.driver.write(address, text.encode())
        descriptor = ctypes.c_int()
        one, zero = ctypes.c_int(1), ctypes.c_uint64(0)
        self.calls.call("cuMemExportToShareableHandle", ctypes.byref(descriptor), memory, one, zero)
        return [os.getpid(), descriptor.value]

    def read(self, address: int, num_bytes: int) -> str:
        return self.driver.read(address, num_bytes).decode()


def main() -> None:
    peer = Peer()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        sys.stdout.write(json.dumps(getattr(peer, name)(*arguments)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
