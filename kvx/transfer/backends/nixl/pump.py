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


class Pump:
    """Drives courses until they are over. Thread-safe."""

    def __init__(self, name: str) -> None:
        """Start the thread; it sleeps."""
        self._lock = threading.Lock()
        self._new: list[Course] = []
        self._wake = threading.Event()
        self._is_stopping = False
        self._kept: list[object] = []
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def add(self, course: Course) -> None:
        """Drive one more course."""
        with self._lock:
            self._idle.clear()
            self._new.append(course)
        self._wake.set()

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no course is left; False when time was up first."""
        return self._idle.wait(timeout_s)

    def keep(self, owner: object) -> None:
        """Keep something alive as long as the thread, which from now on is the process."""
        self._kept.append(owner)

    def stop(self) -> None:
        """End the thread once no course is left. Does not wait."""
        self._is_stopping = True
        self._wake.set()

    def _run(self) -> None:
        courses: list[Course] = []
        last_change = time.monotonic()
        while True:
            with self._lock:
                new, self._new = self._new, []
                if not courses and not new:
                    self._idle.set()
                    if self._is_stopping:
                        return
            courses += new
            has_changed = bool(new)
            due = _next_deadline(courses)
            for course in courses:
                has_changed |= _step(course)
                if time.monotonic() >= due:  # a step may take as long as a batch
                    due = _expire(courses)
            courses = [course for course in courses if not course.is_over]
            now = time.monotonic()
            last_change = now if has_changed else last_change
            if not has_changed:
                self._wake.wait(_pause(courses, now, now - last_change))
            self._wake.clear()


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


def _step(course: Course) -> bool:
    try:
        return course.step()
    except Exception:  # noqa: BLE001 - logged; the thread drives other transfers too
        _log.exception("transfer %d is given up", course.job.id)
        course.job.cancel()
        return False


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
