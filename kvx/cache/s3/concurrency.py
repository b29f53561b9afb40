"""How many requests are under way at a time: as many as are allowed, fewer when that is too many.

Additive increase, multiplicative decrease, between 1 and `limit_max`; who does not fit in waits in
the order of coming. Source: Chiu and Jain, "Analysis of the Increase and Decrease Algorithms"
(1989).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict


class Concurrency:
    """Slots for requests; of one event loop."""

    def __init__(self, limit_max: int) -> None:
        """Begin with all slots: what is too many shows soon."""
        self.in_flight = 0
        self._limit_max = limit_max
        self._limit = float(limit_max)
        self._cut_at_s = float("-inf")
        self._waiting: OrderedDict[asyncio.Future[bool], None] = OrderedDict()

    @property
    def limit(self) -> int:
        """Most requests at a time, now."""
        return int(self._limit)

    @property
    def num_waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._waiting)

    def try_acquire(self) -> bool:
        """Take a slot if one is free: then nobody waits for it."""
        if self.in_flight >= self.limit:
            return False
        self.in_flight += 1
        return True

    async def acquire(self, ends_at: float) -> bool:
        """Take a slot, in turn; return False when `ends_at` of the loop's clock comes before that.

        Whoever has taken one calls `release`.
        """
        if self.try_acquire():
            return True
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        self._waiting[turn] = None
        timer = loop.call_at(ends_at, _expire, turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.result():
                self.release()
            raise
        finally:
            timer.cancel()
            self._waiting.pop(turn, None)

    def release(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        self._grant()

    def worked(self) -> None:
        """Note a request that went well: one slot more a round, where all are used."""
        if self.in_flight >= self.limit:
            self._limit = min(float(self._limit_max), self._limit + 1.0 / self._limit)
            self._grant()

    def congested(self, factor: float, begun_s: float, now_s: float) -> None:
        """Note a request begun at `begun_s` that shows there are too many; once a round counts."""
        if begun_s >= self._cut_at_s:
            self._limit = max(1.0, self._limit * factor)
            self._cut_at_s = now_s

    def _grant(self) -> None:
        while self._waiting and self.in_flight < self.limit:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                self.in_flight += 1
                turn.set_result(True)


def _expire(turn: asyncio.Future[bool]) -> None:
    if not turn.done():
        turn.set_result(False)
