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
    from collections.abc import Iterable

    from kvx.transfer.backend import Memory
    from kvx.transfer.backends.nixl.bindings import NixlAgent


@dataclass(slots=True)
class _Entry:
    memory: Memory
    number: int  # of the registration, to NIXL
    told: dict[tuple[str, str], int] = field(default_factory=dict)  # (peer, life): last hello
    is_leaving: bool = False


class Registry:
    """Registered memory by region. Thread-safe."""

    def __init__(self, nixl: NixlAgent, life: str) -> None:
        """Know no memory."""
        self._nixl = nixl
        self._life = life
        self._changed = threading.Condition()
        self._entries: dict[int, _Entry] = {}
        self._hellos = 0

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

    def hello(self, peer: str, life: str) -> tuple[Hello, list[int]]:
        """Return what a peer is to be told, and which regions are news to it.

        It counts as told from now on; see `untold`.
        """
        with self._changed:
            staying = {key: one for key, one in self._entries.items() if not one.is_leaving}
            news = [key for key, one in staying.items() if (peer, life) not in one.told]
            self._hellos += 1
            for entry in staying.values():
                entry.told[peer, life] = self._hellos
            regions = [_described(entry.memory) for entry in staying.values()]
            return Hello(self._hellos, self._life, self._nixl.metadata(), regions), news

    def untold(self, peer: str, life: str, regions: Iterable[int]) -> None:
        """Take note that a peer was not told of regions after all."""
        with self._changed:
            for region in regions:
                if region in self._entries:
                    self._entries[region].told.pop((peer, life), None)
            self._changed.notify_all()

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
                entry.told = {one: at for one, at in entry.told.items() if one[0] != peer}
                self._changed.notify_all()

    def is_told(self, life: str) -> bool:
        """Return whether a life of a peer knows where some of our memory is."""
        with self._changed:
            return any(one[1] == life for entry in self._entries.values() for one in entry.told)

    def left(self, life: str, hello: int) -> None:
        """Take note that a peer touches nothing that it was told by a hello, or before."""
        with self._changed:
            for entry in self._entries.values():
                entry.told = {
                    one: at for one, at in entry.told.items() if one[1] != life or at > hello
                }
            self._changed.notify_all()

    def buried(self, life: str) -> None:
        """Take note that a peer is dead."""
        self.left(life, self._hellos)

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

    def clear(self) -> None:
        """Deregister everything, whoever was told: NIXL ends, and serves nobody any more."""
        with self._changed:
            entries, self._entries = self._entries, {}
            self._changed.notify_all()
        for entry in entries.values():
            self._nixl.deregister(entry.number)


def _described(memory: Memory) -> Region:
    is_device = memory.kind is MemoryKind.DEVICE
    return Region(
        memory.region, memory.address, memory.size_bytes, is_device, max(memory.device_ordinal, 0)
    )
