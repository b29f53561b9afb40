"""The DRAM tier: blocks in host memory.

Every block passes through here: offloads land here first, and what is read from lower tiers lands
here on its way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.cache.arena import Arena
from kvx.cache.memory_tier import MemoryTier
from kvx.errors import CapacityError
from kvx.tier_config import Prefault
from kvx.transfer.memory import MemoryRegion, memory_limit_bytes

if TYPE_CHECKING:
    from kvx.tier_config import DramTierConfig
    from kvx_ext import _core


class DramTier(MemoryTier):
    """Host memory under one capacity, for blocks of any size.

    Attributes:
        region: The memory; lives until the last array on it dies.
    """

    def __init__(
        self, config: DramTierConfig, history: _core.MissHistory, *, is_shared: bool = False
    ) -> None:
        """Map the memory and prefault it as configured.

        Args:
            config: The tier's configuration.
            history: Where it is written why blocks leave.
            is_shared: Whether processes on this host will map it to read from it.

        Raises:
            CapacityError: The machine does not have that much.
        """
        available_bytes = memory_limit_bytes()
        if config.capacity_bytes > available_bytes:
            # Mapping it would work; populating it would end with the kernel killing the process.
            raise CapacityError(
                f"the DRAM tier is to have {config.capacity_bytes} bytes, this process may have "
                f"{available_bytes}; lower its capacity",
                needed_bytes=config.capacity_bytes,
                available_bytes=available_bytes,
            )
        self.config = config
        region = MemoryRegion(
            config.capacity_bytes, is_shared=is_shared, numa_node=config.numa_node
        )
        arena = Arena(
            "DRAM",
            region.address,
            config.capacity_bytes,
            config.extent_bytes,
            lambda _: region.stop_prefault(),
        )
        self.region = region
        super().__init__(arena, config.eviction, history)
        if config.prefault is not Prefault.NEVER:
            region.prefault_in_background()
