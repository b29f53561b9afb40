"""Threads that do what they are given: what may take a while, and messages."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)


class Clerk:
    """Thread-safe; with one thread, which is the default, work is done in order."""

    def __init__(self, name: str, *, threads_max: int = 1) -> None:
        """Remember the name; threads begin when there is work and none is idle."""
        self._name = name
        self._threads_max = threads_max
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._open = 0  # given and not done
        self._is_closed = False

    def do(self, work: Callable[[], None]) -> None:
        """Have it done; nothing is, once it is closed."""
        with self._lock:
            if self._is_closed:
                return
            self._open += 1
            if len(self._threads) < min(self._open, self._threads_max):
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
        self._work.put(work)

    def close(self, timeout_s: float) -> None:
        """End when all is done that was given."""
        end = time.monotonic() + timeout_s
        with self._lock:
            self._is_closed = True
            threads = list(self._threads)
        for _ in threads:
            self._work.put(None)
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:  # noqa: BLE001 - logged; the thread serves other transfers too
                _log.exception("work for a peer failed")
            with self._lock:
                self._open -= 1
