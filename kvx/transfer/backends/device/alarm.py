"""Calls at given times: deadlines are kept also while a device's thread is stuck in its driver."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_CLOSE_S = 1.0


class Alarm:
    """A thread that sleeps until the next call is due. Thread-safe."""

    def __init__(self, name: str) -> None:
        """Remember the name; the thread starts with the first call."""
        self._name = name
        self._changed = threading.Condition()
        self._calls: list[tuple[float, int, weakref.WeakMethod[Callable[[], object]]]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def call_at(self, when: float, method: Callable[[], object]) -> None:
        """Call a method at a time of the monotonic clock, if its object is still there."""
        with self._changed:
            if self._is_closed:
                return
            entry = (when, next(self._order), weakref.WeakMethod(method))
            heapq.heappush(self._calls, entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif self._calls[0] is entry:
                self._changed.notify()

    def close(self) -> None:
        """Call nobody any more; waits a moment for a call that is under way."""
        with self._changed:
            self._is_closed = True
            self._calls.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (due := self._next()) is not None:
            method = due()
            if method is not None:
                try:
                    method()
                except Exception:  # noqa: BLE001 - logged; the thread serves other jobs too
                    _log.exception("a call that was due failed")

    def _next(self) -> weakref.WeakMethod[Callable[[], object]] | None:
        with self._changed:
            while not self._is_closed:
                if not self._calls:
                    self._changed.wait()
                    continue
                left_s = self._calls[0][0] - time.monotonic()
                if left_s <= 0:
                    return heapq.heappop(self._calls)[2]
                self._changed.wait(left_s)
            return None
