"""The cache's suite on device memory: a space whose blocks go through the simulated GPU.

`DeviceSpace` takes and fills the same NumPy arrays as `CacheSpace`, and puts them into memory of
the simulated device and back, so that one test covers both.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

import kvx
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    import numpy.typing as npt

    from tests.sim.cuda_driver import SimulatedDriver


@dataclass(frozen=True, slots=True)
class Gpu:
    """The simulated GPU that the blocks of a test lie on."""

    driver: SimulatedDriver
    device: _core.Device


_in_use: list[Gpu] = []


@contextmanager
def use(driver: SimulatedDriver) -> Iterator[Gpu]:
    """Let `wrapped` put blocks into device memory meanwhile."""
    _in_use.append(Gpu(driver, _core.open_cuda_device(str(driver.path))))
    try:
        yield _in_use[-1]
    finally:
        _in_use.pop().device.close()


def is_in_use() -> bool:
    """Return whether the blocks of the test at hand lie in device memory."""
    return bool(_in_use)


def wrapped(space: kvx.CacheSpace) -> kvx.CacheSpace:
    """Return the space itself, or one that works on the GPU in use."""
    if not _in_use:
        return space
    return cast("kvx.CacheSpace", DeviceSpace(space, _in_use[-1].device, _in_use[-1].driver))


class DeviceArray:
    """A (n, bytes) uint8 array in device memory, as CuPy and torch offer theirs."""

    def __init__(self, device: _core.Device, shape: tuple[int, int], row_bytes: int = 0) -> None:
        """Allocate it; rows may lie `row_bytes` apart."""
        self.shape = shape
        self.row_bytes = row_bytes or shape[1]
        self.memory = device.allocate(max(1, shape[0] * self.row_bytes))

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Say where it lies."""
        return {
            "shape": self.shape,
            "typestr": "|u1",
            "data": (self.memory.address, False),
            "strides": (self.row_bytes, 1),
            "version": 3,
            "stream": None,
        }

    def upload(self, driver: SimulatedDriver, rows: npt.NDArray[np.uint8]) -> None:
        """Set its bytes."""
        for place, row in enumerate(rows):
            driver.write(self.memory.address + place * self.row_bytes, row.tobytes())

    def download(self, driver: SimulatedDriver) -> npt.NDArray[np.uint8]:
        """Return its bytes."""
        rows = [
            driver.read(self.memory.address + place * self.row_bytes, self.shape[1])
            for place in range(self.shape[0])
        ]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(self.shape)


class DeviceTransfer:
    """A transfer that brings its device target back into the array it stands for."""

    def __init__(
        self, inner: kvx.Transfer[kvx.TransferResult], bring_back: Callable[[], None]
    ) -> None:
        """Wrap a transfer."""
        self._inner = inner
        self._bring_back = bring_back

    def wait(self, timeout_s: float | None = None) -> kvx.TransferResult:
        """Wait, and bring back what has come, also after a failure."""
        try:
            return self._inner.wait(timeout_s)
        finally:
            self._settle()

    def wait_quiesced(self, timeout_s: float) -> bool:
        """Wait until nothing moves any more, and bring back what has come."""
        is_quiet = self._inner.wait_quiesced(timeout_s)
        self._settle()
        return is_quiet

    def poll(self) -> kvx.TransferState:
        """Return the state now."""
        self._settle()
        return self._inner.poll()

    def __await__(self) -> Generator[object, None, kvx.TransferResult]:
        """Await it."""
        try:
            result = yield from self._inner.__await__()
        finally:
            self._settle()
        return result

    def __getattr__(self, name: str) -> object:
        """Hand on the rest."""
        return getattr(self._inner, name)

    def _settle(self) -> None:
        # What hangs for good is left alone, as an engine would have to.
        if self._inner.poll() is not kvx.TransferState.PENDING and self._inner.wait_quiesced(0.0):
            self._bring_back()
            self._bring_back = lambda: None


class DeviceSpace:
    """A `CacheSpace` whose blocks lie in memory of the simulated device."""

    def __init__(
        self, inner: kvx.CacheSpace, device: _core.Device, driver: SimulatedDriver
    ) -> None:
        """Wrap a space of a cache that uses this device."""
        self._inner = inner
        self._device = device
        self._driver = driver

    def offload(self, hashes: object, source: object, **options: object) -> object:
        """Put the blocks on the device, and offload them from there."""
        if not _is_blocks(source):
            return self._inner.offload(hashes, source, **options)  # type: ignore[arg-type]
        array = self._upload(source)
        blocks = kvx.BlockView.of_blocks(array).slots(range(len(source)))  # type: ignore[arg-type]
        return self._inner.offload(hashes, blocks, **options)  # type: ignore[arg-type]

    def onboard(self, hashes: object, target: object, **options: object) -> object:
        """Onboard into device memory, and bring it back when the transfer is over."""
        if not _is_blocks(target) or not target.flags.writeable:  # type: ignore[attr-defined]
            return self._inner.onboard(hashes, target, **options)  # type: ignore[arg-type]
        array = self._upload(target)
        blocks = kvx.BlockView.of_blocks(array).slots(range(len(target)))  # type: ignore[arg-type]
        inner = self._inner.onboard(hashes, blocks, **options)  # type: ignore[arg-type]

        def bring_back() -> None:
            target[:] = array.download(self._driver)  # type: ignore[index]

        return DeviceTransfer(inner, bring_back)

    def __getattr__(self, name: str) -> object:
        """Hand on the other verbs."""
        return getattr(self._inner, name)

    def _upload(self, rows: object) -> DeviceArray:
        assert isinstance(rows, np.ndarray), "checked by the callers"
        array = DeviceArray(self._device, (rows.shape[0], rows.shape[1]))
        array.upload(self._driver, rows)
        return array


def _is_blocks(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype == np.uint8
