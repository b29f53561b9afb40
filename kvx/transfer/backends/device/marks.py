"""Points in streams that leases wait for: nobody copies before the blocks were made."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvx.errors import KvxError

if TYPE_CHECKING:
    from kvx_ext import _core


class Marks:
    """Marks by lease. Thread-safe."""

    def __init__(self) -> None:
        """Hold nobody back."""
        self._lock = threading.Lock()
        self._marks: dict[int, _core.StreamMark] = {}

    def hold_back(self, lease: int, mark: _core.StreamMark) -> None:
        """Let nobody copy under a lease before a mark was reached."""
        with self._lock:
            over = [number for number, known in self._marks.items() if _is_over(known)]
            for number in over:
                del self._marks[number]
            self._marks[lease] = mark

    def of(self, lease: int) -> _core.StreamMark | None:
        """Return what is to be waited for under a lease; None for nothing any more."""
        with self._lock:
            mark = self._marks.get(lease)
            if mark is not None and _is_over(mark):
                del self._marks[lease]
                return None
            return mark


def _is_over(mark: _core.StreamMark) -> bool:
    try:
        return mark.is_reached()
    except KvxError:
        # It never will be: whoever waits for it is told so by the device.
        return False
