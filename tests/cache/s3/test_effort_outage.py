"""An endpoint that fails is left alone and probed, one that is full is asked less; played clock."""

from __future__ import annotations

import asyncio

import pytest

from kvx.cache.breaker import BreakerState
from kvx.cache.s3.store import ObjectError, ObjectFault
from tests.cache.s3.effort_stage import NEVER, RESET_S, Service, Stage, Step
from tests.cache.s3.played_time import play


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


@pytest.mark.parametrize("fault", [None, ObjectFault.MISSING])
def test_fewer_at_a_time_where_the_service_says_so_and_more_again(
    fault: ObjectFault | None,
) -> None:
    async def scene() -> None:
        service = Service(Step(fault=fault))
        stage = Stage(max_in_flight=16)
        full = Service(*[Step(fault=ObjectFault.THROTTLED)] * 16, Step())
        await asyncio.gather(*(stage.call(full.ask) for _ in range(16)))
        # Sixteen at once are one sign of it, and none of an outage.
        assert stage.effort.stats().limit == 8
        assert stage.effort.stats().breaker is BreakerState.CLOSED
        calls = (stage.call(service.ask) for _ in range(200))
        await asyncio.gather(*calls, return_exceptions=True)
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
