"""How hard calls are tried, on a clock that is played."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.cache.s3.store import ObjectError, ObjectFault
from tests.cache.s3.effort_stage import NEVER, Service, Stage, Step
from tests.cache.s3.played_time import BEGIN_S, play

if TYPE_CHECKING:
    from collections.abc import Awaitable

TRANSIENT = [fault for fault in ObjectFault if fault.is_transient]
LASTING = [fault for fault in ObjectFault if not fault.is_transient]


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
        # What lost is known to have taken at least that long.
        (pace,) = stage.effort._paces.values()
        assert max(pace._recent) == pytest.approx(0.065)

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
        with pytest.raises(ObjectError) as caught:
            await stage.call(service.ask, may_hedge=True)
        assert caught.value.fault is ObjectFault.MISSING
        assert stage.counts.hedges == 2
        assert stage.counts.retries == {}

    play(scene)


def test_no_more_hedges_at_once_than_were_saved() -> None:
    async def scene() -> None:
        stage = Stage(max_in_flight=200)
        await stage.warm(Service(Step(0.05)), 1000)
        service = Service(Step(NEVER))
        calls = (stage.call(service.ask, 1.0, may_hedge=True) for _ in range(50))
        await asyncio.gather(*calls, return_exceptions=True)
        assert stage.counts.hedges == 4

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
