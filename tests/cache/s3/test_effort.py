"""How hard calls are tried, on a clock that is played."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.cache.breaker import Breaker, BreakerState
from kvx.cache.s3.effort import Effort
from kvx.cache.s3.store import ObjectError, ObjectFault
from kvx.config import BreakerConfig
from tests.cache.s3.played_time import BEGIN_S, play

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

RESET_S = 5.0
NEVER = 1e5
TRANSIENT = [fault for fault in ObjectFault if fault.is_transient]
LASTING = [fault for fault in ObjectFault if not fault.is_transient]


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


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_transient_failure_is_tried_again(fault: ObjectFault) -> None:
    async def scene() -> None:
        stage, service = Stage(), Service(Step(fault=fault), Step(fault=fault), Step())
        assert await stage.call(service.ask) == 2
        assert stage.counts.retries == {fault: 2}
        assert stage.counts.attempts == {fault: 2, None: 1}
        assert stage.counts.calls == {None: 1}

    play(scene)


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_failure_is_not_tried_again(fault: ObjectFault) -> None:
    async def scene() -> None:
        stage, service = Stage(), Service(Step(fault=fault), Step())
        assert await stage.fault_of(service.ask) is fault
        assert len(service.begun_s) == 1
        assert stage.counts.calls == {fault: 1}

    play(scene)


@given(st.integers(0, 1 << 32))
@settings(deadline=None, max_examples=30)
def test_pauses_grow_by_chance_and_end_with_the_deadline(seed: int) -> None:
    async def scene() -> None:
        stage = Stage(failures=1000, seed=seed)
        service = Service(Step(seconds=0, fault=ObjectFault.SERVER))
        assert await stage.fault_of(service.ask, limit_s=20) is ObjectFault.SERVER
        pauses = [later - sooner for sooner, later in itertools.pairwise(service.begun_s)]
        assert len(pauses) > 19
        before_s = 0.02
        for pause_s in pauses:
            assert 0.02 <= pause_s <= min(1.0, before_s * 3) + 1e-9
            before_s = pause_s
        assert len(set(pauses)) == len(pauses)
        # It is not waited for a deadline that comes before the next try.
        assert 19 <= stage.elapsed_s < 20

    play(scene)


@pytest.mark.parametrize("ignores_cancel", [False, True])
def test_a_call_ends_at_its_deadline_whatever_the_request_does(ignores_cancel: bool) -> None:
    async def scene() -> None:
        stage, service = Stage(), Service(Step(30.0, ignores_cancel=ignores_cancel))
        with pytest.raises(ObjectError, match=r"not done within 2\.000 s") as caught:
            await stage.call(service.ask, limit_s=2.0)
        assert caught.value.fault is ObjectFault.TIMEOUT
        assert stage.elapsed_s == pytest.approx(2.0)
        await asyncio.sleep(0.01)
        assert service.num_cancelled == 1
        # What still runs has its slot still, and changes nothing when it ends.
        assert stage.effort.stats().in_flight == int(ignores_cancel)
        await asyncio.sleep(60.0)
        assert stage.effort.stats().in_flight == 0
        assert stage.counts.attempts == {ObjectFault.TIMEOUT: 1}

    play(scene)


@pytest.mark.parametrize("limit_s", [0.0, -1.0])
def test_a_deadline_that_has_passed(limit_s: float) -> None:
    async def scene() -> None:
        stage, service = Stage(), Service(Step())
        assert await stage.fault_of(service.ask, limit_s) is ObjectFault.TIMEOUT
        assert not service.begun_s

    play(scene)


def test_slots_are_given_in_the_order_of_coming_and_waiting_is_part_of_the_call() -> None:
    async def scene() -> None:
        stage, service = Stage(max_in_flight=2), Service(Step(1.0))
        order: list[int] = []

        async def call(number: int) -> None:
            await stage.call(service.ask, limit_s=3.5)
            order.append(number)

        calls = [asyncio.create_task(call(number)) for number in range(10)]
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert order == list(range(6))
        late = [one for one in ended if isinstance(one, ObjectError)]
        assert [one.fault for one in late] == [ObjectFault.TIMEOUT] * 4
        # Two were asked for and cut; two never came that far.
        assert sum("others are under way" in str(one) for one in late) == 2
        assert service.num_running_max == 2
        assert stage.elapsed_s == pytest.approx(3.5)

    play(scene)


def test_whoever_gives_up_leaves_the_queue() -> None:
    async def scene() -> None:
        stage, service = Stage(max_in_flight=1), Service(Step(1.0))
        calls = [asyncio.create_task(stage.call(service.ask)) for _ in range(4)]
        await asyncio.sleep(0.5)
        for number in (0, 2):
            calls[number].cancel()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in ended] == [True, False] * 2
        assert stage.elapsed_s == pytest.approx(2.5)
        stats = stage.effort.stats()
        assert (stats.in_flight, stats.num_waiting) == (0, 0)
        assert stage.counts.calls == {None: 2}

    play(scene)


def test_a_slow_read_is_hedged_after_what_is_usual() -> None:
    async def scene() -> None:
        stage = Stage()
        await stage.warm(Service(Step(0.05)))
        service = Service(Step(NEVER), Step(0.01))
        began_s = stage.elapsed_s
        assert await stage.call(service.ask, may_hedge=True) == 1
        assert stage.elapsed_s - began_s == pytest.approx(0.065)
        await asyncio.sleep(0.01)
        assert service.num_cancelled == 1
        assert (stage.counts.hedges, stage.counts.hedges_won) == (1, 1)
        assert stage.effort.stats().in_flight == 0

    play(scene)


def test_a_hedge_that_is_not_needed_after_all_is_cancelled() -> None:
    async def scene() -> None:
        stage = Stage()
        await stage.warm(Service(Step(0.05)))
        service = Service(Step(0.07), Step(NEVER))
        assert await stage.call(service.ask, may_hedge=True) == 0
        assert (stage.counts.hedges, stage.counts.hedges_won) == (1, 0)
        await asyncio.sleep(0.01)
        assert service.num_cancelled == 1

    play(scene)


@pytest.mark.parametrize("reason", ["not asked for", "too few samples", "no slot is free"])
def test_what_is_not_hedged(reason: str) -> None:
    async def scene() -> None:
        stage = Stage(max_in_flight=1 if reason == "no slot is free" else 8)
        await stage.warm(Service(Step(0.05)), 19 if reason == "too few samples" else 100)
        service = Service(Step(1.0))
        assert await stage.call(service.ask, may_hedge=reason != "not asked for") == 0
        assert stage.counts.hedges == 0

    play(scene)


def test_a_transient_failure_waits_for_the_hedge_a_lasting_one_does_not() -> None:
    async def scene() -> None:
        stage = Stage()
        await stage.warm(Service(Step(0.05)))
        service = Service(Step(0.06, ObjectFault.SERVER), Step(0.1))
        assert await stage.call(service.ask, may_hedge=True) == 1
        service = Service(Step(0.06, ObjectFault.MISSING), Step(NEVER))
        with pytest.raises(ObjectError):
            await stage.call(service.ask, may_hedge=True)
        assert stage.counts.hedges == 2
        assert stage.counts.retries == {}

    play(scene)


@given(st.integers(0, 1 << 32), st.integers(50, 300))
@settings(deadline=None, max_examples=15)
def test_hedges_are_few(seed: int, count: int) -> None:
    """However slow all have become, one call of twenty is asked for twice, and one more."""

    async def scene() -> None:
        stage, rng = Stage(), random.Random(seed)
        await stage.warm(Service(Step(0.05)), 20)
        service = Service(*(Step(rng.choice((0.05, 1.0))) for _ in range(count)))
        await stage.warm(service, count)
        assert stage.counts.hedges <= 1 + 0.05 * (20 + count)
        assert stage.counts.hedges > 0

    play(scene)


def test_an_endpoint_that_fails_is_left_alone_and_then_probed_by_one() -> None:
    async def scene() -> None:
        stage, service = Stage(), Service(Step(fault=ObjectFault.CONNECTION))
        assert await stage.fault_of(service.ask) is ObjectFault.CONNECTION
        assert (len(service.begun_s), stage.effort.stats().breaker) == (3, BreakerState.OPEN)
        before_s = stage.elapsed_s
        with pytest.raises(ObjectError, match=r"as told.*again in 5\.0 s") as caught:
            await stage.call(service.ask)
        assert caught.value.fault is ObjectFault.AVOIDED
        assert (stage.elapsed_s, len(service.begun_s)) == (before_s, 3)
        await asyncio.sleep(RESET_S)
        service.steps = [Step(0.5)]
        faults = await asyncio.gather(
            *(stage.call(service.ask) for _ in range(10)), return_exceptions=True
        )
        avoided = [one for one in faults if isinstance(one, ObjectError)]
        assert {one.fault for one in avoided} == {ObjectFault.AVOIDED}
        assert (len(avoided), len(service.begun_s)) == (9, 4)
        assert stage.effort.stats().breaker is BreakerState.CLOSED
        await asyncio.gather(*(stage.call(service.ask) for _ in range(10)))

    play(scene)


def test_a_failed_probe_is_neither_hedged_nor_retried() -> None:
    async def scene() -> None:
        stage = Stage()
        await stage.warm(Service(Step(0.05)))
        service = Service(*[Step(fault=ObjectFault.SERVER)] * 3, Step(1.0, ObjectFault.SERVER))
        await stage.fault_of(service.ask)
        await asyncio.sleep(RESET_S)
        with pytest.raises(ObjectError):
            await stage.call(service.ask, may_hedge=True)
        assert (len(service.begun_s), stage.counts.hedges) == (4, 0)
        assert stage.effort.stats().breaker is BreakerState.OPEN

    play(scene)


@pytest.mark.parametrize("how", ["cancelled", "in a hurry"])
def test_a_probe_without_an_outcome_leaves_its_place(how: str) -> None:
    async def scene() -> None:
        stage, service = Stage(), Service(*[Step(fault=ObjectFault.SERVER)] * 3, Step(NEVER))
        await stage.fault_of(service.ask)
        await asyncio.sleep(RESET_S)
        probe = asyncio.create_task(stage.call(service.ask, 0.1 if how == "in a hurry" else 5.0))
        await asyncio.sleep(0.05)
        if how == "cancelled":
            probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        service.steps = [Step()]
        await asyncio.sleep(0.01)
        assert await stage.call(service.ask) == 4

    play(scene)


@pytest.mark.parametrize(
    ("limit_s", "expected"), [(0.99, BreakerState.CLOSED), (1.0, BreakerState.OPEN)]
)
def test_who_was_in_a_hurry_says_nothing_of_the_endpoint(
    limit_s: float, expected: BreakerState
) -> None:
    async def scene() -> None:
        stage, service = Stage(), Service(Step(NEVER))
        for _ in range(3):
            assert await stage.fault_of(service.ask, limit_s) is ObjectFault.TIMEOUT
        assert stage.effort.stats().breaker is expected

    play(scene)


@pytest.mark.parametrize("fault", [ObjectFault.MISSING, ObjectFault.CONFLICT, ObjectFault.RANGE])
def test_what_an_endpoint_says_of_an_object_shows_that_it_works(fault: ObjectFault) -> None:
    async def scene() -> None:
        stage = Stage(failures=1)
        await stage.fault_of(Service(Step(fault=ObjectFault.DENIED)).ask)
        assert stage.effort.stats().breaker is BreakerState.OPEN
        await asyncio.sleep(RESET_S)
        assert await stage.fault_of(Service(Step(fault=fault)).ask) is fault
        assert stage.effort.stats().breaker is BreakerState.CLOSED

    play(scene)


def test_fewer_at_a_time_where_the_service_says_so_and_more_again() -> None:
    async def scene() -> None:
        stage = Stage(max_in_flight=16)
        full = Service(*[Step(fault=ObjectFault.THROTTLED)] * 16, Step())
        await asyncio.gather(*(stage.call(full.ask) for _ in range(16)))
        # Sixteen at once are one sign of it, and none of an outage.
        assert stage.effort.stats().limit == 8
        assert stage.effort.stats().breaker is BreakerState.CLOSED
        service = Service(Step())
        await asyncio.gather(*(stage.call(service.ask) for _ in range(200)))
        assert stage.effort.stats().limit == 16
        assert service.num_running_max == 16

    play(scene)


def test_throttling_of_a_single_request_is_an_outage() -> None:
    async def scene() -> None:
        stage, service = Stage(max_in_flight=1), Service(Step(fault=ObjectFault.THROTTLED))
        assert await stage.fault_of(service.ask) is ObjectFault.THROTTLED
        assert len(service.begun_s) == 3
        assert stage.effort.stats().breaker is BreakerState.OPEN

    play(scene)


def test_fewer_at_a_time_where_they_wait_for_each_other() -> None:
    async def scene() -> None:
        stage = Stage(max_in_flight=16)
        await stage.warm(Service(Step(0.05)), 32)
        crowded = Service(Step(1.0))
        await asyncio.gather(*(stage.call(crowded.ask, 60) for _ in range(64)))
        assert stage.effort.stats().limit < 16

    play(scene)


def test_mistakes_of_the_caller_come_through_and_cost_no_slot() -> None:
    async def scene() -> None:
        stage = Stage(max_in_flight=1)

        async def wrong() -> int:
            raise ZeroDivisionError

        def worse() -> Awaitable[int]:
            raise ZeroDivisionError

        for ask in (wrong, worse):
            with pytest.raises(ZeroDivisionError):
                await stage.call(ask)
        assert await stage.call(Service(Step()).ask) == 0
        assert stage.counts.calls == {None: 1}

    play(scene)


STEPS = st.builds(
    Step,
    st.sampled_from((0.0, 0.01, 0.1, 1.0, 3.0, NEVER)),
    st.sampled_from((None, None, *ObjectFault)),
    st.booleans(),
)


@given(
    st.lists(STEPS, min_size=1, max_size=40),
    st.lists(st.tuples(st.floats(0, 10), st.floats(-0.5, 6)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(0, 1 << 32),
)
@settings(deadline=None, max_examples=150)
def test_whatever_happens_calls_end_in_time_and_slots_come_back(
    steps: list[Step], calls: list[tuple[float, float]], max_in_flight: int, seed: int
) -> None:
    async def scene() -> None:
        stage, rng = Stage(max_in_flight=max_in_flight, seed=seed), random.Random(seed)
        service, faults = Service(*steps, Step()), Counter[ObjectFault | None]()

        async def call(begins_s: float, limit_s: float) -> None:
            await asyncio.sleep(begins_s)
            ends_at = stage.loop.time() + limit_s
            try:
                await stage.call(service.ask, limit_s, may_hedge=rng.random() < 0.5)
            except ObjectError as error:
                faults[error.fault] += 1
            assert stage.loop.time() <= max(ends_at, BEGIN_S + begins_s) + 1e-6

        await asyncio.gather(*(call(*one) for one in calls))
        faults[None] = len(calls) - faults.total()
        assert stage.counts.calls == faults
        assert stage.effort.stats().num_waiting == 0
        await asyncio.sleep(100)
        # Only what ignores that it was cancelled has its slot still.
        assert stage.effort.stats().in_flight == service.num_running
        assert service.num_running_max <= max_in_flight

    play(scene)
