"""Blocks in device memory that a test reads and writes like an array."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvx_ext import _core
from tests.gpu.rig import Access, Bytes, CopiedAccess, SimulatedAccess
from tests.sim.cuda_driver import SimulatedDriver


class DeviceBlocks:
    """(num_blocks, block_bytes) uint8 on a device; every use copies all of it.

    Attributes:
        memory: What they lie in.
        shape: As of an array.
    """

    def __init__(
        self, device: _core.Device, driver: SimulatedDriver | None, *, num_blocks: int,
        block_bytes: int, is_exportable: bool = False,
    ) -> None:  # fmt: skip
        self.shape = (num_blocks, block_bytes)
        self.memory = device.allocate(num_blocks * block_bytes, is_exportable=is_exportable)
        self._access: Access = CopiedAccess(device) if driver is None else SimulatedAccess(driver)
        self[:] = 0

    def array(self) -> Bytes:
        """Return a copy of them."""
        data = self._access.read(self.memory.address, self.shape[0] * self.shape[1])
        return np.frombuffer(data, np.uint8).reshape(self.shape).copy()

    def __getitem__(self, key: Any) -> Any:
        return self.array()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        content = np.zeros(self.shape, np.uint8) if key == slice(None) else self.array()
        content[key] = np.asarray(value)
        self._access.write(self.memory.address, content.tobytes())

    def __eq__(self, other: object) -> Any:
        return self.array() == other

    __hash__ = None  # type: ignore[assignment]

    def reshape(self, *shape: int) -> Bytes:
        """Return a copy of another shape."""
        return self.array().reshape(*shape)

    def close(self) -> None:
        """Free them."""
        self._access.close()
        self.memory.close()
