"""The memory of an agent that NIXL knows, and which peers have been told where it is.

Memory is taken back only when every peer that was told has answered that it touches it no more, or
is dead: a peer that reads memory which was freed takes its owner's process with it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import CapacityError
from kvx.transfer.backends.nixl.messages import MESSAGE_BYTES_MAX, REGIONS_MAX, Hello, Region

if TYPE_CHECKING:
    from kvx.transfer.backend import Memory
    from kvx.transfer.backends.nixl.bindings import NixlAgent


@dataclass(slots=True)
class _Entry:
    memory: Memory
    number: int  # of the registration, to NIXL
    told: set[tuple[str, str]] = field(default_factory=set)  # (peer, life)
    is_leaving: bool = False


class Registry:
    """Registered memory by region. Thread-safe."""

    def __init__(self, nixl: NixlAgent, life: str) -> None:
        """Know no memory."""
        self._nixl = nixl
        self._life = life
        self._changed = threading.Condition()
        self._entries: dict[int, _Entry] = {}

    def add(self, memory: Memory) -> None:
        """Register memory.

        Raises:
            UnavailableError: No plugin takes it.
            CapacityError: A hello could not name one more.
        """
        number = self._nixl.register(
            memory.address, memory.size_bytes, memory.kind, memory.device_ordinal
        )
        with self._changed:
            count = len(self._entries)
            is_full = count >= REGIONS_MAX or len(self._nixl.metadata()) > MESSAGE_BYTES_MAX // 2
            if not is_full:
                self._entries[memory.region] = _Entry(memory, number)
        if is_full:
            self._nixl.deregister(number)
            raise CapacityError(f"{count} regions are registered with NIXL: make them larger")

    def get(self, region: int) -> Memory | None:
        """Return registered memory."""
        with self._changed:
            entry = self._entries.get(region)
            return None if entry is None else entry.memory

    def all(self) -> list[Memory]:
        """Return all registered memory."""
        with self._changed:
            return [entry.memory for entry in self._entries.values()]

    def hello(self, peer: str, life: str, *, wants_answer: bool) -> Hello:
        """Return what a peer is to be told; it counts as told from now on."""
        with self._changed:
            staying = [one for one in self._entries.values() if not one.is_leaving]
            for entry in staying:
                entry.told.add((peer, life))
            regions = [_described(entry.memory) for entry in staying]
            return Hello(self._life, self._nixl.metadata(), regions, wants_answer)

    def begin_leaving(self, region: int) -> set[str]:
        """Tell nobody more of a region; returns the peers that were told."""
        with self._changed:
            entry = self._entries.get(region)
            if entry is None:
                return set()
            entry.is_leaving = True
            return {peer for peer, _ in entry.told}

    def forgotten(self, peer: str, region: int) -> None:
        """Take note that a peer touches a region no more."""
        with self._changed:
            entry = self._entries.get(region)
            if entry is not None and entry.is_leaving:
                entry.told = {one for one in entry.told if one[0] != peer}
                self._changed.notify_all()

    def buried(self, life: str) -> None:
        """Take note that a peer is dead."""
        with self._changed:
            for entry in self._entries.values():
                entry.told = {one for one in entry.told if one[1] != life}
            self._changed.notify_all()

    def remove(self, region: int, timeout_s: float) -> bool:
        """Deregister when no peer that was told is left; False when time was up first."""
        with self._changed:
            entry = self._entries.get(region)
            if entry is None:
                return True
            if not self._changed.wait_for(lambda: not entry.told, timeout_s):
                return False
            del self._entries[region]
        self._nixl.deregister(entry.number)
        return True


def _described(memory: Memory) -> Region:
    is_device = memory.kind is MemoryKind.DEVICE
    return Region(
        memory.region, memory.address, memory.size_bytes, is_device, max(memory.device_ordinal, 0)
    )
