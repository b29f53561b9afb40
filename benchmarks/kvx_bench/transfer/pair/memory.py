"""Memory of one side of a transfer, on the host or on a device, that is filled and looked at."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

import numpy as np

import kvx
from kvx.errors import TransferError, UsageError
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

KINDS = ("host", "device")
_PATIENCE_S = 60.0


class BenchMemory(Protocol):
    """Bytes to move."""

    num_bytes: int

    def registrable(self) -> object:
        """Return what `Agent.register` takes."""

    def load(self) -> npt.NDArray[np.uint8]:
        """Return (num_bytes,) uint8 on the host that holds what the memory holds."""

    def store(self, content: npt.NDArray[np.uint8]) -> None:
        """Make the memory hold what `load` returned and was changed since."""

    def close(self) -> None:
        """Let it go."""


class HostMemory:
    """A shared region whose pages are all there."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._region = kvx.MemoryRegion(num_bytes, is_shared=True)
        self._region.prefault()

    def registrable(self) -> kvx.MemoryRegion:
        """See `BenchMemory`."""
        return self._region

    def load(self) -> npt.NDArray[np.uint8]:
        """Return the memory itself."""
        content: npt.NDArray[np.uint8] = self._region.array()[: self.num_bytes]
        return content

    def store(self, content: npt.NDArray[np.uint8]) -> None:
        """Do nothing: it was changed in place."""

    def close(self) -> None:
        """Do nothing: the region goes with the last who uses it."""


class DeviceMemory:
    """Memory of a device, and as much on the host to look at it."""

    def __init__(self, num_bytes: int, device: _core.Device) -> None:
        self.num_bytes = num_bytes
        self._made = contextlib.ExitStack()
        self._memory = self._made.enter_context(device.allocate(num_bytes))
        self._copies = self._made.enter_context(_core.Copies(device, sm="never"))
        self._host = HostMemory(num_bytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """As others take device memory."""
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self._memory.address, False),
            "version": 3,
        }

    def registrable(self) -> DeviceMemory:
        """See `BenchMemory`."""
        return self

    def load(self) -> npt.NDArray[np.uint8]:
        """Return a copy."""
        content = self._host.load()
        self._copy("d2h", content.ctypes.data, self._memory.address)
        return content

    def store(self, content: npt.NDArray[np.uint8]) -> None:
        """Copy it back."""
        self._copy("h2d", self._memory.address, content.ctypes.data)

    def close(self) -> None:
        """Free it."""
        self._made.close()

    def _copy(self, direction: str, target: int, source: int) -> None:
        targets, sources, sizes = (
            np.array([value], np.uint64) for value in (target, source, self.num_bytes)
        )
        ticket = self._copies.submit(direction, targets, sources, sizes)
        code = self._copies.wait(ticket, _PATIENCE_S)
        if code != 0:
            raise TransferError(f"{self.num_bytes} bytes were not copied {direction}: code {code}")


def open_memory(kind: str, num_bytes: int, driver: str) -> BenchMemory:
    """Return memory of a kind.

    Raises:
        UnavailableError: There is no device.
    """
    if kind not in KINDS:
        raise UsageError(f"memory {kind!r}; accepted: {', '.join(KINDS)}")
    if kind == "host":
        return HostMemory(num_bytes)
    return DeviceMemory(num_bytes, _core.open_cuda_device(driver))
