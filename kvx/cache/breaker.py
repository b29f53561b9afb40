"""A circuit breaker: leaves a failing tier alone, and probes it now and then.

Closed: everything passes. Open, after so many failures in a row: nothing does. Half-open, after the
reset time: everything passes until the next outcome, which closes or opens it again.
Source: M. Nygard, "Release It!", 2007.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.config import BreakerConfig


class Breaker:
    """Thread-safe; `allow` costs a lock."""

    def __init__(self, config: BreakerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Start closed."""
        self.reset_s = config.reset_s
        self._failures_max = config.failures
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_until: float | None = None

    def allow(self) -> bool:
        """Return whether the tier may be used now."""
        with self._lock:
            return self._open_until is None or self._clock() >= self._open_until

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
