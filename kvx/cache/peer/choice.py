"""Whom to ask for which block, when several peers hold it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that could be asked.

    Attributes:
        warm: (n,) bool, the blocks that its memory holds.
        cold: (n,) bool, those that its disk holds.
        is_near: Whether it runs on this host.
        load_bytes: Bytes on their way from it.
    """

    warm: npt.NDArray[np.bool_]
    cold: npt.NDArray[np.bool_]
    is_near: bool
    load_bytes: int


def choose(
    candidates: Sequence[Candidate], num_blocks: int, block_bytes: int
) -> npt.NDArray[np.int64]:
    """Return, (n,) int64, which candidate to ask for each block; NOBODY where none has it.

    Memory before disk, this host before others; among equals the work is shared out so that all
    are about as loaded afterwards.
    """
    chosen = np.full(num_blocks, NOBODY, np.int64)
    loads = [one.load_bytes for one in candidates]
    for is_warm in (True, False):
        for is_near in (True, False):
            places = [place for place, one in enumerate(candidates) if one.is_near is is_near]
            holds = [candidates[p].warm if is_warm else candidates[p].cold for p in places]
            _share_out(chosen, places, holds, loads, block_bytes)
    return chosen


def _share_out(
    chosen: npt.NDArray[np.int64],
    places: list[int],
    holds: list[npt.NDArray[np.bool_]],
    loads: list[int],
    block_bytes: int,
) -> None:
    """Give blocks that nobody was asked for yet to equals, the least loaded first."""
    order = sorted(range(len(places)), key=lambda one: loads[places[one]])
    for turn, one in enumerate(order):
        open_rows = np.flatnonzero((chosen == NOBODY) & holds[one])
        rivals = order[turn + 1 :]
        if rivals and len(open_rows):
            # What others hold as well is shared with them; what only this one has is all its own.
            is_shared = np.logical_or.reduce([holds[other][open_rows] for other in rivals])
            own, shared = open_rows[~is_shared], open_rows[is_shared]
            all_loads = [loads[places[other]] for other in (one, *rivals)]
            level = (sum(all_loads) + len(open_rows) * block_bytes) / len(all_loads)
            mine = int((level - all_loads[0]) / block_bytes) - len(own)
            open_rows = np.concatenate([own, shared[: max(0, mine)]])
        chosen[open_rows] = places[one]
        loads[places[one]] += len(open_rows) * block_bytes
