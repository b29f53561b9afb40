"""When to try again: pure, with an injected source of chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

_DOUBLINGS_MAX = 32


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits that double, each shortened by up to half so that many agents do not march in step.

    Attributes:
        first_s: Before the first new attempt, at most.
        max_s: Before any.
    """

    first_s: float
    max_s: float

    def delay_s(self, failures: int, rng: random.Random) -> float:
        """Return how long to wait after so many failures in a row, from 1."""
        longest = min(self.max_s, self.first_s * 2.0 ** min(failures - 1, _DOUBLINGS_MAX))
        return longest * rng.uniform(0.5, 1.0)
