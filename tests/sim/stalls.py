"""How long the machine itself stood still: what no deadline test may hold against the code."""

from __future__ import annotations

import os
import subprocess
import sys

# How much later than its deadline a call may end. The promise is 0.1 s at p99, which every run of
# `make test-all` holds it to; a machine whose CPUs others use shows that only now and then.
LATE_S = 0.1 if os.environ.get("KVX_TEST_EXACT_DEADLINES") else 0.4

# Sleeps 5 ms again and again until its input ends, then says how much too long it slept at worst.
_CANARY = """
import select, sys, time
worst = 0.0
while True:
    began = time.monotonic()
    if select.select([sys.stdin], [], [], 0.005)[0]:
        break
    worst = max(worst, time.monotonic() - began - 0.005)
print(worst)
"""


class MachineStalls:
    """Watches from a process of its own, from creation to `stop`."""

    def __init__(self) -> None:
        """Start to watch."""
        self._canary = subprocess.Popen(
            [sys.executable, "-c", _CANARY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def stop(self) -> float:
        """Return the longest stall in seconds; once."""
        worst_s, _ = self._canary.communicate()
        return float(worst_s)
