"""Host memory of our own that a device copies to and from at full speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.transfer.memory import MemoryRegion

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx_ext import _core


class PinnedRegion:
    """A region, pinned until `close`.

    Attributes:
        region: The memory, which stays when it is not pinned any more.
        array: (size_bytes,) uint8, that memory.
    """

    def __init__(self, device: _core.Device, size_bytes: int) -> None:
        """Map and pin it.

        Raises:
            CapacityError: There is not that much memory.
        """
        self.region = MemoryRegion(size_bytes, is_shared=True)
        self.array: npt.NDArray[np.uint8] = self.region.array()
        self._pinned = device.pin(self.region.address, self.region.size_bytes)

    @property
    def address(self) -> int:
        """Of the first byte."""
        return self.region.address

    @property
    def size_bytes(self) -> int:
        """Size."""
        return self.region.size_bytes

    def close(self) -> None:
        """Unpin it. REQUIRES: no copy on it is in flight."""
        self._pinned.close()
