"""CPU time of another process, to the nanosecond and without asking it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvx_bench.row import Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# The kernel's number of "all threads of this process, as scheduled" (CPUCLOCK_SCHED).
_SCHEDULED = 2


def process_cpu_s(pid: int) -> float:
    """Return what all threads of a process have used; what they waited is not in it.

    Source: include/uapi/linux/time.h and kernel/time/posix-cpu-timers.c; what
    clock_getcpuclockid(3) computes.

    Raises:
        OSError: There is no such process.
    """
    return time.clock_gettime((~pid << 3) | _SCHEDULED)


def timed_with(work: Callable[[], object], others: Iterable[int]) -> Sample:
    """Run `work` once; the CPU seconds are this process's and those of `others` together."""
    pids = tuple(others)
    before = time.process_time() + sum(map(process_cpu_s, pids))
    began = time.perf_counter()
    work()
    wall_s = time.perf_counter() - began
    return Sample(wall_s, time.process_time() + sum(map(process_cpu_s, pids)) - before)
