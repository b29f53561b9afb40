"""Device memory of peers that is mapped here: opened once, closed after the last copy from it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.backends.device.desk import Desk
    from kvx_ext import _core


class Place(NamedTuple):
    """What is mapped where: a region of one life of a peer, for a device of ours.

    `ordinal` is -1 where it is the device that the memory lies on, whichever that is.
    """

    peer: str
    life: int
    region: int
    ordinal: int


@dataclass(slots=True, eq=False)
class Import:
    """Mapped memory of a peer.

    Attributes:
        place: Whose it is.
        desk: The device that copies from it.
        memory: The mapping.
        address: Where the region begins in it.
        size_bytes: Of the region.
    """

    place: Place
    desk: Desk
    memory: _core.DeviceMemory
    address: int
    size_bytes: int
    uses: int = field(default=0, repr=False)
    is_leaving: bool = field(default=False, repr=False)


class Imports:
    """The imports of one endpoint. Thread-safe."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._imports: dict[Place, Import] = {}
        self._leaving: list[Import] = []
        self._waiting: list[tuple[Callable[[Place], bool], Callable[[], None]]] = []

    def take(self, place: Place) -> Import | None:
        """Return an import, to be released; None when there is none."""
        with self._lock:
            found = self._imports.get(place)
            if found is not None:
                found.uses += 1
            return found

    def add(self, made: Import) -> Import:
        """Add an import, or take the one that is there; to be released."""
        with self._lock:
            found = self._imports.setdefault(made.place, made)
            found.uses += 1
        if found is not made:
            made.memory.close()
        return found

    def release(self, taken: Import) -> None:
        """Say that no copy from it is under way."""
        with self._lock:
            taken.uses -= 1
            is_over = taken.uses == 0 and taken.is_leaving
        if is_over:
            self._close(taken)

    def forget(self, peer: str, region: int, then: Callable[[], None]) -> None:
        """Close what is mapped of a region, after its last copy; call `then` when nothing is."""
        self._leave(lambda place: (place.peer, place.region) == (peer, region), then)

    def leave(self, peer: str, life: int, then: Callable[[], None]) -> None:
        """The same, for all that is mapped of a life of a peer."""
        self._leave(lambda place: (place.peer, place.life) == (peer, life), then)

    def leave_all(self, then: Callable[[], None]) -> None:
        """The same, for everything."""
        self._leave(lambda _: True, then)

    def count(self) -> int:
        """Return how many mappings there are, those that are about to be closed included."""
        with self._lock:
            return len(self._imports) + len(self._leaving)

    def _leave(self, is_meant: Callable[[Place], bool], then: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.append((is_meant, then))
            places = [place for place in self._imports if is_meant(place)]
            leaving = [self._imports.pop(place) for place in places]
            for one in leaving:
                one.is_leaving = True
            self._leaving += leaving
            idle = [one for one in leaving if not one.uses]
        for one in idle:
            self._close(one)
        self._tell()

    def _close(self, one: Import) -> None:
        one.memory.close()
        with self._lock:
            self._leaving.remove(one)
        self._tell()

    def _tell(self) -> None:
        """Tell whoever waits that what was meant is mapped nowhere."""
        with self._lock:
            places = [one.place for one in self._leaving]
            waiting: list[tuple[Callable[[Place], bool], Callable[[], None]]] = []
            over: list[tuple[Callable[[Place], bool], Callable[[], None]]] = []
            for is_meant, then in self._waiting:
                is_mapped = any(is_meant(place) for place in places)
                (waiting if is_mapped else over).append((is_meant, then))
            self._waiting = waiting
        for _, then in over:
            then()
