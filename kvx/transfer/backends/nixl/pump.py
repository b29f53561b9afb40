"""The two threads of an endpoint: one drives transfers and watches their deadlines, one verifies.

Both sleep without a timeout while there is nothing to do. While NIXL works on something the pump
looks at it after a pause that grows with the time nothing has happened: 50 us at first, so that a
short transfer is not held up; 20 ms at last, so that a frozen peer costs nothing.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.backends.nixl.course import Course

_log = logging.getLogger(__name__)
_PAUSE_S_MIN = 50e-6
_PAUSE_S_MAX = 20e-3
# Of the time that nothing has happened; what is noticed late is late by this much at most.
_PAUSE_SHARE = 1 / 16
# What is whispered (see `lives`) is heard this much later at most.
_HEAR_S = 0.05


class Pump:
    """Drives courses until they are over. Thread-safe."""

    def __init__(self, name: str, hear: Callable[[], bool]) -> None:
        """Start the thread; it sleeps.

        Args:
            name: Of the thread.
            hear: Called when the pump looks, and now and then as long as it returns True.
        """
        self._lock = threading.Lock()
        self._new: list[Course] = []
        self._wake = threading.Event()
        self._hear = hear
        self._end: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, course: Course) -> None:
        """Drive one more course."""
        with self._lock:
            self._new.append(course)
        self._wake.set()

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    def stop(self, end: Callable[[], None]) -> None:
        """End the thread once no course is left and nothing is listened for; `end` is its last act.

        Until then the thread keeps alive whatever `end` belongs to. Does not wait.
        """
        self._end = end
        self._wake.set()

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; False when time was up first."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        courses: list[Course] = []
        last_change = time.monotonic()
        while True:
            end = self._end
            with self._lock:
                new, self._new = self._new, []
            courses += new
            has_changed = bool(new)
            due = _next_deadline(courses)
            for course in courses:
                has_changed |= course.step()
                if time.monotonic() >= due:  # a step may take as long as a batch
                    due = _expire(courses)
            courses = [course for course in courses if not course.is_over]
            is_listening = self._hear()
            if end is not None and not courses and not new and not is_listening:
                break
            now = time.monotonic()
            last_change = now if has_changed else last_change
            if not has_changed:
                pause = _pause(courses, now, now - last_change)
                if is_listening:
                    pause = _HEAR_S if pause is None else min(pause, _HEAR_S)
                self._wake.wait(pause)
            self._wake.clear()
        end()


class Verifier:
    """Does the work it is given, in order, on a thread of its own. Thread-safe."""

    def __init__(self, name: str) -> None:
        """Start the thread; it sleeps."""
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, work: Callable[[], None]) -> None:
        """Have it done."""
        self._queue.put(work)

    def stop(self) -> None:
        """End the thread when it has done what it was given. Does not wait."""
        self._queue.put(None)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:  # noqa: BLE001 - logged; the thread serves other transfers too
                _log.exception("verifying failed")


def _next_deadline(courses: list[Course]) -> float:
    running = (one.job.deadline for one in courses if not one.job.is_terminal())
    return min(running, default=math.inf)


def _expire(courses: list[Course]) -> float:
    """End what is due; returns when to look again."""
    for course in courses:
        course.job.expire()
    return _next_deadline(courses)


def _pause(courses: list[Course], now: float, still_s: float) -> float | None:
    """Return how long nothing needs to be looked at; None for as long as nobody says so."""
    if not courses:
        return None
    pause = math.inf  # only an answer, or a deadline, changes anything
    if any(course.is_in_quarantine for course in courses):
        pause = _PAUSE_S_MAX
    if any(course.is_moving for course in courses):
        pause = min(max(still_s * _PAUSE_SHARE, _PAUSE_S_MIN), _PAUSE_S_MAX)
    pause = min(pause, max(_next_deadline(courses) - now, 0.0))
    return None if math.isinf(pause) else pause
