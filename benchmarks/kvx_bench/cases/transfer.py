"""Blocks from one process to another, beside everything else that could have moved them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx_bench.row import Row
from kvx_bench.transfer.baselines.limits import TOP, Limits
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.contest import hold
from kvx_bench.transfer.sizes import size_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.case import Options

# By bytes of a block, how many: more than a cache holds, and fewer of those that take longest.
BATCHES = {4 << 10: 16384, 64 << 10: 4096, 2 << 20: 256}
_QUICK_BYTES_MAX = 64 << 20
# Fewer and the median is not worth much beside a second process.
_ROUNDS_MIN = 5
_ROUND_TRIPS = 5000
_ROUND_TRIP_BYTES = 4 << 10


class TransferCase:
    """Reads and writes of whole batches between two processes of this host."""

    name = "transfer"
    description = "blocks from one process to another"

    def why_not(self, _options: Options) -> str:
        """It runs everywhere."""
        return ""

    def run(self, options: Options) -> Iterator[Row]:
        """Everything of one size in turn, round after round."""
        works = _works(is_quick=options.is_quick)
        num_bytes = max(work.num_bytes for work in works)
        with Limits(num_bytes, nixl_python=options.nixl_python) as limits:
            for work in works:
                yield from _baseline_rows(limits, work, max(_ROUNDS_MIN, options.repeats))
            yield from _round_trip_rows(limits, _ROUND_TRIPS // (5 if options.is_quick else 1))
            for absent in limits.absent:
                yield Row(
                    f"transfer.baseline.{absent.name}", note=f"not here because {absent.reason}"
                )


def _works(*, is_quick: bool) -> list[Work]:
    return [
        Work(is_write, size, min(batch, _QUICK_BYTES_MAX // size) if is_quick else batch)
        for size, batch in BATCHES.items()
        for is_write in (False, True)
    ]


def _baseline_rows(limits: Limits, work: Work, rounds: int) -> Iterator[Row]:
    able = limits.able(work)
    contest = hold(
        {one.name: lambda one=one: one.run(work) for one in able},  # type: ignore[misc]
        work.num_bytes,
        rounds=rounds,
    )
    for one in able:
        assert one.moves_all(work), f"{one.name}, {work}: what arrived is what was sent"
        key = f"transfer.baseline.{one.name}.{work.operation}.{size_name(work.block_bytes)}"
        limit = "" if one.name == TOP else TOP
        yield contest.row(key, one.name, limit, note=f"{work.batch} blocks; {one.description}")


def _round_trip_rows(limits: Limits, count: int) -> Iterator[Row]:
    for echo in limits.echoes:
        p50_us, p99_us = echo.round_trips_us(_ROUND_TRIP_BYTES, count)
        yield Row(
            f"transfer.baseline.{echo.name}.roundtrip.{size_name(_ROUND_TRIP_BYTES)}",
            p50_us=p50_us,
            p99_us=p99_us,
            note=echo.description,
        )
