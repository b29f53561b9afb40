"""How long calls of one kind take: of late, and when nothing is in the way."""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque

_WINDOW = 128
_SAMPLES_MIN = 20
_ROUND = 16
_BASE_S = 30.0
_SLOW_FACTOR = 8.0
_SLOW_EXTRA_S = 0.1


class Pace:
    """Exact quantiles of the last 128 calls, and whether they have become slow.

    Slow means that the median of the last 16 is eight times that of the best 16 of the last half
    minute or so, and 0.1 s more: then requests wait for each other somewhere.
    Source of the base: BBR's windowed minimum (Cardwell et al., ACM Queue 14:5, 2016).
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._round: list[float] = []
        self._base_s = math.inf
        self._former_base_s = math.inf
        self._base_began_s = -math.inf

    def note(self, seconds: float, now_s: float) -> bool:
        """Add how long a call took, or at least took; return whether a round shows it is slow."""
        self._recent.append(seconds)
        bisect.insort(self._sorted, seconds)
        if len(self._recent) > _WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        self._round.append(seconds)
        if len(self._round) < _ROUND:
            return False
        median_s = statistics.median(self._round)
        self._round.clear()
        if now_s - self._base_began_s > _BASE_S:
            self._former_base_s, self._base_s = self._base_s, math.inf
            self._base_began_s = now_s
        self._base_s = min(self._base_s, median_s)
        base_s = min(self._base_s, self._former_base_s)
        return median_s > max(base_s * _SLOW_FACTOR, base_s + _SLOW_EXTRA_S)

    def quantile(self, share: float) -> float | None:
        """Return what this share of the recent calls did not exceed, s; None for too few calls."""
        if len(self._sorted) < _SAMPLES_MIN:
            return None
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]
