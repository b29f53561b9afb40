"""A stage for efforts: a service that does as it is told, and counts of what happens."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from kvx.cache.breaker import Breaker
from kvx.cache.s3.effort import Effort
from kvx.cache.s3.store import ObjectError, ObjectFault
from kvx.config import BreakerConfig
from tests.cache.s3.played_time import BEGIN_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

RESET_S = 5.0
NEVER = 1e5


@dataclass
class Counts:
    """What an effort tells."""

    calls: Counter[ObjectFault | None] = field(default_factory=Counter)
    attempts: Counter[ObjectFault | None] = field(default_factory=Counter)
    retries: Counter[ObjectFault] = field(default_factory=Counter)
    hedges: int = 0
    hedges_won: int = 0
    seconds: list[float] = field(default_factory=list)

    def note_call(self, verb: str, seconds: float, fault: ObjectFault | None) -> None:
        assert verb
        self.calls[fault] += 1
        self.seconds.append(seconds)

    def note_attempt(self, verb: str, seconds: float, fault: ObjectFault | None) -> None:
        assert verb
        assert seconds >= 0
        self.attempts[fault] += 1

    def note_retry(self, verb: str, fault: ObjectFault) -> None:
        assert verb
        self.retries[fault] += 1

    def note_hedge(self, verb: str) -> None:
        assert verb
        self.hedges += 1

    def note_hedge_won(self, verb: str) -> None:
        assert verb
        self.hedges_won += 1


@dataclass(frozen=True, slots=True)
class Step:
    """What one request does: `seconds` of work, then a failure or the number of the request."""

    seconds: float = 0.01
    fault: ObjectFault | None = None
    ignores_cancel: bool = False


class Service:
    """Does one step after the other, and the last for ever; counts what is under way."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.begun_s: list[float] = []
        self.num_cancelled = 0
        self.num_running = 0
        self.num_running_max = 0

    async def ask(self) -> int:
        number = len(self.begun_s)
        step = self.steps[min(number, len(self.steps) - 1)]
        self.begun_s.append(asyncio.get_running_loop().time())
        self.num_running += 1
        self.num_running_max = max(self.num_running_max, self.num_running)
        try:
            await self._work(step)
        finally:
            self.num_running -= 1
        if step.fault is not None:
            raise ObjectError("as told", fault=step.fault)
        return number

    async def _work(self, step: Step) -> None:
        ends_at = asyncio.get_running_loop().time() + step.seconds
        while (left_s := ends_at - asyncio.get_running_loop().time()) > 0:
            try:
                await asyncio.sleep(left_s)
            except asyncio.CancelledError:
                self.num_cancelled += 1
                if not step.ignores_cancel:
                    raise


class Stage:
    """An effort, and all it is given."""

    def __init__(self, *, max_in_flight: int = 8, failures: int = 3, seed: int = 1) -> None:
        self.loop = asyncio.get_running_loop()
        self.counts = Counts()
        self.breaker = Breaker(BreakerConfig(failures=failures, reset_s=RESET_S), self.loop.time)
        self.effort = Effort(
            self.breaker, self.counts, max_in_flight=max_in_flight, rng=random.Random(seed)
        )

    @property
    def elapsed_s(self) -> float:
        return self.loop.time() - BEGIN_S

    async def call(
        self, ask: Callable[[], Awaitable[int]], limit_s: float = 5.0, *, may_hedge: bool = False
    ) -> int:
        ends_at = self.loop.time() + limit_s
        return await self.effort.call("get", ask, ends_at=ends_at, may_hedge=may_hedge)

    async def fault_of(
        self, ask: Callable[[], Awaitable[int]], limit_s: float = 5.0
    ) -> ObjectFault:
        with pytest.raises(ObjectError) as caught:
            await self.call(ask, limit_s)
        return caught.value.fault

    async def warm(self, service: Service, count: int = 100) -> None:
        """Make calls that tell what is usual."""
        for _ in range(count):
            await self.call(service.ask, may_hedge=True)
