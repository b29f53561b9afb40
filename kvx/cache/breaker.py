"""A circuit breaker: leaves a failing tier alone, and probes it now and then.

Closed: everything passes. Open, after so many failures in a row: nothing does. Half-open, after the
reset time: who asks with `allow` passes until the next outcome, which closes or opens it again; of
those who ask with `enter` exactly one does, until it has said how it went.
Source: M. Nygard, "Release It!", 2007.
"""

from __future__ import annotations

import enum
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.config import BreakerConfig


class BreakerState(enum.StrEnum):
    """What a breaker does with those who ask."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class Passage(enum.Enum):
    """How somebody who asked goes on."""

    REFUSED = enum.auto()
    FREE = enum.auto()
    PROBE = enum.auto()


class Breaker:
    """Thread-safe; `allow` and `enter` cost a lock."""

    def __init__(self, config: BreakerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Start closed."""
        self.reset_s = config.reset_s
        self._failures_max = config.failures
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_until: float | None = None
        self._is_probing = False

    @property
    def state(self) -> BreakerState:
        """What it does now."""
        with self._lock:
            if self._open_until is None:
                return BreakerState.CLOSED
            is_over = self._clock() >= self._open_until
            return BreakerState.HALF_OPEN if is_over else BreakerState.OPEN

    @property
    def wait_s(self) -> float:
        """Seconds until somebody is let through; 0 when it may be now."""
        with self._lock:
            return 0.0 if self._open_until is None else max(0.0, self._open_until - self._clock())

    def allow(self) -> bool:
        """Return whether the tier may be used now."""
        with self._lock:
            return self._open_until is None or self._clock() >= self._open_until

    def enter(self) -> Passage:
        """Ask as `allow` does; half-open, for one at a time.

        Who gets `PROBE` calls `end_probe` when it has ended, however it did.
        """
        with self._lock:
            if self._open_until is None:
                return Passage.FREE
            if self._is_probing or self._clock() < self._open_until:
                return Passage.REFUSED
            self._is_probing = True
            return Passage.PROBE

    def end_probe(self) -> None:
        """Let the next one probe, unless the outcome of this one has settled it."""
        with self._lock:
            self._is_probing = False

    def success(self) -> None:
        """Note that the tier worked: closes the breaker."""
        with self._lock:
            self._failures = 0
            self._open_until = None

    def failure(self) -> None:
        """Note that the tier failed; a failed probe opens the breaker at once: the count stands."""
        with self._lock:
            self._failures += 1
            if self._failures >= self._failures_max:
                self._open_until = self._clock() + self.reset_s
