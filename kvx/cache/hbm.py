"""The HBM tier: blocks that stay in device memory, a copy inside the device away from the engine.

What is here is in DRAM too when it arrives, and outlives it there: each block has the checksum
that was taken in host memory, which is checked again when the block goes back there. A copy inside
the device is not checksummed: no CPU sees the bytes, and kvx leaves the compute units alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.cache.arena import Arena
from kvx.cache.memory_tier import MemoryTier

if TYPE_CHECKING:
    from kvx.tier_config import HbmTierConfig
    from kvx_ext import _core


class HbmTier(MemoryTier):
    """Device memory under one capacity, for blocks of any size.

    Attributes:
        config: The tier's configuration.
    """

    def __init__(
        self, config: HbmTierConfig, device: _core.Device, history: _core.MissHistory
    ) -> None:
        """Allocate the memory.

        Raises:
            CapacityError: The device does not have that much free.
        """
        self.config = config
        memory = device.allocate(config.capacity_bytes)

        def let_go(is_abandoned: bool) -> None:  # noqa: FBT001
            if not is_abandoned:
                memory.close()

        arena = Arena("HBM", memory.address, config.capacity_bytes, config.extent_bytes, let_go)
        super().__init__(arena, config.eviction, history)
