"""The DRAM tier's memory: one region cut into extents that pools take and give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.config import Prefault
from kvx.errors import CapacityError
from kvx.transfer.memory import MemoryRegion, memory_limit_bytes

if TYPE_CHECKING:
    from kvx.config import DramTierConfig

_EXTENT_BYTES_MIN = 64 << 20
_EXTENT_BYTES_MAX = 1 << 30
_EXTENTS_WANTED = 16


@dataclass(frozen=True, slots=True)
class MemoryExtent:
    """A run of the arena's memory.

    Attributes:
        address: Of its first byte.
        size_bytes: Its length; only the last extent is shorter than the others.
    """

    address: int
    size_bytes: int


def extent_bytes_for(capacity_bytes: int) -> int:
    """Return the extent size that a capacity is cut into when the configuration names none."""
    wanted = capacity_bytes // _EXTENTS_WANTED // 4096 * 4096
    return min(capacity_bytes, max(_EXTENT_BYTES_MIN, min(wanted, _EXTENT_BYTES_MAX)))


class Arena:
    """Memory of fixed size, given out by extents."""

    def __init__(self, config: DramTierConfig) -> None:
        """Map the memory and prefault it as configured.

        Raises:
            CapacityError: The machine does not have that much memory.
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
        self.extent_bytes = config.extent_bytes or extent_bytes_for(config.capacity_bytes)
        self.region = MemoryRegion(config.capacity_bytes, numa_node=config.numa_node)
        self._free = [
            MemoryExtent(
                self.region.address + offset,
                min(self.extent_bytes, config.capacity_bytes - offset),
            )
            for offset in range(0, config.capacity_bytes, self.extent_bytes)
        ]
        self.num_extents = len(self._free)
        self._free.reverse()
        if config.prefault is not Prefault.NEVER:
            self.region.prefault_in_background()

    def take(self, slot_bytes: int) -> MemoryExtent | None:
        """Give out an extent that holds at least one slot; None when all are in use.

        Raises:
            CapacityError: No extent of this arena can ever hold such a slot.
        """
        if slot_bytes > self.extent_bytes:
            raise CapacityError(
                f"a block of {slot_bytes} bytes does not fit into extents of {self.extent_bytes} "
                "bytes; raise the DRAM tier's capacity or its extent size",
                needed_bytes=slot_bytes,
                available_bytes=self.extent_bytes,
            )
        for place in reversed(range(len(self._free))):
            if self._free[place].size_bytes >= slot_bytes:
                return self._free.pop(place)
        return None

    def give_back(self, extent: MemoryExtent) -> None:
        """Take an extent back for any pool."""
        self._free.append(extent)

    def close(self) -> None:
        """Stop prefaulting; the memory lives until the last array on it dies."""
        self.region.stop_prefault()
