"""What has come and nobody has read yet: bounded, for any number of readers."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

ItemT = TypeVar("ItemT")
_FOREVER_S = 3600.0


class Mailbox(Generic[ItemT]):
    """Items in order of their coming; the oldest go when it is full. Thread-safe.

    Attributes:
        dropped: How many went unread.
    """

    def __init__(self, items_max: int) -> None:
        """Start empty."""
        self._items: deque[ItemT] = deque(maxlen=items_max)
        self._came = threading.Condition()
        self._is_closed = False
        self.dropped = 0

    def put(self, item: ItemT) -> None:
        """Add an item."""
        with self._came:
            self.dropped += len(self._items) == self._items.maxlen
            self._items.append(item)
            self._came.notify_all()

    def take(self, timeout_s: float = 0.0) -> list[ItemT]:
        """Take all items; waits for the first one, `timeout_s` at most."""
        with self._came:
            self._came.wait_for(lambda: self._items or self._is_closed, timeout_s)
            items = list(self._items)
            self._items.clear()
            return items

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._came:
            self._is_closed = True
            self._came.notify_all()

    def __iter__(self) -> Iterator[ItemT]:
        """Yield items as they come, until the mailbox is closed and empty."""
        while True:
            items = self.take(_FOREVER_S)
            yield from items
            if not items and self._is_closed:
                return
