"""Device memory of ours that peers may map: its handles, and who may have it mapped."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.errors import KvxError, StaleReference, UnavailableError
from kvx.transfer.backends.cuda_ipc.door import hand_over, is_there
from kvx.transfer.backends.device.messages import DEVICES_MAX, REGIONS_MAX, VERSION, Card, Handle

if TYPE_CHECKING:
    from kvx.transfer.backend import Memory
    from kvx.transfer.backends.device.desk import Desk


@dataclass(slots=True, eq=False)
class Export:
    """A region that others may map.

    Attributes:
        memory: What it is.
        desk: Its device.
        data: The driver's handle; empty where there is a descriptor.
        fd: The descriptor, which is ours; -1 for none.
        size_bytes: Of the allocation.
        offset: Where in it the region begins.
        importers: Names of peers by the doors that it was handed through.
        is_leaving: Whether nobody may map it any more.
    """

    memory: Memory
    desk: Desk
    data: bytes
    fd: int
    size_bytes: int
    offset: int
    importers: dict[str, str] = field(default_factory=dict)
    is_leaving: bool = False


class Exports:
    """The exports of one endpoint. Thread-safe."""

    def __init__(self) -> None:
        """Start empty."""
        self._changed = threading.Condition()
        self._exports: dict[int, Export] = {}
        self._refused: dict[int, str] = {}

    def add(self, memory: Memory, desk: Desk) -> None:
        """Make memory known to the driver as something others may map.

        Raises:
            UnavailableError: Its allocator made it so that nobody else can.
            UsageError: It is no memory of this device.
        """
        try:
            handle = desk.device.share_at(memory.address, memory.size_bytes)
        except KvxError as error:
            with self._changed:
                self._refused[memory.region] = str(error)
                if len(self._refused) > REGIONS_MAX:
                    del self._refused[next(iter(self._refused))]
            raise
        made = Export(memory, desk, *handle)
        with self._changed:
            self._exports[memory.region] = made

    def get(self, region: int) -> Export | None:
        """Return an export; None when there is none."""
        with self._changed:
            return self._exports.get(region)

    def hand_out(self, region: int, peer: str, door: str) -> Handle:
        """Return what a peer needs to map a region, and remember that it may.

        Raises:
            StaleReference: It is not registered any more.
            KvxError: The descriptor cannot be handed over.
        """
        with self._changed:
            found = self._exports.get(region)
            if found is None and region in self._refused:
                raise UnavailableError(self._refused[region])
            if found is None or found.is_leaving:
                raise StaleReference(f"region {region} is not registered any more")
            found.importers[door] = peer
        token = b"" if found.fd < 0 else hand_over(door, found.fd)
        return Handle(
            found.data, token, found.size_bytes, found.offset, found.memory.size_bytes,
            found.desk.uuid,
        )  # fmt: skip

    def begin_leaving(self, region: int) -> None:
        """Let nobody map a region any more."""
        with self._changed:
            self._exports[region].is_leaving = True

    def importers(self, region: int) -> set[str]:
        """Return the names of the peers that may have a region mapped; forgets those that died."""
        with self._changed:
            found = self._exports[region]
            doors = list(found.importers)
        gone = [door for door in doors if not is_there(door)]
        with self._changed:
            for door in gone:
                found.importers.pop(door, None)
            return set(found.importers.values())

    def forgotten(self, region: int, door: str) -> None:
        """Take it that nobody behind a door has a region mapped."""
        with self._changed:
            found = self._exports.get(region)
            if found is not None:
                found.importers.pop(door, None)
                self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Wait until something was forgotten, or time is up."""
        with self._changed:
            self._changed.wait(timeout_s)

    def remove(self, region: int) -> None:
        """Forget a region, and close its descriptor."""
        with self._changed:
            self._refused.pop(region, None)
            found = self._exports.pop(region, None)
        if found is not None and found.fd >= 0:
            os.close(found.fd)

    def all(self) -> list[Export]:
        """Return every export."""
        with self._changed:
            return list(self._exports.values())

    def card(self) -> Card:
        """Return what peers should know to judge whether they can map it."""
        exports = [one for one in self.all() if not one.is_leaving]
        devices = list(dict.fromkeys(one.desk.uuid for one in exports))[:DEVICES_MAX]
        regions = [
            (one.memory.region, devices.index(one.desk.uuid))
            for one in exports[:REGIONS_MAX]
            if one.desk.uuid in devices
        ]
        return Card(VERSION, devices, regions)
