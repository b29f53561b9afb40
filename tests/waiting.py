"""Waiting for what nobody tells of."""

from __future__ import annotations

import time
from collections.abc import Callable

_LOOK_EVERY_S = 0.01


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    """Return whether a condition comes true in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(_LOOK_EVERY_S)
    return bool(condition())
