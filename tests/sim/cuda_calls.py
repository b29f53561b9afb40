"""The driver's own interface, for tests of the simulated one: a method a call, errors raised."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from typing import Literal

from tests.sim.cuda_driver import SimulatedDriver

STREAM, DURING_CALL, ANY = 1, 2, 3
NOT_READY = 600
GRANULARITY = 2 << 20
_POINTERS = ctypes.c_uint64


class DriverError(Exception):
    """A call returned something else than 0, which is `result`."""

    def __init__(self, symbol: str, result: int, failed_index: int | None = None) -> None:
        super().__init__(f"{symbol}: {result}")
        self.result = result
        self.failed_index = failed_index


class MemLocation(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", MemLocation),
        ("target_hint", MemLocation),
        ("flags", ctypes.c_uint),
    )


class AllocationProperties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", MemLocation),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_uint8 * 8),
    )


class AccessDescriptor(ctypes.Structure):
    _fields_ = (("location", MemLocation), ("flags", ctypes.c_int))


class IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


def _copy_end(end: str) -> tuple[tuple[str, type], ...]:
    return (
        (f"{end}_x_bytes", ctypes.c_size_t),
        (f"{end}_y", ctypes.c_size_t),
        (f"{end}_type", ctypes.c_int),
        (f"{end}_host", ctypes.c_void_p),
        (f"{end}_device", ctypes.c_uint64),
        (f"{end}_array", ctypes.c_void_p),
        (f"{end}_pitch", ctypes.c_size_t),
    )


class Copy2D(ctypes.Structure):
    _fields_ = (
        *_copy_end("source"),
        *_copy_end("target"),
        ("width_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class HostMemory:
    """Pages of the host that can be handed to the driver; `data` is their bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.data = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        self.num_bytes = num_bytes


def until(is_so: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Wait without asking the driver to wait.

    Raises:
        TimeoutError: It is not so by then.
    """
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.001)


class DriverCalls:
    """Calls of one thread with device 0 current. Handles and addresses are ints."""

    def __init__(self, driver: SimulatedDriver, *, device: int = 0) -> None:
        self.driver = driver
        self.call("cuInit", ctypes.c_uint(0))
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(device))
        self.context = int(context.value or 0)
        self.call("cuCtxSetCurrent", context)

    def result(self, symbol: str, *arguments: object) -> int:
        """Call an entry point; ints are 64 bits wide unless they are wrapped."""
        wrapped = [_POINTERS(a) if isinstance(a, int) else a for a in arguments]
        function = getattr(self.driver.library, symbol)
        function.restype = ctypes.c_int
        code: int = function(*wrapped)
        return code

    def call(self, symbol: str, *arguments: object) -> None:
        if (code := self.result(symbol, *arguments)) != 0:
            raise DriverError(symbol, code)

    def number(self, symbol: str, *arguments: object) -> int:
        """Call an entry point whose first parameter is a 64-bit result."""
        value = ctypes.c_uint64()
        self.call(symbol, ctypes.byref(value), *arguments)
        return value.value

    def allocate(self, num_bytes: int) -> int:
        return self.number("cuMemAlloc", num_bytes)

    def pinned(self, num_bytes: int) -> HostMemory:
        memory = HostMemory(num_bytes)
        self.register(memory.address, num_bytes)
        return memory

    def register(self, address: int, num_bytes: int) -> None:
        self.call("cuMemHostRegister", address, num_bytes, ctypes.c_uint(1))

    def stream(self) -> int:
        return self.number("cuStreamCreateWithPriority", ctypes.c_uint(1), ctypes.c_int(0))

    def event(self, flags: int = 2) -> int:
        return self.number("cuEventCreate", ctypes.c_uint(flags))

    def record(self, stream: int, *, flags: int = 2) -> int:
        """Record a new event."""
        event = self.event(flags)
        self.call("cuEventRecord", event, stream)
        return event

    def wait_event(self, stream: int, event: int) -> None:
        self.call("cuStreamWaitEvent", stream, event, ctypes.c_uint(0))

    def synchronize(self, stream: int) -> None:
        self.call("cuStreamSynchronize", stream)

    def is_ready(self, symbol: Literal["cuStreamQuery", "cuEventQuery"], handle: int) -> bool:
        code = self.result(symbol, handle)
        if code not in {0, NOT_READY}:
            raise DriverError(symbol, code)
        return code == 0

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self.call("cuMemcpyAsync", target, source, num_bytes, stream)

    def copy_batch(
        self,
        copies: Sequence[tuple[int, int, int]],
        stream: int,
        *,
        order: int = STREAM,
    ) -> None:
        """Copy (target, source, bytes) in one call."""
        count = len(copies)
        columns = [(ctypes.c_uint64 * count)(*column) for column in zip(*copies, strict=True)]
        attributes = CopyAttributes(source_access_order=order)
        failed = ctypes.c_size_t()
        code = self.result(
            "cuMemcpyBatchAsync", *columns, count, ctypes.byref(attributes),
            ctypes.byref(ctypes.c_size_t(0)), 1, ctypes.byref(failed), stream,
        )  # fmt: skip
        if code != 0:
            raise DriverError("cuMemcpyBatchAsync", code, failed.value)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        number, flags = ctypes.c_uint32(value), ctypes.c_uint(0)
        self.call("cuStreamWaitValue32", stream, address, number, flags)

    def write_value(self, stream: int, address: int, value: int) -> None:
        number, flags = ctypes.c_uint32(value), ctypes.c_uint(0)
        self.call("cuStreamWriteValue32", stream, address, number, flags)

    def create_memory(self, num_bytes: int = GRANULARITY) -> int:
        """Create memory without an address that can be exported."""
        properties = AllocationProperties(type=1, handle_types=1, location=MemLocation(1, 0))
        return self.number("cuMemCreate", num_bytes, ctypes.byref(properties), 0)

    def set_access(self, address: int, num_bytes: int = GRANULARITY) -> None:
        access = AccessDescriptor(MemLocation(1, 0), 3)
        self.call("cuMemSetAccess", address, num_bytes, ctypes.byref(access), 1)
