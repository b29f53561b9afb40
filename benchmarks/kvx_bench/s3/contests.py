"""Everybody against the same server: who is how fast, and what it costs his process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.errors import UnavailableError
from kvx_bench.s3.rig import KVX, Rig, absent_row, present
from kvx_bench.transfer.contest import Contest, hold

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvx_bench.row import Row
    from kvx_bench.s3.entrant import Entrant


def contest_rows(rig: Rig) -> Iterator[Row]:
    """Yield a row a client for gets, and for puts; baselines first."""
    absent: list[Row] = []
    with present(rig, absent) as entrants:
        for name, entrant in tuple(entrants.items()):
            try:
                entrant.store()
            except UnavailableError as error:
                absent.append(absent_row(name, error))
                del entrants[name]
        gets = {name: entrant.get for name, entrant in entrants.items()}
        yield from _rows(rig, entrants, "get", hold(gets, rig.num_bytes, rounds=rig.rounds))
        puts = {name: entrant.put for name, entrant in entrants.items()}
        yield from _rows(rig, entrants, "put", hold(puts, rig.num_bytes, rounds=rig.rounds))
    yield from absent


def _rows(rig: Rig, entrants: Mapping[str, Entrant], verb: str, contest: Contest) -> Iterator[Row]:
    others = sorted(set(entrants) - {KVX}, key=contest.gb_per_s, reverse=True)
    work = f"{rig.num_blocks} x {rig.size}, {rig.concurrency} at a time"
    for name in others:
        yield contest.row(
            f"s3.baseline.{name}.{verb}.{rig.size}", name, *others[: name != others[0]],
            note=f"{work}; {entrants[name].description}",
        )  # fmt: skip
    if KVX in entrants:
        note = f"{work}; {entrants[KVX].description}; {_cost_note(contest, others)}"
        yield contest.row(f"s3.{verb}.{rig.size}", KVX, *others, note=note)


def _cost_note(contest: Contest, others: list[str]) -> str:
    if not others:
        return "nobody to compare its CPU with"
    leanest = min(others, key=contest.cpu_s_per_gb)
    share = contest.cpu_s_per_gb(KVX) / contest.cpu_s_per_gb(leanest)
    return f"CPU {share:.2f} x that of the leanest, {leanest}"
