"""Pinned host memory that bytes are staged in: known to the native core, and used again."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvx.transfer.backends.device.pinned import PinnedRegion

if TYPE_CHECKING:
    from kvx.transfer.backends.device.desk import Desk
    from kvx.transfer.core import LinkCore

WINDOW_BYTES = 8 << 20
_IDLE_MAX = 8


class Buffer:
    """Pinned memory of one device that the core may receive into and send from.

    Attributes:
        desk: The device.
        memory: The memory.
        region: What the core calls it.
    """

    def __init__(self, core: LinkCore, desk: Desk, size_bytes: int) -> None:
        """Make it; CapacityError when there is not that much memory."""
        self.desk = desk
        self.memory = PinnedRegion(desk.device, size_bytes)
        self.region = core.add_region(self.memory.address, self.memory.size_bytes)


class Buffers:
    """Buffers that nobody uses just now. Thread-safe."""

    def __init__(self, core: LinkCore) -> None:
        """Start empty."""
        self._core = core
        self._lock = threading.Lock()
        self._idle: list[Buffer] = []
        self._is_closed = False

    def take(self, desk: Desk, size_bytes: int) -> Buffer:
        """Return a buffer of at least so many bytes; CapacityError when there is no memory."""
        with self._lock:
            for one in self._idle:
                if one.desk is desk and one.memory.size_bytes >= size_bytes:
                    self._idle.remove(one)
                    return one
        return Buffer(self._core, desk, max(size_bytes, WINDOW_BYTES))

    def give_back(self, buffer: Buffer) -> None:
        """Let others use it. REQUIRES: nothing is at it."""
        with self._lock:
            is_wanted = not self._is_closed and buffer.memory.size_bytes <= WINDOW_BYTES
            if is_wanted and len(self._idle) < _IDLE_MAX:
                self._idle.append(buffer)
                return
        self._drop(buffer)

    def close(self) -> None:
        """Let them all go."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for one in idle:
            self._drop(one)

    def _drop(self, buffer: Buffer) -> None:
        if not self._core.is_closed:
            self._core.remove_region(buffer.region, 0.0)
        buffer.memory.close()
