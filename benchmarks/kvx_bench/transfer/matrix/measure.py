"""Runs one cell of a matrix: bursts of kvx, in turn with what it is held against."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvx.errors import CorruptBlock
from kvx_bench.transfer.matrix.figures import Figures, LimitRuns, summarise
from kvx_bench.transfer.pair.pair import Course

if TYPE_CHECKING:
    from kvx_bench.transfer.baselines.work import Baseline
    from kvx_bench.transfer.matrix.options import Cell, MatrixOptions
    from kvx_bench.transfer.pair.pair import Burst, Pair

_BURST_S = 0.1
_BURST_RUNS_MAX = 10_000


def measure(pair: Pair, cell: Cell, limit: Baseline | None, options: MatrixOptions) -> Figures:
    """Return the figures of a cell.

    Raises:
        CorruptBlock: Bytes are wrong: names the block, the offset and the iteration.
        KvxError: A transfer failed.
    """
    return _checked(pair, cell, options) if options.is_checking else _timed(
        pair, cell, limit, options
    )  # fmt: skip


def _timed(pair: Pair, cell: Cell, limit: Baseline | None, options: MatrixOptions) -> Figures:
    work = cell.work
    pair.fill(work, 0)
    bursts: list[Burst] = []
    limit_s: list[float] = []
    with pair.begin(Course(cell.backend, work, has_checksums=True)) as begun:
        if options.warmup:
            begun.burst(options.warmup, options.duration_s)
        if limit is not None:
            limit.run(work)
        budget = Budget(options.duration_s, options.iterations)
        while (count := budget.next_runs()) > 0:
            bursts.append(begun.burst(count, _BURST_S))
            budget.take(bursts[-1])
            if limit is not None:
                limit_s.append(limit.run(work).wall_s)
        prepare_s = begun.prepare_s
    runs = None if limit is None else LimitRuns(limit.name, limit_s)
    return summarise(cell, bursts, prepare_s, limit=runs)


def _checked(pair: Pair, cell: Cell, options: MatrixOptions) -> Figures:
    """Run one by one; each with other bytes, of which every one is looked at."""
    course = Course(cell.backend, cell.work, has_checksums=True)
    bursts: list[Burst] = []
    prepare_s = 0.0
    until = time.monotonic() + options.duration_s
    for iteration in range(options.iterations or _BURST_RUNS_MAX):
        found, burst, prepare_s = pair.checked(course, iteration)
        if found is not None:
            raise CorruptBlock(
                f"{course.work} over {course.backend}, iteration {iteration}: {found}",
                key=str(found.block),
                offset=found.offset,
            )
        bursts.append(burst)
        if options.iterations is None and time.monotonic() > until:
            break
    return summarise(cell, bursts, prepare_s, is_checked=True)


class Budget:
    """How many runs are left, by number or by the time they took."""

    def __init__(self, duration_s: float, iterations: int | None) -> None:
        self._left_s = duration_s
        self._left = iterations

    def next_runs(self) -> int:
        """Return how many to ask for next; 0 when it is enough."""
        if self._left is not None:
            return min(self._left, _BURST_RUNS_MAX)
        return _BURST_RUNS_MAX if self._left_s > 0 else 0

    def take(self, burst: Burst) -> None:
        """Count what has run."""
        self._left_s -= sum(burst.wall_s)
        if self._left is not None:
            self._left -= len(burst.wall_s)
