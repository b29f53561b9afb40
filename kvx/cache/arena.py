"""A memory tier's memory: one run of bytes cut into extents that pools take and give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.errors import CapacityError

if TYPE_CHECKING:
    from collections.abc import Callable

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

    def __init__(
        self,
        name: str,
        address: int,
        capacity_bytes: int,
        extent_bytes: int | None,
        let_go: Callable[[bool], None],
    ) -> None:
        """Take over memory.

        Args:
            name: The tier's, for errors.
            address: Of its first byte, on the host or a device.
            capacity_bytes: Its length.
            extent_bytes: Unit that it is given out in; None chooses.
            let_go: Called once at the end, with whether the hardware still holds some of it.
        """
        self.extent_bytes = extent_bytes or extent_bytes_for(capacity_bytes)
        self._name = name
        self._let_go = let_go
        self._free = [
            MemoryExtent(address + offset, min(self.extent_bytes, capacity_bytes - offset))
            for offset in range(0, capacity_bytes, self.extent_bytes)
        ]
        self.num_extents = len(self._free)
        self._free.reverse()

    def take(self, slot_bytes: int) -> MemoryExtent | None:
        """Give out an extent that holds at least one slot; None when all are in use.

        Raises:
            CapacityError: No extent of this arena can ever hold such a slot.
        """
        if slot_bytes > self.extent_bytes:
            raise CapacityError(
                f"a block of {slot_bytes} bytes does not fit into extents of {self.extent_bytes} "
                f"bytes; raise the {self._name} tier's capacity or its extent size",
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

    def close(self, *, is_abandoned: bool) -> None:
        """Let go of the memory; see `let_go`."""
        self._let_go(is_abandoned)
