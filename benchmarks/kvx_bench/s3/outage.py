"""A server that stands still: what it costs those who have their blocks nearer, and who has not."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from kvx_bench.row import Row, Sample, percentiles_us
from kvx_bench.s3.delay import DelayedLine
from kvx_bench.s3.rig import KVX, Rig
from kvx_bench.transfer.contest import Contest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvx_bench.s3.clients.client import Place
    from kvx_bench.s3.entrant import Entrant

_FAR, _NEAR = 1, 2
_SERVE_S = 1.0
_CALLS_A_ROUND = 4
_DEADLINE_S = 0.5
_GRACE_S = 0.1
# A quarter of the blocks are in DRAM then.
_NVME_SHARE = 4
# So that it is not the breaker that ends calls.
_NEVER = 1_000_000


def frozen_rows(rig: Rig, folder: Path) -> Iterator[Row]:
    """Yield what is served from DRAM and from NVMe meanwhile, and when calls for the rest end."""
    plain = replace(rig.place(), deadline_s=_DEADLINE_S)
    quarter = rig.num_bytes // _NVME_SHARE
    places = {
        "dram": plain,
        "nvme": replace(plain, folder=str(folder / "outage"), capacity_bytes=quarter),
    }
    if rig.is_quick:
        del places["nvme"]
    for tier, place in places.items():
        with _behind_a_line(rig, place) as (line, entrant):
            yield _serve(rig, line, entrant).row(
                f"s3.frozen.serve.{tier}", "frozen", "awake",
                note=f"onboard of {rig.num_blocks} x {rig.size} from {tier}, each matched with a "
                "tail that the bucket is asked for; beside the same while the server answers",
            )  # fmt: skip
    with _behind_a_line(rig, replace(plain, breaker_failures=_NEVER)) as (line, entrant):
        yield _call_row(line, entrant, _CALLS_A_ROUND * rig.rounds)


@contextlib.contextmanager
def _behind_a_line(rig: Rig, place: Place) -> Iterator[tuple[DelayedLine, Entrant]]:
    """Start a cache; it stores straight, with time for that, and lives behind a line."""
    with DelayedLine(rig.bucket.service) as line:
        with rig.open(KVX) as writer:
            writer.ask("put", prompt=_FAR)
        with rig.open(KVX, replace(place, url=line.service.url)) as entrant:
            entrant.ask("keep", prompt=_NEAR)
            yield line, entrant


def _serve(rig: Rig, line: DelayedLine, entrant: Entrant) -> Contest:
    seconds = _SERVE_S / 4 if rig.is_quick else _SERVE_S

    def once(*, is_frozen: bool) -> Sample:
        with line.frozen() if is_frozen else contextlib.nullcontext():
            return Sample(**entrant.ask("serve", prompt=_NEAR, seconds=seconds))

    samples: dict[str, list[Sample]] = {"frozen": [], "awake": []}
    for number in range(2 * rig.rounds):
        # Each goes first half of the time.
        for is_frozen in (False, True) if number % 2 else (True, False):
            samples["frozen" if is_frozen else "awake"].append(once(is_frozen=is_frozen))
    return Contest(rig.num_bytes, samples)


def _call_row(line: DelayedLine, entrant: Entrant, count: int) -> Row:
    with line.frozen():
        answer = entrant.ask("ask-far", prompt=_FAR, count=count, deadline_s=_DEADLINE_S)
    times = list(map(float, answer["times"]))
    p50_us, p99_us = percentiles_us(times)
    late = sum(one > _DEADLINE_S + _GRACE_S for one in times)
    return Row(
        "s3.frozen.call", p50_us=p50_us, p99_us=p99_us,
        note=f"prefetch of blocks that only the bucket has, deadline {_DEADLINE_S * 1e3:.0f} ms, "
        f"no breaker: {late} of {len(times)} ended later than {_GRACE_S * 1e3:.0f} ms behind it; "
        f"the longest took {max(times) * 1e3:.0f} ms",
    )  # fmt: skip
