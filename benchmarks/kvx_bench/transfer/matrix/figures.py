"""The figures of one line of a matrix, from what its runs took. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx_bench.row import GB, median, percentiles_us
from kvx_bench.transfer.pair.pair import Burst

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvx_bench.transfer.matrix.options import Cell


@dataclass(frozen=True, slots=True)
class Figures:
    """One line. Latencies are those of a whole transfer, from the call to the end of the wait.

    Attributes:
        backend: The way.
        memory: Where both sides' memory is, or INITIATOR:TARGET.
        op: "read" or "write".
        block_bytes: Of each block.
        batch: Blocks of a transfer.
        iterations: Transfers.
        gb_per_s: All bytes in the time of all transfers.
        avg_us: Latency.
        p50_us: Latency.
        p99_us: Latency.
        prep_us: To check and describe both sides, first submission included; once.
        post_us: Median until a submission came back.
        cpu_s_per_gb: Of the initiator's process.
        target_cpu_s_per_gb: Of the target's process.
        limit_name: What the same could have been done by; empty between two hosts.
        limit_gb_per_s: What that reached.
        ratio: Median of kvx to that, in turn.
        is_checked: Whether every byte was looked at.
        absent: Why there are no figures; empty when there are.
    """

    backend: str
    memory: str
    op: str
    block_bytes: int
    batch: int
    iterations: int = 0
    gb_per_s: float | None = None
    avg_us: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    prep_us: float | None = None
    post_us: float | None = None
    cpu_s_per_gb: float | None = None
    target_cpu_s_per_gb: float | None = None
    limit_name: str = ""
    limit_gb_per_s: float | None = None
    ratio: float | None = None
    is_checked: bool = False
    absent: str = ""


@dataclass(frozen=True, slots=True)
class LimitRuns:
    """What a baseline needed, a run after each burst of kvx.

    Attributes:
        name: The baseline.
        wall_s: Of each run.
    """

    name: str
    wall_s: Sequence[float]


def absent(cell: Cell, reason: str) -> Figures:
    """Return the line of a cell that cannot be measured."""
    work = cell.work
    return Figures(
        cell.backend, cell.memory, work.operation, work.block_bytes, work.batch, absent=reason
    )


def summarise(
    cell: Cell,
    bursts: Sequence[Burst],
    prepare_s: float,
    *,
    limit: LimitRuns | None = None,
    is_checked: bool = False,
) -> Figures:
    """Return the line of a cell.

    Args:
        cell: What was run.
        bursts: At least one.
        prepare_s: What preparing took.
        limit: What was run beside it, as often as there are bursts.
        is_checked: Whether every byte was looked at.
    """
    work = cell.work
    walls = [wall for burst in bursts for wall in burst.wall_s]
    gigabytes = len(walls) * work.num_bytes / GB
    p50_us, p99_us = percentiles_us(walls)
    pairs = (
        [theirs / median(burst.wall_s) for burst, theirs in zip(bursts, limit.wall_s, strict=True)]
        if limit
        else []
    )
    return Figures(
        cell.backend,
        cell.memory,
        work.operation,
        work.block_bytes,
        work.batch,
        iterations=len(walls),
        gb_per_s=gigabytes / sum(walls),
        avg_us=sum(walls) / len(walls) * 1e6,
        p50_us=p50_us,
        p99_us=p99_us,
        prep_us=prepare_s * 1e6,
        post_us=median(post for burst in bursts for post in burst.post_s) * 1e6,
        cpu_s_per_gb=sum(burst.cpu_s for burst in bursts) / gigabytes,
        target_cpu_s_per_gb=sum(burst.target_cpu_s for burst in bursts) / gigabytes,
        limit_name=limit.name if limit else "",
        limit_gb_per_s=work.num_bytes / GB / median(limit.wall_s) if limit else None,
        ratio=median(pairs) if pairs else None,
        is_checked=is_checked,
    )
