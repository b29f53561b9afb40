"""A GPU under test, real or simulated, and what a test makes on it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvx.errors import UnavailableError
from kvx.transfer.codes import Code
from kvx.transfer.memory import MemoryRegion
from kvx_ext import _core
from tests.sim.cuda_driver import SimulatedDriver

REAL_LIBRARY = "libcuda.so.1"
SIZES = tuple(4096 << i for i in range(11))
PATIENCE_S = 30.0
_PIECE_BYTES = 4 << 20
# No test waits for more.
_OPEN = 1 << 20

Bytes = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.uint64]


def why_no_real_gpu() -> str:
    """Return why none can be tested in this process; empty where one can."""
    try:
        if hasattr(ctypes.CDLL(REAL_LIBRARY), "kvxsim_reset"):
            return "the simulated driver is loaded in its place: run the real ones by themselves"
        devices = _core.list_cuda_devices(REAL_LIBRARY)
    except (OSError, UnavailableError) as error:
        return str(error)
    return "" if devices else "the driver sees no device"


class Access(Protocol):
    """Device memory as the test itself reads and writes it, when nothing else does."""

    def write(self, target: int, data: bytes) -> None:
        """Write bytes at a device address."""

    def read(self, source: int, num_bytes: int) -> bytes:
        """Read bytes from a device address."""

    def close(self) -> None:
        """Give up what it needs."""


class CopiedAccess:
    """Through plain copies, for want of another way to a real device's memory."""

    def __init__(self, device: _core.Device) -> None:
        self._region = MemoryRegion(_PIECE_BYTES)
        self._range = device.pin(self._region.address, _PIECE_BYTES)
        self._copies = _core.Copies(device, sm="never")

    def write(self, target: int, data: bytes) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            self._region.array()[: len(piece)] = np.frombuffer(piece, np.uint8)
            self._copy("h2d", target + start, self._region.address, len(piece))

    def read(self, source: int, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            size = min(_PIECE_BYTES, num_bytes - len(data))
            self._copy("d2h", self._region.address, source + len(data), size)
            data += self._region.array()[:size].tobytes()
        return bytes(data)

    def close(self) -> None:
        assert self._copies.close(PATIENCE_S) == 0
        self._range.close()

    def _copy(self, direction: str, target: int, source: int, num_bytes: int) -> None:
        copy_one(self._copies, direction, target, source, num_bytes)


class SimulatedAccess:
    """By the simulated driver's own back door."""

    def __init__(self, driver: SimulatedDriver) -> None:
        self._driver = driver

    def write(self, target: int, data: bytes) -> None:
        self._driver.write(target, data)

    def read(self, source: int, num_bytes: int) -> bytes:
        return self._driver.read(source, num_bytes)

    def close(self) -> None:
        pass


class Gpu:
    """A device, and everything a test makes on it, closed behind the test.

    Attributes:
        library: The driver, as another process opens it too.
        is_real: Whether bytes cross a link.
    """

    def __init__(
        self, device: _core.Device, library: str, access: Access, *, is_real: bool
    ) -> None:
        self._device: _core.Device | None = device
        self.library = library
        self.is_real = is_real
        self._access = access
        self._made = contextlib.ExitStack()
        self._copies: list[_core.Copies] = []
        self._gates: list[_core.Gate] = []
        self._regions: list[MemoryRegion] = []

    @property
    def device(self) -> _core.Device:
        assert self._device is not None, "the test is over"
        return self._device

    def write(self, target: int, data: bytes | npt.NDArray[np.generic]) -> None:
        """Write device memory, at once."""
        self._access.write(target, data if isinstance(data, bytes) else data.tobytes())

    def read(self, source: int, num_bytes: int) -> bytes:
        """Read device memory, at once."""
        return self._access.read(source, num_bytes)

    def memory(self, num_bytes: int, *, is_exportable: bool = False) -> _core.DeviceMemory:
        """Allocate device memory that is freed behind the test."""
        memory = self.device.allocate(num_bytes, is_exportable=is_exportable)
        self._made.callback(memory.close)
        return memory

    def placed(self, data: npt.NDArray[np.generic]) -> int:
        """Return the address of a copy of an array in device memory."""
        memory = self.memory(max(data.nbytes, 1))
        self.write(memory.address, data)
        return memory.address

    def host(self, num_bytes: int) -> Bytes:
        """Return (num_bytes,) pinned memory."""
        region = MemoryRegion(num_bytes)
        pinned = self.device.pin(region.address, region.size_bytes)
        self._made.callback(pinned.close)
        # Memory must not go before it is unpinned.
        self._regions.append(region)
        assert pinned.wait(PATIENCE_S)
        array: Bytes = region.array()[:num_bytes]
        return array

    def stream(self) -> int:
        """Make a stream."""
        stream = self.device.create_stream()
        self._made.callback(self.device.destroy_stream, stream)
        return stream

    def gate(self) -> _core.Gate:
        """Make a gate that opens behind the test, so that one that fails leaves no stream stuck."""
        self._gates.append(self.device.make_gate())
        return self._gates[-1]

    def copies(self, **options: object) -> _core.Copies:
        """Open copies with options of `_core.Copies`."""
        self._copies.append(_core.Copies(self.device, **options))
        return self._copies[-1]

    def close(self) -> None:
        """Give up all that was made, and the device."""
        for gate in self._gates:
            gate.advance(_OPEN)
        self._gates.clear()
        abandoned = sum(copies.close(PATIENCE_S) for copies in self._copies)
        self._copies.clear()
        self._made.close()
        self._regions.clear()
        self._access.close()
        health = self.device.health()
        self._device = None
        assert abandoned == 0
        assert not health


@contextlib.contextmanager
def on_real(device: _core.Device) -> Iterator[Gpu]:
    """Test on a device of this machine."""
    gpu = Gpu(device, REAL_LIBRARY, CopiedAccess(device), is_real=True)
    with contextlib.closing(gpu):
        yield gpu


@contextlib.contextmanager
def on_simulated(driver: SimulatedDriver) -> Iterator[Gpu]:
    """Test on the simulated driver; nothing may be left in it."""
    library = str(driver.path)
    device = _core.open_cuda_device(library)
    gpu = Gpu(device, library, SimulatedAccess(driver), is_real=False)
    del device
    with contextlib.closing(gpu):
        yield gpu
    kinds = ("live_allocations", "live_registrations", "live_streams", "live_events")
    left = {kind: driver.count(kind) for kind in kinds}
    assert not any(left.values()), left


def forcing(method: str) -> npt.NDArray[np.float64]:
    """Return a calibration in which one method alone has rates, so that it is what is planned."""
    gb_s = np.zeros((len(_core.copy_directions()), len(_core.copy_methods()), len(SIZES)))
    gb_s[:, _core.copy_methods().index(method)] = 1.0
    return gb_s


def one(value: int) -> Addresses:
    """Return what a list of a single run holds."""
    return np.array([value], np.uint64)


def copy_one(
    copies: _core.Copies, direction: str, target: int, source: int, num_bytes: int
) -> None:
    """Copy one run to its end."""
    copy_runs(copies, direction, one(target), one(source), one(num_bytes))


def copy_runs(
    copies: _core.Copies,
    direction: str,
    targets: Addresses,
    sources: Addresses,
    sizes: Addresses,
    *,
    after: _core.StreamMark | None = None,
) -> None:
    """Copy runs to their end."""
    ticket = copies.submit(direction, targets, sources, sizes, after=after)
    assert Code(copies.wait(ticket, PATIENCE_S)) is Code.OK


def address_of(array: Bytes) -> int:
    """Return where an array lies."""
    return int(array.ctypes.data)


def random_bytes(num_bytes: int, seed: int) -> Bytes:
    """Return (num_bytes,) bytes that a seed makes."""
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
