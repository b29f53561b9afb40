"""One measured figure, and how it is measured: in turn with its limit, medians of pairs."""

from __future__ import annotations

import math
import resource
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

GB = 1e9


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a benchmark.

    Attributes:
        key: ``NAME.operation.size[.variant]``.
        gb_per_s: Throughput in 1e9 bytes a second; None where `per_s` counts.
        per_s: Things a second; None where `gb_per_s` counts.
        limit: What the same work could reach at most, in the same unit, same run; None if unknown.
        ratio: Median of the paired ratios to the limit.
        limit_name: What the limit is, where rows of one run have several.
        ratios: The same to whatever else is worth comparing with, by its name.
        cpu_s_per_gb: CPU seconds for 1e9 bytes, of every process that has part in it.
        cpu_share: CPU seconds a second, of every process that has part in it.
        p50_us: Median latency of one operation, microseconds.
        p99_us: 99th percentile of it.
        note: What else the reader must know.
    """

    key: str
    gb_per_s: float | None = None
    per_s: float | None = None
    limit: float | None = None
    ratio: float | None = None
    limit_name: str = ""
    ratios: Mapping[str, float] = field(default_factory=dict)
    cpu_s_per_gb: float | None = None
    cpu_share: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run: wall and CPU seconds (of all threads of this process)."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], object]) -> Sample:
    """Run `work` once."""
    before = _cpu_s()
    began = time.perf_counter()
    work()
    wall_s = time.perf_counter() - began
    return Sample(wall_s, _cpu_s() - before)


def paired(
    work: Callable[[], Sample], limit: Callable[[], Sample], *, repeats: int
) -> list[tuple[Sample, Sample]]:
    """Run work and limit in turn after one warm-up of each, so that drift hits both."""
    work()
    limit()
    return [(work(), limit()) for _ in range(repeats)]


def throughput_row(
    key: str, num_bytes: int, pairs: list[tuple[Sample, Sample]], *, note: str = ""
) -> Row:
    """Make a row of bytes a second from pairs of runs over `num_bytes` each."""
    return Row(
        key,
        gb_per_s=num_bytes / GB / median(mine.wall_s for mine, _ in pairs),
        limit=num_bytes / GB / median(limit.wall_s for _, limit in pairs),
        ratio=median(limit.wall_s / mine.wall_s for mine, limit in pairs),
        cpu_s_per_gb=median(mine.cpu_s for mine, _ in pairs) / (num_bytes / GB),
        note=note,
    )


def percentiles_us(seconds: list[float]) -> tuple[float, float]:
    """Return p50 and p99 in microseconds: the smallest values that so many are not above."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.99))
    return p50 * 1e6, p99 * 1e6


def median(values: Iterable[float]) -> float:
    """Return the median of at least one value."""
    return statistics.median(values)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
