"""A thread that does what it is given, in order: what may take a while, and messages."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)


class Clerk:
    """Thread-safe; starts with the first work."""

    def __init__(self, name: str) -> None:
        """Remember the name."""
        self._name = name
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Have it done."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._work.put(work)

    def close(self, timeout_s: float) -> None:
        """End when all is done that was given."""
        with self._lock:
            thread = self._thread
        self._work.put(None)
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:  # noqa: BLE001 - logged; the thread serves other transfers too
                _log.exception("work for a peer failed")
