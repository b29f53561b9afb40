"""Pulls into the same blocks take turns: a device writes what it is given at once in any order.

Two transfers into the same place at the same time are of no use to anybody, but they must not
leave bytes of both there, and the planner of copies may not be given them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A wish to write blocks.

    Attributes:
        region: Of ours.
        rows: (n, 4) int64 in it; no two overlap.
        start: Called when it is its turn.
    """

    region: int
    rows: npt.NDArray[np.int64]
    start: Callable[[], None]


class Turns:
    """Who writes what on one desk; for its thread."""

    def __init__(self) -> None:
        """Let everybody begin."""
        self._taken: dict[int, list[Turn]] = {}
        self._waiting: dict[int, list[Turn]] = {}

    def take(self, turn: Turn) -> None:
        """Start a turn, now or when those that are in its way have left."""
        waiting = self._waiting.get(turn.region, [])
        if waiting or self._is_in_the_way(turn):
            self._waiting.setdefault(turn.region, []).append(turn)
            return
        self._begin(turn)

    def leave(self, turn: Turn) -> None:
        """End a turn, or a wait for it."""
        for turns in (self._taken, self._waiting):
            there = turns.get(turn.region, [])
            if turn in there:
                there.remove(turn)
            if not there:
                turns.pop(turn.region, None)
        while waiting := self._waiting.get(turn.region):
            if self._is_in_the_way(waiting[0]):
                return
            following = waiting.pop(0)
            if not waiting:
                del self._waiting[turn.region]
            self._begin(following)

    def _begin(self, turn: Turn) -> None:
        self._taken.setdefault(turn.region, []).append(turn)
        turn.start()

    def _is_in_the_way(self, turn: Turn) -> bool:
        """Return whether somebody is at these blocks."""
        taken = self._taken.get(turn.region)
        if not taken:
            return False
        rows = np.concatenate([one.rows for one in (*taken, turn)])
        return _core.find_overlap(rows) >= 0
