"""How much the objects under a prefix take, and which go first. Pure but for a lock.

It knows what was listed and what this cache stored since; other machines store, too, so it is
renewed by listing now and then.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvx.cache.s3.store import ObjectFacts

# Evicting goes on until so much of the capacity is used: deleting in batches is cheaper.
_LOW_WATER = 0.95


class Ledger:
    """Objects in the order in which they go, coldest first. Thread-safe."""

    def __init__(self, capacity_bytes: int | None, ttl_s: int, *, is_touched: bool) -> None:
        """Start empty.

        Args:
            capacity_bytes: Most bytes of objects; None for no limit.
            ttl_s: Seconds until objects expire; 0 for never.
            is_touched: Whether a use makes an object hot (LRU), rather than nothing (FIFO).
        """
        self.capacity_bytes = capacity_bytes
        self._ttl_s = ttl_s
        self._is_touched = is_touched
        self._lock = threading.Lock()
        self._objects: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._used_bytes = 0

    @property
    def is_kept(self) -> bool:
        """Whether there is any reason to know the objects."""
        return self.capacity_bytes is not None or self._ttl_s > 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the objects that are known."""
        return self._used_bytes

    def __len__(self) -> int:
        """Return the number of objects that are known."""
        return len(self._objects)

    def stored(self, name: str, size_bytes: int, stored_s: float) -> None:
        """Note an object that was just stored."""
        if not self.is_kept:
            return
        with self._lock:
            self._forget(name)
            self._objects[name] = (size_bytes, stored_s)
            self._used_bytes += size_bytes

    def listed(self, page: Sequence[ObjectFacts]) -> None:
        """Note objects that were found; those that are known keep their place."""
        with self._lock:
            for one in page:
                if one.name not in self._objects:
                    self._objects[one.name] = (one.size_bytes, one.modified_s)
                    self._used_bytes += one.size_bytes

    def sort(self) -> None:
        """Put all in the order in which they were stored: after the first listing."""
        with self._lock:
            self._objects = OrderedDict(sorted(self._objects.items(), key=lambda one: one[1][1]))

    def keep_only(self, names: set[str], before_s: float) -> None:
        """Forget what was stored before a listing began and is not in it."""
        with self._lock:
            gone = [
                name
                for name, (_, stored_s) in self._objects.items()
                if stored_s < before_s and name not in names
            ]
            for name in gone:
                self._forget(name)

    def used(self, name: str) -> None:
        """Note that an object was read."""
        with self._lock:
            if self._is_touched and name in self._objects:
                self._objects.move_to_end(name)

    def forget(self, names: Sequence[str]) -> None:
        """Note that objects are gone."""
        with self._lock:
            for name in names:
                self._forget(name)

    def due(self, now_s: float, count_max: int) -> list[str]:
        """Return objects that have to go: expired ones, then the coldest beyond the capacity."""
        with self._lock:
            found: list[str] = []
            left = self._used_bytes
            limit = self.capacity_bytes
            is_over = limit is not None and left > limit
            for name, (size_bytes, stored_s) in self._objects.items():
                if len(found) == count_max:
                    break
                is_expired = 0 < self._ttl_s <= now_s - stored_s
                is_excess = is_over and limit is not None and left > limit * _LOW_WATER
                if is_expired or is_excess:
                    found.append(name)
                    left -= size_bytes
                elif not self._ttl_s:
                    break  # the rest is hotter, and nothing expires
            return found

    def _forget(self, name: str) -> None:
        found = self._objects.pop(name, None)
        if found is not None:
            self._used_bytes -= found[0]
